"""Ranks of the real worker that hang, or that die whenever they come to the same step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from danling_core.launch import Launcher
from tests.whole_runs import config, fault, launch


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with Launcher() as launcher:
        yield launcher


def test_a_frozen_rank_is_found_by_its_silence_and_the_run_goes_on(
    launcher: Launcher, tmp_path: Path
) -> None:
    with fault("SIGSTOP", 13, rank=1):
        ended = launch(launcher, config(tmp_path), hang_timeout_seconds=5.0)
    assert ended.outcome is not None and (ended.outcome.status, ended.outcome.restarts) == ("complete", 1)
    told = next(event for event in ended.events if event["event"] == "restarting")
    # Rank 0 falls silent in the same step, waiting for rank 1: which of them is stuck, the stacks tell.
    assert "hung at step 13" in told["error"] and told["step"] == 13


def test_the_stack_of_a_rank_that_sleeps_forever_is_in_its_log(launcher: Launcher, tmp_path: Path) -> None:
    with fault("sleep", 13, rank=1):
        ended = launch(launcher, config(tmp_path), hang_timeout_seconds=5.0)
    assert ended.outcome is not None and (ended.outcome.status, ended.outcome.restarts) == ("complete", 1)
    log = (ended.path / "logs" / "rank-1.log").read_text()
    assert "in sleep_forever" in log and "in train_step" in log
    assert "in sleep_forever" not in ended.log, "rank 0 waits in a reduction"


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
