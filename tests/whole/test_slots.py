"""Slots that runs share outlive a restart of the server, and come back after a death."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from danling_core.parallel import loopback
from danling_core.runs.finding import list_runs
from flows.server import why_unreachable
from flows.slots import LEASE_STORAGE
from tests.processes import wait_until

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.long


class Server:
    """A server as `danling up` starts it, which can be killed and started again over the same home."""

    def __init__(self, home: Path) -> None:
        with loopback.listen(0) as listener:
            self._port = loopback.address(listener)[1]
        self.api_url = f"http://127.0.0.1:{self._port}/api"
        self.environment = {
            **os.environ,
            **LEASE_STORAGE,
            "PREFECT_HOME": str(home),
            "PREFECT_API_URL": self.api_url,
            "PREFECT__SERVER_FINAL": "1",
            "PYTHONPATH": str(ROOT),
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        words = ["-m", "uvicorn", "flows.server_app:create_app", "--factory", "--port", str(self._port)]
        self._process = subprocess.Popen(
            [sys.executable, "-P", *words, "--log-level", "error"], env=self.environment
        )
        wait_until(lambda: why_unreachable(self.api_url, 2.0) is None, "the server", 100)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def active_slots(self) -> int:
        from prefect.client.orchestration import SyncPrefectClient

        with SyncPrefectClient(self.api_url) as client:
            return int(client.read_global_concurrency_limit_by_name("gpu").active_slots)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "home")
    server.start()
    yield server
    server.kill()


def _start(server: Server, config: dict[str, Any], folder: Path) -> subprocess.Popen[str]:
    file = folder / f"{config['experiment_name']}.json"
    file.write_text(json.dumps(config))
    command = [sys.executable, "-m", "flows.cli", "run", str(file)]
    return subprocess.Popen(
        command, cwd=ROOT, env=server.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _epochs(config: dict[str, Any]) -> int:
    runs = list_runs(config["project_root"]) if Path(config["project_root"]).exists() else []
    found = [status for folder, status in runs if config["experiment_name"] in folder.url]
    return found[0].epochs if found and found[0] is not None else 0


def test_a_restart_of_the_server_frees_nothing_that_is_held_and_hurts_no_run(
    server: Server, toy_config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    config = toy_config(
        experiment_name="holds", slots={"gpu": 1}, epoch_end=60, params={"sleep_seconds": 0.1}
    )
    holder = _start(server, config, tmp_path)
    wait_until(lambda: _epochs(config) >= 2, "two epochs", 90)
    assert server.active_slots() == 1
    server.kill()
    before = _epochs(config)
    time.sleep(4)
    server.start()
    assert server.active_slots() == 1, "who holds a slot is remembered"
    wait_until(lambda: _epochs(config) > before + 3, "epochs after the restart", 60)
    out, _ = holder.communicate(timeout=110)
    assert holder.returncode == 0, out
    wait_until(lambda: server.active_slots() == 0, "no slot that is held", 20)


def test_a_holder_that_dies_frees_its_slot_within_two_minutes(
    server: Server, toy_config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    slow = toy_config(experiment_name="dies", slots={"gpu": 1}, epoch_end=900, params={"sleep_seconds": 0.1})
    holder = _start(server, slow, tmp_path)
    wait_until(lambda: _epochs(slow) >= 1, "an epoch", 90)
    holder.kill()
    died = time.monotonic()
    waiting = _start(server, toy_config(experiment_name="waits", slots={"gpu": 1}), tmp_path)
    out, _ = waiting.communicate(timeout=115)
    assert waiting.returncode == 0 and "waiting for 1 slot(s) of 'gpu'" in out, out
    assert time.monotonic() - died < 120
    holder.communicate()


def test_a_holder_that_is_stopped_frees_its_slot_at_once(
    server: Server, toy_config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    slow = toy_config(experiment_name="stops", slots={"gpu": 1}, epoch_end=900, params={"sleep_seconds": 0.1})
    holder = _start(server, slow, tmp_path)
    wait_until(lambda: _epochs(slow) >= 1, "an epoch", 90)
    holder.send_signal(signal.SIGTERM)
    out, _ = holder.communicate(timeout=60)
    assert holder.returncode == 75, out
    wait_until(lambda: server.active_slots() == 0, "no slot that is held", 10)
