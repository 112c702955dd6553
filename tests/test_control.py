"""The memory shared by launcher and ranks, the rules of the watch, the verdict, and lives tied together."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from danling_core.errors import ConfigError
from danling_core.launch.verdict import GroupEnd, RankEnd, judge
from danling_core.launch.watch import Hang, Watch
from danling_core.parallel.control import Control, collective_timeout, silence_allowed
from danling_core.process_tree import is_alive, kill_tree, start_time
from danling_core.session.rank_failures import describe, is_lost_peer
from tests.processes import wait_until


@pytest.fixture
def control(tmp_path: Path) -> Iterator[Control]:
    with Control.create(str(tmp_path / "control"), 2) as control:
        yield control


@pytest.fixture
def sleepers() -> Iterator[list[subprocess.Popen[bytes]]]:
    processes = [subprocess.Popen(["sleep", "1000"]) for _ in range(2)]
    yield processes
    for process in processes:
        process.kill()
        process.wait()


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


def watch_over(control: Control, processes: list[subprocess.Popen[bytes]]) -> Watch:
    watch = Watch(control, hang_timeout_seconds=10.0, stop_grace_seconds=30.0)
    watch.adopt({index: process.pid for index, process in enumerate(processes)}, now=0.0)
    return watch


def work(control: Control, *steps: int) -> None:
    """All ranks are past their first step, and begin these."""
    for rank, step in zip(control.ranks, steps, strict=True):
        rank.beat(step - 1)
        rank.beat(step)


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def test_the_others_have_five_seconds_after_one_died(
    control: Control, sleepers: list[subprocess.Popen[bytes]]
) -> None:
    watch = watch_over(control, sleepers)
    end(sleepers[1])
    watch.tick(1.0)
    watch.tick(5.9)
    assert sleepers[0].poll() is None
    watch.tick(6.1)
    assert sleepers[0].wait(10) == -signal.SIGKILL
    assert watch.killed == {0} and watch.is_group_gone


def test_silence_beyond_the_timeout_is_a_hang_of_the_rank_that_is_behind(
    control: Control, sleepers: list[subprocess.Popen[bytes]]
) -> None:
    watch = watch_over(control, sleepers)
    work(control, 5, 4)
    watch.tick(9.0)
    watch.tick(18.9)
    assert watch.hang is None
    watch.tick(19.1)
    assert watch.hang is not None and (watch.hang.rank, watch.hang.step) == (1, 4)
    assert sleepers[0].poll() is None, "the stacks need a moment"
    watch.tick(21.2)
    assert [process.wait(10) for process in sleepers] == [-signal.SIGKILL] * 2


def test_a_first_step_may_take_half_an_hour_and_the_others_wait_for_it(
    control: Control, sleepers: list[subprocess.Popen[bytes]]
) -> None:
    watch = watch_over(control, sleepers)
    control.ranks[0].beat(0)  # has its first batch
    watch.tick(1.0)
    control.ranks[0].beat(1)
    watch.tick(2.0)
    watch.tick(1799.0)
    assert watch.hang is None
    watch.tick(1801.1)
    assert watch.hang is not None and (watch.hang.rank, watch.hang.step) == (1, None)


def test_who_waited_for_a_slow_start_is_not_hung_when_that_is_over(
    control: Control, sleepers: list[subprocess.Popen[bytes]]
) -> None:
    watch = watch_over(control, sleepers)
    waiting, slow = control.ranks
    slow.beat(0)
    for step in (0, 1):  # and waits in step 1, for the other's second batch
        waiting.beat(step)
    for now in (1.0, 900.0, 1798.0):
        watch.tick(now)
    slow.beat(1)
    for now in (1799.0, 1800.0):
        watch.tick(now)
    assert watch.hang is None
    slow.beat(2)
    watch.tick(1809.0)
    watch.tick(1811.0)
    assert watch.hang is not None and watch.hang.rank == 0, "the usual time begins with the end of the start"


def test_a_collective_waits_longer_than_the_watch() -> None:
    for timeout in (5.0, 600.0, 7200.0):
        for is_starting in (True, False):
            assert collective_timeout(timeout) > silence_allowed(timeout, is_starting) + 30.0


def test_a_rank_that_finished_may_be_silent(
    control: Control, sleepers: list[subprocess.Popen[bytes]]
) -> None:
    watch = watch_over(control, sleepers)
    control.ranks[0].finish()
    for now in range(0, 100, 5):
        control.ranks[1].beat(now)
        watch.tick(float(now))
    assert watch.hang is None and not watch.killed


def test_ranks_that_finished_and_cannot_end_are_ended(
    control: Control, sleepers: list[subprocess.Popen[bytes]]
) -> None:
    watch = watch_over(control, sleepers)
    for rank in control.ranks:
        rank.finish()
    watch.tick(1.0)
    watch.tick(3.9)
    assert not watch.killed
    end(sleepers[0])  # aborts in its teardown: elastic keeps the other one waiting
    watch.tick(3.95)
    watch.tick(4.0)
    assert sleepers[1].wait(10) == -signal.SIGKILL


def test_a_stop_has_its_grace_once(control: Control, sleepers: list[subprocess.Popen[bytes]]) -> None:
    watch = watch_over(control, sleepers)
    watch.request_stop(now=1.0)
    watch.request_stop(now=20.0)
    assert control.stop_requested
    watch.tick(30.9)
    assert not watch.killed
    watch.tick(31.0)
    assert watch.killed == {0, 1}


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

PARENT = """
import os, signal, sys, time
from danling_core.process_tree import children_die_with_us, die_with_parent, start_time, watch_parent
pid = os.fork()
if pid == 0:
    {tie}
    print(os.getpid(), flush=True)
    while True:
        time.sleep(1)
