"""Ranks of the real worker that hang, that die whenever they come to the same step, or are all told to end."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from danling_core.launch.client import Launcher
from tests.processes import wait_until
from tests.whole.test_launch import descendants
from tests.whole_runs import config, fault, launch


@pytest.mark.long
def test_a_frozen_rank_is_found_by_its_silence_and_the_run_goes_on(
    launcher: Launcher, tmp_path: Path
) -> None:
    with fault("SIGSTOP", 13, rank=1):
        ended = launch(launcher, config(tmp_path, hang_timeout_seconds=5.0))
    assert ended.outcome is not None and (ended.outcome.status, ended.outcome.restarts) == ("complete", 1)
    told = next(event for event in ended.events if event["event"] == "restarting")
    # Rank 0 falls silent in the same step, waiting for rank 1: which of them is stuck, the stacks tell.
    assert "hung at step 13" in told["error"] and told["step"] == 13


@pytest.mark.long
def test_the_stack_of_a_rank_that_sleeps_forever_is_in_its_log(launcher: Launcher, tmp_path: Path) -> None:
    with fault("sleep", 13, rank=1):
        ended = launch(launcher, config(tmp_path, hang_timeout_seconds=5.0))
    assert ended.outcome is not None and (ended.outcome.status, ended.outcome.restarts) == ("complete", 1)
    log = (ended.path / "logs" / "rank-1.log").read_text()
    assert "in sleep_forever" in log and "in train_step" in log
    assert "in sleep_forever" not in ended.log, "rank 0 waits in a reduction"


@pytest.mark.long
def test_a_step_that_kills_every_time_is_named_and_final(launcher: Launcher, tmp_path: Path) -> None:
    with fault("SIGKILL", 13, rank=1, attempt=None):
        ended = launch(launcher, config(tmp_path))
    assert ended.outcome is not None and (ended.outcome.status, ended.outcome.restarts) == ("failed", 1)
    assert (ended.outcome.rank, ended.outcome.step) == (1, 13)
    assert "step 13 failed twice in a row" in (ended.outcome.error or "")
    assert (ended.status.status, ended.events[-1]["event"]) == ("failed", "failed")
    newest, bad = ended.store().newest_good()
    assert newest is not None and newest.step == 12 and not bad
    assert launch(launcher, config(tmp_path)).status.status == "complete", "mended, it goes on"


@pytest.mark.long
@pytest.mark.parametrize("max_restarts", [0, 3])
def test_a_run_whose_rank_dies_after_the_completion_record_is_complete(
    launcher: Launcher, tmp_path: Path, max_restarts: int
) -> None:
    with fault("SIGKILL", 24, place="completed"):
        ended = launch(launcher, config(tmp_path), max_restarts=max_restarts)
    assert ended.outcome is not None
    assert (ended.outcome.status, ended.outcome.restarts) == ("complete", min(1, max_restarts))
    assert (ended.status.status, ended.status.error) == ("complete", None)
    assert [event["event"] for event in ended.events].count("completed") == 1


@pytest.mark.long
def test_sigterm_to_every_process_at_once_saves_and_the_run_goes_on_to_the_same_bits(
    launcher: Launcher, tmp_path: Path
) -> None:
    """As a service manager, a batch system or a shutdown stops a machine's processes."""
    fields = {
        "dataloader": {"batch_size": 4, "num_workers": 1, "persistent_workers": True},
        "params": {"step_seconds": 0.05},
    }
    peace = launch(launcher, config(tmp_path / "in_peace", **fields))
    wanted = config(tmp_path, **fields)
    with Launcher() as stopped, ThreadPoolExecutor(1) as driver:
        end = driver.submit(launch, stopped, wanted)
        wait_until(lambda: end.done() or _has_begun(tmp_path), "the first progress")
        assert stopped.pid is not None
        tree = [stopped.pid, *descendants(stopped.pid)]
        assert len(tree) >= 1 + 1 + 2 + 2, "launcher, fork server, ranks and their loaders"
        for pid in tree:
            os.kill(pid, signal.SIGTERM)
        first = end.result()
    assert first.outcome is not None and first.outcome.status == "interrupted"
    told, (record, _) = first.events[-1], first.store().newest_good()
    assert (told["event"], told["attempt"], first.status.status) == ("interrupted", "1.0", "interrupted")
    assert record is not None and 0 < record.step == told["step"] < 24, "saved where it stopped"
    ended = launch(launcher, wanted)
    assert ended.outcome is not None and (ended.outcome.status, ended.outcome.restarts) == ("complete", 0)
    ended.must_equal(peace)


def _has_begun(root: Path) -> bool:
    return any('"progress"' in path.read_text() for path in root.glob("*/*/events.jsonl"))
