"""Waiting for what another process or thread does, and finding the processes of a driver."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from danling_core.process_tree import children_of

KINDS = ("driver", "launcher", "fork server", "rank", "loader worker")


def listening(pid: int) -> set[str]:
    """Where a process accepts TCP connections, as the kernel writes it: `0100007F:1F90` is 127.0.0.1, port 8080."""
    sockets = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            sockets.add(os.readlink(descriptor))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in sockets:
                found.add(words[1])
    return found


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    """Returns as soon as the condition holds; fails, naming `what` was waited for, where it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)


def tree(pid: int, depth: int = 0) -> Iterator[tuple[str, int]]:
    """The processes of a driver, by what they are."""
    yield KINDS[min(depth, len(KINDS) - 1)], pid
    for child in children_of(pid):
        yield from tree(child, depth + 1)
