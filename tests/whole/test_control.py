"""Real processes for what tests/unit/test_control.py tries without them."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from danling_core.launch.watch import Watch
from danling_core.parallel.control import Control
from danling_core.process_tree import is_alive, kill_tree, start_time
from tests.processes import wait_until
from tests.unit.test_control import control  # noqa: F401


@pytest.fixture
def sleepers() -> Iterator[list[subprocess.Popen[bytes]]]:
    processes = [subprocess.Popen(["sleep", "1000"]) for _ in range(2)]
    yield processes
    for process in processes:
        process.kill()
        process.wait()


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
