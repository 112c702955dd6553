"""An API that is slow is late with what it shows, and holds no run up."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from danling_core.config.sweep import ExperimentSpec
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
