"""Following a file of JSON lines."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from danling_core.errors import StorageError
from danling_core.writers import EventLog
from danling_core.writers.follow import end_of_lines, follow


class Script:
    """Plays the writer: one action at each pause of the reader, then stop."""

    def __init__(self, *actions: Callable[[], object]) -> None:
        self.actions = list(actions)

    def sleep(self, seconds: float) -> None:
        self.actions.pop(0)()

    def stop(self) -> bool:
        return not self.actions


def append(path: Path, text: str) -> Callable[[], object]:
    def act() -> None:
        with path.open("a") as file:
            file.write(text)

    return act


def numbers(path: Path, *actions: Callable[[], object], from_offset: int = 0) -> list[int]:
    script = Script(*actions)
    return [
        event["n"] for event in follow(path, from_offset=from_offset, stop=script.stop, sleep=script.sleep)
    ]


def test_events_come_in_order_from_a_file_that_does_not_exist_yet(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    found = numbers(
        path, lambda: None, append(path, '{"n": 1}\n{"n": 2}\n'), lambda: None, append(path, '{"n": 3}\n')
    )
    assert found == [1, 2, 3]


def test_a_half_written_line_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert numbers(path, append(path, '{"n": 1}\n{"n"'), append(path, ": 2"), append(path, '}\n{"n": ')) == [
        1,
        2,
    ]


def test_a_torn_tail_that_is_cut_and_replaced_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"

    def replace() -> None:
        with path.open("r+b") as file:
            file.truncate(9)
        append(path, '{"n": 7}\n')()
        os.utime(path, ns=(1, 1))

    assert numbers(path, append(path, '{"n": 1}\n{"n": 555'), replace) == [1, 7]


def test_what_is_written_before_stop_is_delivered(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    append(path, '{"n": 1}\n')()
    assert [event["n"] for event in follow(path, stop=lambda: True)] == [1]
    assert list(follow(tmp_path / "none", stop=lambda: True)) == []


def test_reading_can_begin_at_the_end_of_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert end_of_lines(path) == 0
    append(path, '{"n": 1}\n{"n": 2}\n{"n": 3')()
    assert end_of_lines(path) == end_of_lines(path, block_bytes=2) == 18
    assert numbers(path, append(path, "}\n"), from_offset=18) == [3]


@pytest.mark.parametrize("garbage", ["not json\n", "[1]\n", "\n", "\udcff\n"])
def test_a_line_that_is_no_event_is_an_error_with_its_place(tmp_path: Path, garbage: str) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"n": 1}\n' + garbage.encode(errors="surrogateescape"))
    with pytest.raises(StorageError, match="byte 9"):
        list(follow(path, stop=lambda: True))


def test_a_file_that_lost_lines_already_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with pytest.raises(StorageError, match="replaced or cut"):
        numbers(path, append(path, '{"n": 1}\n'), lambda: path.write_text(""), lambda: None)


def test_an_idle_poll_opens_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "events.jsonl"
    append(path, '{"n": 1}\n{"n": ')()
    opened: list[object] = []
    monkeypatch.setattr("builtins.open", lambda *args, _open=open: opened.append(args) or _open(*args))
    assert numbers(path, *[lambda: None] * 10) == [1]
    assert len(opened) == 1


def test_a_reader_gets_every_event_of_a_writer_at_work(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"

    def write() -> None:
        log = EventLog(path, "1.0")
        for n in range(2000):
            log.emit("progress", n=n, padding="x" * (n % 97))
        log.close()

    writer = threading.Thread(target=write)
    writer.start()
    found = [event["n"] for event in follow(path, poll_seconds=0.0001, stop=lambda: not writer.is_alive())]
    writer.join()
    assert found == list(range(2000))


def test_a_file_that_is_deleted_is_waited_for_without_spinning(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    pauses = [append(path, '{"n": 1}\n'), path.unlink, lambda: None, lambda: None]
    assert numbers(path, *pauses) == [1]
