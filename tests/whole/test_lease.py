"""Real processes for what tests/unit/test_lease.py tries without them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.queues import Queue

import pytest

from danling_core import storage
from danling_core.runs.lease import (
    Lease,
    current_owner,
    is_held,
)


def test_a_dead_owner_on_this_machine_is_replaced_at_once(tmp_path: os.PathLike[str]) -> None:
    parent = os.path.join(tmp_path, "run")
    code = f"from danling_core.runs.lease import Lease; Lease.acquire({parent!r}, 'child')"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert current_owner(parent) is not None and not is_held(parent)
    assert Lease.acquire(parent, "second").generation == 2


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_stopped_driver_is_taken_over_and_the_woken_one_writes_nothing(
    tmp_path: os.PathLike[str], signal_number: signal.Signals
) -> None:
    parent = os.path.join(tmp_path, "run")
    code = f"""
import sys
from danling_core.runs.lease import Lease
lease = Lease.acquire({parent!r}, 'driver')
with lease.beating(interval=0.05, on_fenced=lambda error: print('fenced', flush=True)):
    print('owns', flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", code]
    driver = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with driver:
        assert driver.stdout is not None and driver.stdout.readline() == "owns\n"
        driver.send_signal(signal_number)
        if signal_number == signal.SIGKILL:
            driver.wait()
        second = Lease.acquire(parent, "second", stale_after_seconds=0.5, wait_seconds=60)
        assert second.generation == 2
        before = storage.read_bytes(storage.join(second.url, "000001.json"))
        driver.send_signal(signal.SIGCONT)
        assert driver.stdout.readline() == ("" if signal_number == signal.SIGKILL else "fenced\n")
        assert storage.read_bytes(storage.join(second.url, "000001.json")) == before
        driver.kill()


def _contend(parent: str, start: object, results: Queue[tuple[int, int]]) -> None:
    start.wait()  # type: ignore[attr-defined]
    for _ in range(5):
        lease = Lease.acquire(parent, "contender", wait_seconds=60, sleep=lambda seconds: time.sleep(0.002))
        results.put((lease.generation, os.getpid()))
        lease.check()
        lease.release()


def test_of_many_processes_one_wins_each_generation(tmp_path: os.PathLike[str]) -> None:
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(6), context.Queue()
    arguments = (os.path.join(tmp_path, "run"), start, results)
    processes = [context.Process(target=_contend, args=arguments) for _ in range(6)]
    for process in processes:
        process.start()
    won = [results.get(timeout=60) for _ in range(30)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(generation for generation, _ in won) == list(range(1, 31))
