"""How far a run may be ahead of its store: the lag, the scratch, the warning, the stop."""

from __future__ import annotations

import contextlib
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from danling_core.config import Config
from danling_core.errors import Fenced, StoreUnavailable
from danling_core.session.delivery import Delivery


class Mirror:
    """What `Delivery` asks of a `MirrorProcess`."""

    def __init__(self) -> None:
        self.told: dict[str, Any] = {}
        self.ended: Fenced | StoreUnavailable | None = None
        self.turns_to_go = 0

    def close(self, timeout_seconds: float | None = None) -> None:
        self.turns_to_go -= 1
        if self.turns_to_go > 0:
            raise StoreUnavailable(f"not everything is up after {timeout_seconds} s")
        if self.turns_to_go == 0:
            self.ended = StoreUnavailable("the mirror ended with code 4")
        if self.ended is not None:
            raise self.ended

    def failure(self) -> Fenced | StoreUnavailable | None:
        return self.ended

    def state(self) -> dict[str, Any]:
        return self.told

    def note(self, synced_at: float, error: str | None = None, record: str | None = None) -> None:
        at = datetime.fromtimestamp(synced_at, UTC).isoformat()
        committed = {"record": record, "at": at} if record else None
        self.told = {"synced_at": at, "error": error, "committed": committed}


@pytest.fixture
def mirror() -> Mirror:
    return Mirror()


def delivery(mirror: Mirror, folder: Path, now: list[float], reasons: list[str], **limits: Any) -> Delivery:
    config = Config.from_dict({"epoch_end": 1, **limits})
    return Delivery(lambda: mirror, str(folder), config, reasons.append, lambda: now[0])  # type: ignore[arg-type,return-value]


def test_without_limits_a_run_is_never_stopped(mirror: Mirror, tmp_path: Path) -> None:
    now, reasons = [1000.0], list[str]()
    watched = delivery(mirror, tmp_path, now, reasons)
    now[0] += 1e6
    watched.check()
    assert watched.unsynced_seconds() == 1e6 and reasons == []


def test_a_run_stops_when_the_store_has_had_nothing_for_too_long(mirror: Mirror, tmp_path: Path) -> None:
    now, reasons = [1000.0], list[str]()
    watched = delivery(mirror, tmp_path, now, reasons, max_unsynced_seconds=60)
    now[0] = 1060.0
    watched.check()
    mirror.note(synced_at=1050.0)
    now[0] = 1110.0
    watched.check()
    assert reasons == []
    now[0] = 1111.0
    watched.check()
    assert reasons == ["the store has had nothing for 61 s, and max_unsynced_seconds is 60"]


def test_a_checkpoint_that_went_up_in_a_long_pass_counts(mirror: Mirror, tmp_path: Path) -> None:
    watched = delivery(mirror, tmp_path, [1100.0], [], max_unsynced_seconds=60)
    watched._known_at = 1000.0
    at = datetime.fromtimestamp(1090.0, UTC).isoformat()
    mirror.told = {"synced_at": None, "error": None, "committed": {"record": "0000000012-1.0", "at": at}}
    assert watched.unsynced_seconds() == 10.0


def test_what_an_earlier_attempt_delivered_does_not_count_against_this_one(
    mirror: Mirror, tmp_path: Path
) -> None:
    mirror.note(synced_at=10.0)
    assert delivery(mirror, tmp_path, [1000.0], []).unsynced_seconds() == 0.0


def test_what_was_delivered_stays_so_when_the_next_mirror_knows_nothing_yet(
    mirror: Mirror, tmp_path: Path
) -> None:
    now, reasons = [1000.0], list[str]()
    watched = delivery(mirror, tmp_path, now, reasons, max_unsynced_seconds=60)
    now[0] = 1100.0
    mirror.note(synced_at=1095.0)
    watched.check()
    mirror.told = {"synced_at": None, "error": None, "committed": None}
    watched.check()
    assert watched.unsynced_seconds() == 5.0 and reasons == []


def test_a_fenced_mirror_ends_the_run_and_a_dead_one_is_replaced(tmp_path: Path) -> None:
    mirrors: list[Mirror] = []

    def start() -> Mirror:
        mirrors.append(Mirror())
        return mirrors[-1]

    watched = Delivery(start, str(tmp_path), Config(epoch_end=1), [].append)  # type: ignore[arg-type]
    mirrors[0].ended = StoreUnavailable("the mirror ended with code -9")
    watched.check()
    assert len(mirrors) == 2
    mirrors[1].ended = Fenced("taken over by another")
    with pytest.raises(Fenced, match="taken over"):
        watched.check()


def test_two_threads_that_find_the_mirror_dead_start_one(tmp_path: Path) -> None:
    mirrors, both = list[Mirror](), threading.Barrier(2)

    def start() -> Mirror:
        if mirrors:
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(0.2)  # the other one comes here, too, unless it is kept waiting
        mirrors.append(Mirror())
        return mirrors[-1]

    watched = Delivery(start, str(tmp_path), Config(epoch_end=1), [].append)  # type: ignore[arg-type]
    mirrors[0].ended = StoreUnavailable("the mirror ended with code -9")
    with ThreadPoolExecutor(2) as threads:
        for check in [threads.submit(watched.check) for _ in range(2)]:
            check.result()
    assert len(mirrors) == 2


def test_a_run_stops_when_its_scratch_is_full(mirror: Mirror, tmp_path: Path) -> None:
    reasons = list[str]()
    watched = delivery(mirror, tmp_path, [1000.0], reasons, max_scratch_bytes=100)
    (tmp_path / "events.jsonl").write_bytes(bytes(100))
    (tmp_path / ".mirror").mkdir()
    (tmp_path / ".mirror" / "payload").write_bytes(bytes(50))  # a hard link to what is counted already
    watched.check()
    assert reasons == []
    (tmp_path / "results.json").write_bytes(bytes(1))
    watched.check()
    assert reasons == [f"{tmp_path} holds 101 bytes, and max_scratch_bytes is 100"]


def test_an_absence_is_warned_of_once(
    mirror: Mirror, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now = [1000.0]
    watched = delivery(mirror, tmp_path, now, [])
    with caplog.at_level(logging.WARNING, logger="danling"):
        for second, error in ((1001, "away"), (1061, "away"), (1100, "away"), (1101, None), (1200, "again")):
            now[0] = second
            mirror.note(synced_at=1101.0 if second > 1100 else 1000.0, error=error, record="0000000012-1.0")
            watched.check()
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "nothing for 61 s (it has 0000000012-1.0)" in messages[0] and messages[0].endswith("away")
    assert messages[1].endswith("again")


def test_the_end_is_waited_for_in_turns_and_what_is_left_is_told_and_not_raised(
    mirror: Mirror, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watched = delivery(mirror, tmp_path, [1000.0], [])
    mirror.turns_to_go = 3
    with caplog.at_level(logging.ERROR, logger="danling"):
        assert [watched.is_over(2.0) for _ in range(4)] == [False, False, True, True]
    [message] = [record.getMessage() for record in caplog.records]
    assert "ended with code 4" in message and "next start of this run on this machine" in message
