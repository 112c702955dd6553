"""A run that is killed or stopped, and goes on, ends with the bits of one that was left in peace."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from danling_core.launch.client import Launcher
from tests.damage import empty, flip, truncate
from tests.marks import rarely
from tests.whole_runs import ROOT, Ended, config, fault, launch

COSINE = {"name": "cosine", "warmup_steps": 3}
PLAIN: dict[str, Any] = {"nproc_per_node": 1}
# What is trained, and the rank that dies in which step. 8 steps make an epoch, a checkpoint comes every 3.
KILLED: dict[str, tuple[dict[str, Any], int, int]] = {
    "one rank, mid-epoch": (PLAIN | {"dataloader": {"batch_size": 8}}, 13, 0),
    "accumulation, EMA, scheduler, BatchNorm": (
        {
            "accum_steps": 2,
            "ema_decay": 0.9,
            "scheduler": COSINE,
            "params": {"batch_norm": True, "samples": 120},
        },
        13,
        1,
    ),
    "three ranks": (
        {"nproc_per_node": 3, "dataloader": {"batch_size": 3}, "params": {"logs": True}},
        11,
        2,
    ),
    "loader workers": (
        {"dataloader": {"batch_size": 4, "num_workers": 1, "persistent_workers": True}},
        12,
        0,
    ),
    "skipped steps": ({"non_finite": "skip", "params": {"overflows_at": 5}, "ema_decay": 0.9}, 13, 1),
    "fp16, its scale halved twice": (
        PLAIN | {"precision": "fp16", "non_finite": "skip", "params": {"overflows_at": 5}},
        30,
        0,
    ),
    "own buffers on each rank": ({"broadcast_buffers": False, "params": {"batch_norm": True}}, 13, 1),
    "state of a user's own on each rank, values that it logs, a callback": (
        {
            "params": {"memory": True, "logs": True},
            "callbacks": [{"name": "tests.faulty_runner:Slowing", "by": 0.8}],
        },
        13,
        1,
    ),
    "SWA from a share of the steps on": (
        {"average": {"name": "swa", "start": 0.3}, "params": {"batch_norm": True}},
        13,
        1,
    ),
    "steps": (
        PLAIN | {"step_end": 21, "evaluate_interval_steps": 5, "dataloader": {"batch_size": 8}},
        18,
        0,
    ),
    "iters": (PLAIN | {"iter_end": 41, "accum_steps": 2, "scheduler": COSINE}, 18, 0),
    "patience": (
        PLAIN
        | {
            "epoch_end": 30,
            "patience": 3,
            "optim": {"name": "sgd", "lr": 1e-9},
            "dataloader": {"batch_size": 8},
        },
        30,
        0,
    ),
    "a plateau": (
        PLAIN
        | {
            "scheduler": {"name": "ReduceLROnPlateau", "patience": 0},
            "epoch_end": 5,
            "dataloader": {"batch_size": 8},
        },
        28,
        0,
    ),
}


OFTEN = (
    "one rank, mid-epoch",
    "state of a user's own on each rank, values that it logs, a callback",
    "three ranks",
    "loader workers",
    "accumulation, EMA, scheduler, BatchNorm",
)


@pytest.mark.holds("config-6", "bugs-6")
@pytest.mark.parametrize("case", [*OFTEN, *rarely(sorted(set(KILLED) - set(OFTEN)))])
def test_a_killed_rank_costs_nothing(
    launcher: Launcher, in_peace_with: Callable[..., Ended], tmp_path: Path, case: str
) -> None:
    fields, step, rank = KILLED[case]
    with fault("SIGKILL", step, rank=rank):
        ended = launch(launcher, config(tmp_path, **fields))
    assert ended.outcome is not None and (ended.outcome.status, ended.outcome.restarts) == ("complete", 1)
    resumed = [event["resumed"] for event in ended.events if event["event"] == "run_started"]
    assert resumed[0] is None and resumed[1]["step"] == step // 3 * 3
    ended.must_equal(in_peace_with(**fields))
    assert ended.status.bitwise


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("modules", [[], ["Linear"]])
def test_a_compiled_model_is_resumed_to_the_same_bits(
    launcher: Launcher, in_peace_with: Callable[..., Ended], tmp_path: Path, modules: list[str]
) -> None:
    """Inductor for real, on two ranks."""
    fields: dict[str, Any] = {"compile": {"backend": "inductor", "modules": modules}, "ema_decay": 0.9}
    with fault("SIGKILL", 13, rank=1):
        ended = launch(launcher, config(tmp_path, **fields), timeout_seconds=300)
    assert ended.outcome is not None and (ended.outcome.status, ended.outcome.restarts) == ("complete", 1)
    ended.must_equal(in_peace_with(**fields))


STOPPED = {
    "mid-epoch": ("train", 4),
    "in the last step of an epoch": ("train", 7),
    "in the first step of an epoch": ("train", 8),
    "while evaluating": ("evaluate", 8),
    "in the last evaluation": ("evaluate", 24),
}


@pytest.mark.long
@pytest.mark.holds("system-5")
def test_torchrun_ends_with_the_bits_of_the_launcher(
    in_peace_with: Callable[..., Ended], tmp_path: Path
) -> None:
    wanted = config(tmp_path / "root", threads_per_rank=2)
    file = tmp_path / "run.json"
    file.write_text(wanted.jsons())
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "danling_core.worker", str(file)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "3"},  # another than the config's, which counts
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    [status] = (tmp_path / "root").glob("*/*/status.json")
    Ended(status.parent, None).must_equal(in_peace_with(threads_per_rank=2))


@pytest.mark.parametrize(
    "where",
    ["mid-epoch", "while evaluating", *rarely(sorted(set(STOPPED) - {"mid-epoch", "while evaluating"}))],
)
def test_a_run_stopped_by_sigterm_goes_on_where_it_was(
    launcher: Launcher, in_peace_with: Callable[..., Ended], tmp_path: Path, where: str
) -> None:
    fields: dict[str, Any] = {"params": {"batch_norm": True}, "ema_decay": 0.9}
    place, step = STOPPED[where]
    wanted = config(tmp_path, **fields)
    with fault("SIGTERM", step, rank=1, place=place):
        stopped = launch(launcher, wanted)
    assert stopped.outcome is not None and stopped.outcome.status == "interrupted"
    assert stopped.status.status == "interrupted"
    ended = launch(launcher, wanted)
    assert ended.outcome is not None and (ended.outcome.status, ended.outcome.restarts) == ("complete", 0)
    assert ended.path == stopped.path
    ended.must_equal(in_peace_with(**fields))
    assert launch(launcher, wanted).outcome is None, "it is complete"


@pytest.mark.long
def test_a_run_whose_time_is_over_goes_on_next_time(
    launcher: Launcher, in_peace_with: Callable[..., Ended], tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"params": {"step_seconds": 0.1}}
    stopped = launch(launcher, config(tmp_path, max_seconds=0.7, **fields))
    assert stopped.outcome is not None and stopped.outcome.status == "interrupted"
    assert "max_seconds is over" in (stopped.outcome.error or "")
    ended = launch(launcher, config(tmp_path, **fields))
    assert ended.path == stopped.path
    ended.must_equal(in_peace_with(**fields))


@pytest.mark.holds("levels-6")
def test_another_world_size_goes_on_and_is_no_longer_bitwise(launcher: Launcher, tmp_path: Path) -> None:
    here = {"dir": str(tmp_path / "run"), "nproc_per_node": "auto"}
    with fault("SIGTERM", 13, rank=1):
        stopped = launch(launcher, config(tmp_path, **here), nproc=2)
    assert stopped.outcome is not None and stopped.outcome.status == "interrupted" and stopped.status.bitwise
    ended = launch(launcher, config(tmp_path, **here), nproc=1)
    assert ended.outcome is not None and ended.outcome.status == "complete"
    assert (ended.status.bitwise, ended.status.world_size) == (False, 1)
    assert sorted(ended.json("results.json")["results"]) == ["0", "1", "2"]
    assert "2 rank(s)" in ended.log


@pytest.mark.parametrize("damage", [flip, *rarely([truncate, empty])])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_taken(
    launcher: Launcher, in_peace_with: Callable[..., Ended], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    fields: dict[str, Any] = PLAIN | {"dataloader": {"batch_size": 8}}
    stopped = stop(launcher, tmp_path, **fields)
    newest, before = stopped.store().records()[:2]
    damage(stopped.path / "checkpoints" / "data" / newest.name / "state.pt")
    ended = launch(launcher, config(tmp_path, **fields))
    assert ended.outcome is not None and ended.outcome.status == "complete"
    assert f"checkpoint {newest.name} is bad" in ended.log
    assert ended.events[-1]["event"] == "completed"
    resumed = [event["resumed"] for event in ended.events if event["event"] == "run_started"][-1]
    assert resumed["record"] == before.name
    ended.must_equal(in_peace_with(**fields))


def test_a_run_with_nothing_but_damaged_checkpoints_does_not_start_anew(
    launcher: Launcher, tmp_path: Path
) -> None:
    stopped = stop(launcher, tmp_path, nproc_per_node=2)
    names = [record.name for record in stopped.store().records()]
    for name in names:
        flip(stopped.path / "checkpoints" / "data" / name / "state.pt")
    results = stopped.json("results.json")
    ended = launch(launcher, config(tmp_path, nproc_per_node=2))
    assert ended.outcome is not None and ended.outcome.status == "failed"
    error = ended.outcome.error or ""
    assert len(names) > 1 and all(name in error for name in names) and "--fresh" in error
    assert ended.json("results.json") == results, "nothing was trained over it"


def stop(launcher: Launcher, root: Path, **fields: Any) -> Ended:
    """A run that stopped in its second epoch."""
    with fault("SIGTERM", 13):
        stopped = launch(launcher, config(root, **fields))
    assert stopped.outcome is not None and stopped.outcome.status == "interrupted"
    return stopped


def test_a_loss_that_is_not_a_number_is_refused_and_the_last_checkpoint_stays(
    launcher: Launcher, tmp_path: Path
) -> None:
    with fault("nan", 13, rank=1):
        ended = launch(launcher, config(tmp_path))
    assert ended.outcome is not None and ended.outcome.status == "failed" and ended.outcome.restarts == 0
    error = ended.outcome.error or ""
    assert "nan" in error and "step 13" in error and "rank 1" in error
    newest, bad = ended.store().newest_good()
    assert newest is not None and newest.step in (8, 12) and not bad  # the last save may have been under way
    assert launch(launcher, config(tmp_path)).status.status == "complete", "mended, it goes on"
