"""One mirror per working folder: a new one ends the one that still delivers, and goes on with its work."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Iterator
from typing import IO

from danling_core.process_tree import END, start_time

_FILE = ".mirror.lock"
_PATIENCE_SECONDS = 5.0
_POLL_SECONDS = 0.05


@contextlib.contextmanager
def alone(local: str) -> Iterator[None]:
    """Hold the folder's lock inside the block; end whichever mirror held it.

    A rank 0 that was killed leaves a mirror that delivers what is there. Its successor has the same and more
    to deliver, and two of them would overwrite each other's newer writes with older ones.

    Args:
        local: the working folder, of which the caller is the rightful mirror.
    """
    with open(os.path.join(local, _FILE), "a+", encoding="utf-8") as file:
        _take_over(file)
        yield


def _take_over(file: IO[str]) -> None:
    asked_at: float | None = None
    while not _is_locked(file):
        holder = _holder(file)
        if holder is not None and asked_at is None:
            asked_at = time.monotonic()
            _end(holder, END)
        elif holder is not None and asked_at is not None and time.monotonic() - asked_at > _PATIENCE_SECONDS:
            _end(holder, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)
    file.seek(0)
    file.truncate()
    file.write(f"{os.getpid()} {start_time(os.getpid())}")
    file.flush()


def _is_locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(file: IO[str]) -> int | None:
    """Return the process that holds the lock; None if it has not signed yet, or cannot be seen from here."""
    file.seek(0)
    pid, _, started = file.read().partition(" ")
    is_there = pid.isdigit() and str(start_time(int(pid))) == started
    return int(pid) if is_there and int(pid) != os.getpid() else None


def _end(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
        os.kill(pid, number)
