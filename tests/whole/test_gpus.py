"""Runs that train at the same time have GPUs of their own. No GPU is needed: the arithmetic is that of names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from danling_core.config import Config
from danling_core.config.sweep import ExperimentSpec, GroupSpec
from danling_core.errors import ConfigError
from danling_core.launch.client import Launcher, RunRequest
from danling_core.launch.plan import RunPlan
from danling_core.writers.events import EventLog
from flows.gpus import runs_at_once, shares
from flows.pool import LauncherPool
from tests.prefect_fixtures import PrefectServer


def _on(gpus: int, ranks: int, device: str = "auto") -> RunPlan:
    config = Config.from_dict({"experiment_name": "gpus", "epoch_end": 1, "device": device})
    return RunPlan(config, world_size=ranks, device="cuda", gpus=gpus)


@pytest.mark.parametrize(
    ("visible", "gpus", "slots", "expected"),
    [
        (None, 8, 8, ["0", "1", "2", "3", "4", "5", "6", "7"]),
        (None, 8, 2, ["0,1,2,3", "4,5,6,7"]),
        ("", 2, 2, ["0", "1"]),
        ("6,2,4", 3, 2, ["6", "2"]),
        ("GPU-ab,GPU-cd", 2, 2, ["GPU-ab", "GPU-cd"]),
        ("5,4,-1,3", 2, 2, ["5", "4"]),
    ],
)
def test_slots_have_no_gpu_in_common(visible: str | None, gpus: int, slots: int, expected: list[str]) -> None:
    assert shares(visible, gpus, slots) == expected


def test_as_many_runs_train_at_a_time_as_there_are_gpus_for() -> None:
    assert runs_at_once(8, [_on(8, 1)]) == 8
    assert runs_at_once(8, [_on(8, 1), _on(8, 2)]) == 4
    assert runs_at_once(2, [_on(2, 2)]) == 1
    assert runs_at_once(2, [_on(1, 2)]) == 2, "more ranks than GPUs: they train on the CPU"
    assert runs_at_once(4, [replace(_on(8, 2), device="cpu")]) == 4
    with pytest.raises(ConfigError, match="want 8 GPUs, and there are 4: use concurrency: 2"):
        runs_at_once(4, [_on(4, 2, "cuda")])


def prepare(config: dict[str, Any], cwd: str) -> dict[str, Any]:
    """Stands in for the worker's, on a machine with four GPUs."""
    return {"config": config, "experiment_id": "e" * 40, "device": "cuda", "gpus": 4, "world_size": 2}


def run_rank(request: dict[str, Any], control_path: str, restart: int) -> None:
    """Stands in for the worker's: tells which GPUs it may see."""
    log = EventLog(os.path.join(request["work_dir"], "events.jsonl"), f"{request['generation']}.{restart}")
    log.emit("completed", gpus=os.environ.get("CUDA_VISIBLE_DEVICES"))
    log.close()


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[LauncherPool]:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,6,5,4")
    here = "tests.whole.test_gpus"
    pool = LauncherPool(
        3, launcher=lambda: Launcher(rank_entrypoint=f"{here}:run_rank", prepare_entrypoint=f"{here}:prepare")
    )
    yield pool
    pool.close()


@pytest.mark.long
@pytest.mark.parametrize("level", ["experiment", "group"])
def test_a_deployed_flow_wants_gpus_for_no_more_runs_than_it_has(
    level: str, prefect_server: PrefectServer, toy_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.experiment import experiment
    from flows.group import group

    here, pools = "tests.whole.test_gpus", []

    def make(slots: int) -> LauncherPool:
        launcher = partial(Launcher, rank_entrypoint=f"{here}:run_rank", prepare_entrypoint=f"{here}:prepare")
        pools.append(LauncherPool(slots, launcher=launcher))
        return pools[-1]

    monkeypatch.setattr("flows.pool.LauncherPool", make)
    spec = {"config": toy_config(device="cuda"), "sweep": {"seed": [0, 1]}}
    if level == "experiment":
        experiment(ExperimentSpec(**spec, concurrency=4), return_state=True)
    else:
        group(GroupSpec(group="g", experiments=[spec], concurrency=4), return_state=True)
    assert len(pools[0].outcomes) == 2, "2 runs of 2 ranks on 4 GPUs"


@pytest.mark.long
def test_a_rank_sees_the_gpus_of_its_slot_only(pool: LauncherPool, tmp_path: Path) -> None:
    pool.prepare([Config(epoch_end=1)])
    assert pool.slots == 2
    seen = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        with pool.slot() as launcher:
            events = launcher.run(RunRequest({}, str(tmp_path / name))).events()
            seen += [event["gpus"] for event in events]
    assert sorted(seen) == ["5,4", "7,6"]
