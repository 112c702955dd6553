"""An API that is slow is late with what it shows, and holds no run up."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import pytest

from danling_core.config.sweep import ExperimentSpec
from danling_core.runs.finding import list_runs
from danling_core.runs.lease import current_owner
from flows.pool import LauncherPool, using
from tests.prefect_fixtures import PrefectServer
from tests.slow_proxy import SlowProxy, slow_proxy
from tests.whole.test_flows import Shown

Make = Callable[..., dict[str, Any]]
HELD_UP = 4.0


@pytest.fixture
def api(prefect_server: PrefectServer) -> Iterator[SlowProxy]:
    """The API behind a proxy, for flows called in the test."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with (
        slow_proxy(urlsplit(prefect_server.api_url).port or 0) as proxy,
        temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{proxy.port}/api"}),
    ):
        yield proxy


def _began(root: Path) -> list[float]:
    """The time at which each run began its first epoch, in order."""
    logs = [file.read_text().splitlines() for file in root.glob("*/*/events.jsonl")]
    events = [[json.loads(line) for line in lines] for lines in logs]
    return sorted(next(event["time"] for event in run if event["event"] == "epoch_began") for run in events)


@pytest.mark.long
def test_runs_do_not_wait_for_an_api_that_is_slow_and_are_shown_late(
    api: SlowProxy, prefect_server: PrefectServer, toy_config: Make, tmp_path: Path
) -> None:
    from flows.experiment import experiment

    spec = ExperimentSpec(config=toy_config(experiment_name="late"), sweep={"seed": [0, 1, 2]})
    api.beginning, api.seconds = b"POST /api/flow_runs/ ", HELD_UP
    api.passed_first = 1  # the experiment's own
    with using(LauncherPool()):
        state = experiment(spec, return_state=True)
    assert state.is_completed() and api.held_up == 3, state.message
    began = _began(tmp_path / "experiments")
    assert len(began) == 3 and began[-1] - began[0] < 2 * HELD_UP, "a run waited for the API"
    shown = Shown(prefect_server)
    runs = [run for run in shown.flow_runs() if "experiment:late" in run.tags and run.name != "late"]
    assert len(runs) == 3 and all(run.state.is_completed() for run in runs)
    for run in runs:
        names = [task.name for task in shown.task_runs(run.id, 6)]
        assert names[0] in ("seed-0", "seed-1", "seed-2")
        assert names[1:] == ["epoch-0", "epoch-1", "evaluate", "score", "store"]
        assert {"table", "markdown"} <= set(shown.artifacts(run.id))


@pytest.mark.long
def test_a_run_that_its_flow_shows_late_is_cancelled_by_that_flow_and_names_it(
    api: SlowProxy,
    prefect_server: PrefectServer,
    toy_config: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from flows.experiment import experiment

    monkeypatch.setattr("flows.cancellation.POLL_SECONDS", 0.2)
    endless = toy_config(experiment_name="late-cancel", epoch_end=4000, params={"sleep_seconds": 0.02})
    api.beginning, api.seconds, api.passed_first = b"POST /api/flow_runs/ ", HELD_UP, 1
    root = tmp_path / "experiments"
    named: list[tuple[str, ...]] = []

    def cancel_once_named() -> None:
        with prefect_server.client() as client:
            while not named:
                time.sleep(0.2)
                late = [each for each in client.read_flow_runs(limit=200) if each.name == "late-cancel-run"]
                owners = [
                    current_owner(folder.lease_parent_url) for folder, _ in list_runs(str(root)) if late
                ]
                named.extend(
                    owner.flow_runs for owner in owners if owner and str(late[0].id) in owner.flow_runs
                )
        _cancel(prefect_server, named[0][0])

    canceller = threading.Thread(target=cancel_once_named, daemon=True)
    canceller.start()
    with using(LauncherPool()) as pool:
        state = experiment(ExperimentSpec(config=endless), return_state=True)
    assert api.held_up == 1 and len(named[0]) == 2, "the run's flow came late, under the experiment's"
    assert [outcome.status for outcome in pool.outcomes.values()] == ["interrupted"], pool.outcomes
    assert state.name == "Interrupted"


def _cancel(server: PrefectServer, flow_run_id: str) -> None:
    from prefect.client.schemas.objects import StateType
    from prefect.states import State

    with server.client() as client:
        client.set_flow_run_state(UUID(flow_run_id), State(type=StateType.CANCELLING))
