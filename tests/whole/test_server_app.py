"""A busy SQLite database of the server that we start holds nobody up for long, and loses nothing."""

from __future__ import annotations

import contextlib
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

from prefect import flow
from prefect.states import Completed, Running
from websockets.sync.client import connect

from tests.prefect_fixtures import PrefectServer

CLIENTS, RUNS = 8, 5
MOST_SECONDS = 8.0
"""Of one request. Prefect's own client sleeps 2, 4, 8, 16 and 32 s after an answer of 503, its database waits 60."""


@flow(name="busy")
def busy() -> None:
    """Stand for a flow that many clients report."""


def test_many_clients_at_once_are_all_served_and_soon(prefect_server: PrefectServer) -> None:
    def report(client_index: int) -> tuple[list[str], float]:
        names, longest = [], 0.0
        with prefect_server.client() as client:
            for index in range(RUNS):
                began = time.monotonic()
                name = f"busy-{client_index}-{index}"
                run = client.create_flow_run(busy, name=name)
                for state in (Running(), Completed()):
                    client.set_flow_run_state(run.id, state, force=True)
                names.append(client.read_flow_run(run.id).name)
                longest = max(longest, time.monotonic() - began)
        return names, longest

    with ThreadPoolExecutor(CLIENTS) as executor:
        results = list(executor.map(report, range(CLIENTS)))
    assert sorted(name for names, _ in results for name in names) == sorted(
        f"busy-{client}-{index}" for client in range(CLIENTS) for index in range(RUNS)
    )
    assert max(longest for _, longest in results) < MOST_SECONDS


def test_many_websockets_keep_no_request_waiting(prefect_server: PrefectServer) -> None:
    """A worker holds two open for each flow run at work, and Prefect's own app counts them as requests."""
    address = prefect_server.api_url.replace("http", "ws", 1) + "/events/in"
    with contextlib.ExitStack() as held:
        for _ in range(110):
            held.enter_context(connect(address))
        with urllib.request.urlopen(f"{prefect_server.api_url}/health", timeout=20) as answer:
            assert answer.status == 200
