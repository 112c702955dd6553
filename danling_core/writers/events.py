"""The event log: a local file of JSON lines, each appended whole."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

from danling_core.errors import StorageError
from danling_core.storage.json_safe import dumps
from danling_core.writers.follow import end_of_lines
from danling_core.writers.protocol import Event


class EventLog:
    """Appends events to `path`, one `os.write` each, so that a reader sees whole lines or a torn last one.

    One process writes at a time: rank 0, or the launcher after the ranks are gone. A last line torn by a
    crash is cut off on opening.

    Args:
        path: a local file; it and its folder are made as needed.
        attempt: "generation.restart" of the events made here.
        clock: Unix time in seconds, for tests.
    """

    def __init__(
        self, path: str | os.PathLike[str], attempt: str, clock: Callable[[], float] = time.time
    ) -> None:
        self.path = os.fspath(path)
        self.attempt = attempt
        self._clock = clock
        self._is_ahead, self._flushing = True, threading.Lock()
        os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
        self._fd: int | None = os.open(
            self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666
        )
        end = end_of_lines(self.path)
        if end < os.fstat(self._fd).st_size:
            os.ftruncate(self._fd, end)

    def emit(self, kind: str, **fields: Any) -> Event:
        """Append the event `kind` with these fields; returns it as appended."""
        event: Event = {"event": kind, "time": self._clock(), "attempt": self.attempt, **fields}
        self.on_event(event)
        return event

    def on_event(self, event: Event) -> None:
        """Append one event as it is.

        Raises:
            StorageError: where the line could not be written whole (a full disk); the file is as before then.
        """
        if self._fd is None:
            raise StorageError(
                f"the event log {self.path} is closed: no event can follow, got {event.get('event')!r}"
            )
        line = dumps(event, separators=(",", ":")).encode() + b"\n"
        size = os.fstat(self._fd).st_size
        self._is_ahead = True
        try:
            written = os.write(self._fd, line)
        except OSError as error:
            raise StorageError(f"cannot append to the event log {self.path}: {error}") from error
        if written != len(line):
            os.ftruncate(self._fd, size)
            raise StorageError(
                f"cannot append to the event log {self.path}: {written} of {len(line)} bytes written"
            )

    def flush(self) -> None:
        """Bring what was appended to the disk; readers of the same machine see it without. Any thread."""
        with self._flushing:
            if self._fd is not None and self._is_ahead:
                self._is_ahead = False
                os.fsync(self._fd)

    def close(self) -> None:
        """Close the file. A second call does nothing."""
        with self._flushing:
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None
