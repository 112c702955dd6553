"""Who may write a run: one owner per generation, stale ones taken over, old ones fenced."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from danling_core import storage
from danling_core.errors import Fenced, RunBusy, StoreUnavailable
from danling_core.runs.lease import (
    Lease,
    Owner,
    check_generation,
    current_owner,
    is_held,
    lease_url,
    seems_held,
)
from tests.gcs_server import GCSServer
from tests.processes import wait_until
from tests.s3_faults import FaultyProxy


@pytest.fixture(params=["local", "memory"])
def parent(request: pytest.FixtureRequest, tmp_path: os.PathLike[str]) -> str:
    return os.path.join(tmp_path, "run-1") if request.param == "local" else f"memory://lease/{time.time_ns()}"


class Clock:
    """Time that passes only by sleeping; `on_sleep` lets something happen meanwhile."""

    def __init__(self, on_sleep: Callable[[float], None] = lambda now: None) -> None:
        self.now = 1000.0
        self.on_sleep = on_sleep

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.on_sleep(self.now)

    def acquire(self, parent: str, **arguments: float) -> Lease:
        clock = {"now": lambda: self.now, "sleep": self.sleep, "monotonic": lambda: self.now}
        return Lease.acquire(parent, "second", **arguments, **clock)  # type: ignore[arg-type]


def elsewhere(parent: str, generation: int = 1, **changes: object) -> Owner:
    """A generation file of a process on another machine."""
    owner = Owner("token", "driver (ada)", "far", "far/boot/ns", 17, 4711, since=1e9, beat=3, beat_at=2e9)
    owner = replace(owner, **changes)  # type: ignore[arg-type]
    storage.write_bytes(storage.join(lease_url(parent), f"{generation:06d}.json"), owner.dumps())
    return owner


def test_generations_rise(parent: str) -> None:
    for generation in range(1, 6):
        lease = Lease.acquire(parent, "test")
        assert lease.generation == generation
        lease.beat()
        lease.check()
        lease.release()
    assert storage.list_names(lease_url(parent)) == ["000004.json", "000005.json"]
    assert current_owner(parent) is None and not is_held(parent)


def test_a_living_owner_is_named_at_once(parent: str) -> None:
    lease = Lease.acquire(parent, "driver of digits")
    with pytest.raises(RunBusy, match=rf"driver of digits, pid {os.getpid()} on .*since .*last beat"):
        Lease.acquire(parent, "second")
    assert is_held(parent)
    lease.release()
    assert Lease.acquire(parent, "second").generation == 2


def test_the_second_waits_for_the_first_to_finish(parent: str) -> None:
    first = Lease.acquire(parent, "first")
    clock = Clock()
    clock.now = start = time.time()
    clock.on_sleep = lambda now: first.release() if now > start + 5 else None
    assert clock.acquire(parent, wait_seconds=60).generation == 2
    assert 5 < clock.now - start < 8


def test_a_reused_pid_is_not_the_owner(parent: str) -> None:
    owner = replace(Lease.acquire(parent, "first")._owner, pid_started=1)
    storage.write_bytes(storage.join(lease_url(parent), "000001.json"), owner.dumps())
    assert Lease.acquire(parent, "second").generation == 2


def test_another_machines_owner_who_beats_is_alive_whatever_its_clock_says(parent: str) -> None:
    elsewhere(parent, beat=3)
    clock = Clock()
    clock.on_sleep = lambda now: elsewhere(parent, beat=4) if now > 1004 else None
    with pytest.raises(RunBusy, match="pid 17 on far"):
        clock.acquire(parent, stale_after_seconds=30)
    assert clock.now < 1007


def test_another_machines_owner_who_is_silent_is_taken_over(parent: str) -> None:
    elsewhere(parent)
    clock = Clock()
    assert clock.acquire(parent, stale_after_seconds=30).generation == 2
    assert 30 <= clock.now - 1000 < 32


def test_a_stopped_process_on_this_machine_is_taken_over_too(parent: str) -> None:
    first = Lease.acquire(parent, "stopped")
    clock = Clock()
    clock.now = time.time() + 60
    assert clock.acquire(parent, stale_after_seconds=30).generation == 2
    with pytest.raises(Fenced):
        first.beat()


@pytest.mark.parametrize(("beats_at", "seconds"), [(1004, 4), (None, 30)])
def test_an_owner_elsewhere_is_watched_until_it_beats_or_is_stale(
    beats_at: float | None, seconds: float, parent: str
) -> None:
    elsewhere(parent, beat=3)
    clock = Clock(lambda now: elsewhere(parent, beat=4) if beats_at is not None and now >= beats_at else None)  # type: ignore[arg-type,return-value]
    watch = {"now": lambda: clock.now, "sleep": clock.sleep, "monotonic": lambda: clock.now}
    assert is_held(parent, stale_after_seconds=30, **watch) == (beats_at is not None)  # type: ignore[arg-type]
    assert clock.now - 1000 == seconds


@pytest.mark.parametrize(("silence", "seems"), [(60, True), (3600, False)])
def test_a_listing_judges_an_owner_elsewhere_by_its_last_beat(
    silence: float, seems: bool, parent: str
) -> None:
    elsewhere(parent, beat_at=time.time() - silence)
    assert seems_held(parent) == seems


def test_an_old_owner_is_fenced_and_writes_nothing(parent: str) -> None:
    first = Lease.acquire(parent, "first")
    elsewhere(parent, 2)
    for operation in (first.check, first.beat, lambda: check_generation(first.url, 1)):
        with pytest.raises(Fenced, match=r"generation 1 of .* was taken over"):
            operation()
    first.release()
    held = storage.read_json(storage.join(first.url, "000001.json"))
    assert held["beat"] == 0 and not held["is_released"]
    check_generation(first.url, 2)


def test_who_decides_on_an_old_listing_does_not_own(parent: str) -> None:
    """The generation that a slow process creates may have been used and removed long ago."""
    elsewhere(parent, 3)
    assert Lease._try_create(lease_url(parent), 2, "slow", time.time) is None


def test_beats_go_on_in_the_background_and_fencing_is_told_once(parent: str) -> None:
    lease = Lease.acquire(parent, "first")
    told: list[Fenced] = []
    fenced = threading.Event()

    def on_fenced(error: Fenced) -> None:
        told.append(error)
        fenced.set()

    with lease.beating(interval=0.01, on_fenced=on_fenced):
        wait_until(lambda: beats(parent) >= 3, "3 beats")
        elsewhere(parent, 2)
        assert fenced.wait(30)
    assert len(told) == 1 and lease.is_fenced


def test_beats_go_to_the_store_that_the_caller_s_block_names() -> None:
    with GCSServer("danling") as server, storage.using({"endpoint_url": server.url}):
        lease = Lease.acquire("gs://danling/run-1", "first")
        with lease.beating(interval=0.02):
            wait_until(lambda: beats("gs://danling/run-1") > 1, "a beat", 30)


def test_a_beat_that_the_store_refuses_is_repeated(parent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = Lease.acquire(parent, "first")
    write, failures = storage.write_bytes, [StoreUnavailable("away"), StoreUnavailable("away")]

    def faulty(*arguments: object, **options: object) -> None:
        if failures:
            raise failures.pop()
        write(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(storage, "write_bytes", faulty)
    with lease.beating(interval=0.01):
        wait_until(lambda: beats(parent) >= 2, "2 beats")
    assert not failures


def beats(parent: str) -> int:
    owner = current_owner(parent)
    return -1 if owner is None else owner.beat


def test_of_two_owners_of_one_generation_the_first_to_look_is_fenced(parent: str) -> None:
    """As two that start at once may be, on a store without exclusive creates."""
    lease = Lease.acquire(parent, "first")
    other = elsewhere(parent, 1)
    with pytest.raises(Fenced, match="taken over by driver"):
        lease.beat()
    lease.release()
    assert current_owner(parent) == other, "what is another's is not released"


def test_a_connection_that_dies_silently_costs_one_beat_and_not_the_lease(
    s3_root: str, s3_proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("danling_core.runs.lease._ANSWER_SECONDS", 0.5)
    parent = storage.join(s3_root, "run-1")
    lease = Lease.acquire(parent, "first")
    is_silent, is_over = threading.Event(), threading.Event()

    def never_answer_one(method: str, path: str) -> None:
        if method == "PUT" and not is_silent.is_set():
            is_silent.set()
            is_over.wait(60)

    s3_proxy.intercept = never_answer_one
    with lease.beating(interval=0.1):
        wait_until(is_silent.is_set, "a beat without an answer", 30)
        wait_until(lambda: beats(parent) > 1, "a beat", 30)
        is_over.set()
