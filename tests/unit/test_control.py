"""The memory shared by launcher and ranks, the rules of the watch, the verdict, and lives tied together."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from danling_core.errors import ConfigError
from danling_core.launch.verdict import GroupEnd, RankEnd, judge
from danling_core.launch.watch import Hang
from danling_core.parallel.control import Control, collective_timeout, silence_allowed
from danling_core.process_tree import is_alive
from danling_core.session.rank_failures import describe, is_lost_peer


@pytest.fixture
def control(tmp_path: Path) -> Iterator[Control]:
    with Control.create(str(tmp_path / "control"), 2) as control:
        yield control


# The shared memory


def test_what_one_side_writes_the_other_reads(control: Control) -> None:
    with Control.open(control.path) as other:
        rank = other.ranks[1]
        assert (rank.step, rank.beats, rank.is_done) == (None, 0, False)
        rank.enter()
        rank.beat(7)
        rank.finish()
        seen = control.ranks[1]
        assert (seen.step, seen.beats, seen.is_done) == (7, 1, True)
        assert is_alive(seen.pid, seen.started) and seen.pid == os.getpid()
        assert control.ranks[0].pid == 0, "another rank's cells were touched"
        control.request_stop()
        other.stop_at_step = 0
        assert other.stop_requested and control.stop_at_step == 0, "step 0 is a step"


def test_the_file_of_another_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "control"
    path.write_bytes(bytes(1024))
    with pytest.raises(ValueError, match="not a control file"):
        Control.open(str(path))


def test_an_existing_control_file_is_never_taken_over(control: Control) -> None:
    with pytest.raises(FileExistsError):
        Control.create(control.path, 2)


# The watch: time is passed in


def test_a_collective_waits_longer_than_the_watch() -> None:
    for timeout in (5.0, 600.0, 7200.0):
        for is_starting in (True, False):
            assert collective_timeout(timeout) > silence_allowed(timeout, is_starting) + 30.0


# The verdict


def rank_end(exit_code: int | None = 0, **fields: Any) -> RankEnd:
    defaults = {"is_done": False, "step": 3}
    return RankEnd(exit_code, **{**defaults, **fields})


def raised(error: str, at: float, is_lost_peer: bool = False) -> dict[str, Any]:
    return {"error": error, "traceback": f"Traceback: {error}", "time": at, "is_lost_peer": is_lost_peer}


ECHO = raised("Connection closed by peer", at=1.0, is_lost_peer=True)


def test_a_death_comes_before_its_echo() -> None:
    verdict = judge(GroupEnd([rank_end(1, failure=ECHO), rank_end(-9, step=5)]))
    assert (verdict.kind, verdict.rank, verdict.step) == ("died", 1, 5)
    assert verdict.is_restartable and "SIGKILL" in verdict.message


def test_a_death_comes_before_those_by_the_sigterm_that_follows_it() -> None:
    verdict = judge(GroupEnd([rank_end(-15), rank_end(-9)]))
    assert verdict.rank == 1 and "SIGKILL" in verdict.message
    assert judge(GroupEnd([rank_end(-15)])).is_restartable


def test_an_exception_comes_before_the_abort_that_it_causes() -> None:
    verdict = judge(GroupEnd([rank_end(-6), rank_end(1, failure=raised("ValueError: fish", at=2.0))]))
    assert (verdict.kind, verdict.rank, verdict.traceback) == ("raised", 1, "Traceback: ValueError: fish")
    assert not verdict.is_restartable


def test_the_earliest_of_several_exceptions_is_told() -> None:
    ranks = [rank_end(1, failure=raised("late", at=2.0)), rank_end(1, failure=raised("early", at=1.0))]
    assert judge(GroupEnd(ranks)).rank == 1


def test_a_rank_killed_by_the_launcher_is_not_the_cause() -> None:
    verdict = judge(GroupEnd([rank_end(-9, was_killed=True), rank_end(-11)]))
    assert verdict.rank == 1 and "SIGSEGV" in verdict.message


def test_a_hang_comes_before_the_deaths_that_end_it() -> None:
    hang = Hang(rank=1, step=None, silent_seconds=12.0)
    verdict = judge(GroupEnd([rank_end(-9, was_killed=True)] * 2, hang))
    assert (verdict.kind, verdict.step) == ("hung", None)
    assert "before its first step" in verdict.message and "12 s" in verdict.message
    assert "hang_timeout_seconds" in verdict.message


def test_an_echo_without_a_death_is_told_as_it_is() -> None:
    verdict = judge(GroupEnd([rank_end(0, is_done=True), rank_end(1, failure=ECHO)]))
    assert (verdict.kind, verdict.rank) == ("raised", 1)


def test_a_loader_worker_killed_by_a_signal_is_a_death() -> None:
    error = RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. ")
    assert is_lost_peer(error)
    failure = {**describe(error), "time": 1.0}
    assert judge(GroupEnd([rank_end(1, failure=failure)])).is_restartable


def test_a_rank_that_raised_is_told_though_elastic_cannot_read_its_error() -> None:
    ranks = [rank_end(1, failure=raised("StorageError: full", at=1.0)), rank_end(-9, was_killed=True)]
    verdict = judge(GroupEnd(ranks, launch_error="UnpicklingError: pickle data was truncated"))
    assert (verdict.kind, verdict.rank) == ("raised", 0) and not verdict.is_restartable


def test_the_death_of_the_fork_server_may_be_mended() -> None:
    assert judge(GroupEnd([rank_end(255), rank_end(255)])).is_restartable


@pytest.mark.parametrize(
    ("error", "is_echo"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"), True),
        (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv"), True),
        (RuntimeError("Broken pipe in my own code"), False),
        (ValueError("connection reset by peer"), False),
        (ConfigError("gloo: connection closed by peer"), False),
    ],
)
def test_only_errors_of_the_network_of_ranks_are_echoes(error: Exception, is_echo: bool) -> None:
    assert is_lost_peer(error) is is_echo


def test_errors_of_torch_distributed_are_echoes() -> None:
    class DistError(RuntimeError):
        """As torch calls the base of its own."""

    assert is_lost_peer(type("DistNetworkError", (DistError,), {})("anything"))


def test_a_secret_in_an_error_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE_SECRET_KEY", "swordfish-42")
    told = json.dumps(describe(ValueError("cannot log in with swordfish-42")))
    assert "swordfish" not in told


# Lives tied together