time.sleep(1000)
"""


@pytest.mark.parametrize(
    "tie", ["die_with_parent()", "watch_parent(os.getppid(), start_time(os.getppid()), 0.05)"]
)
@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_dies_with_the_one_it_is_tied_to(tie: str, death: signal.Signals) -> None:
    source = PARENT.format(tie=tie)
    with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        started = start_time(child)
        assert is_alive(child, started)
        parent.send_signal(death)
        wait_until(lambda: not is_alive(child, started), "the child's end")


def test_children_forked_later_die_with_their_parent() -> None:
    source = "from danling_core.process_tree import children_die_with_us as tie; tie()\n" + PARENT.format(
        tie="pass"
    )
    with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        started = start_time(child)
        parent.kill()
        wait_until(lambda: not is_alive(child, started), "the child's end")


def test_a_pid_with_another_start_is_another_process() -> None:
    process = subprocess.Popen(["sleep", "1000"])
    started = start_time(process.pid)
    assert started is not None
    kill_tree(process.pid, started + 1)
    assert process.poll() is None and not is_alive(process.pid, started + 1)
    kill_tree(process.pid, started)
    assert process.wait() == -signal.SIGKILL
    assert start_time(process.pid) is None


@contextmanager
def no_more_files() -> Iterator[None]:
    """This process can open nothing, as when it has too many files open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_who_cannot_open_a_file_still_knows_who_lives() -> None:
    process = subprocess.Popen(["sleep", "1000"])
    started = start_time(process.pid)
    with no_more_files():
        assert is_alive(process.pid, started)
        process.kill()
        process.wait()
        assert not is_alive(process.pid, started)


def test_the_watch_outlives_an_error_of_the_system(
    control: Control, sleepers: list[subprocess.Popen[bytes]], caplog: pytest.LogCaptureFixture
) -> None:
    watch = watch_over(control, sleepers)
    watch.kill_from_now_on()
    with no_more_files():
        thread = watch.start(poll_seconds=0.01)
        wait_until(lambda: "the watch" in caplog.text or not thread.is_alive(), "the error")
    assert [process.wait(10) for process in sleepers] == [-signal.SIGKILL] * 2
    watch.stop()
    thread.join()


def _pause() -> None:
    time.sleep(1000)


def test_a_zombie_counts_as_gone() -> None:
    process = multiprocessing.get_context("fork").Process(target=_pause)
    process.start()
    assert process.pid is not None
    started = start_time(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(process.pid or 0, started), "its end")
    process.join()
