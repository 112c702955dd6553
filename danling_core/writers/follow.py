"""Read a local file while another process appends to it: JSON lines as they come, or the last words."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from danling_core.errors import StorageError


def follow(
    path: str | os.PathLike[str],
    *,
    from_offset: int = 0,
    poll_seconds: float = 0.02,
    stop: Callable[[], bool],
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[dict[str, Any]]:
    """Yield each event appended to `path`, in order, until `stop()` and the end of what was written.

    Only whole lines are yielded: a line that is still being written waits, and one torn by a crash is left
    out. The file need not exist yet. An idle poll costs one `os.stat`.

    Args:
        path: a local file of one JSON object per line.
        from_offset: bytes to skip: 0, or what `end_of_lines` returned.
        poll_seconds: pause between two looks at the file.
        stop: asked before each look; true ends the iteration once the file is drained.
        sleep: the pause itself, for tests.

    Raises:
        StorageError: for a line that is not a JSON object, or a file that lost lines already read.
    """
    offset, seen = from_offset, None
    while True:
        is_last = stop()
        state = _state(path)
        if state is not None and state != seen:
            if state[0] < offset:
                raise StorageError(
                    f"{os.fspath(path)} has {state[0]} bytes, but {offset} were read: it was replaced or cut"
                )
            for line in _whole_lines(path, offset):
                event = _parse(line, path, offset)
                offset += len(line)
                yield event
            seen = state
        if is_last:
            return
        sleep(poll_seconds)  # a file that is gone may come back


def end_of_lines(path: str | os.PathLike[str], block_bytes: int = 65536) -> int:
    """Return the offset just after the last whole line of `path`; 0 where there is no file, or no whole line."""
    try:
        with open(path, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            while end > 0:
                begin = max(0, end - block_bytes)
                file.seek(begin)
                found = file.read(end - begin).rfind(b"\n")
                if found >= 0:
                    return begin + found + 1
                end = begin
    except FileNotFoundError:
        return 0
    return 0


def last_lines(path: str, from_offset: int = 0, count: int = 12) -> str:
    """Return the last lines of a text file, of what follows the offset; empty if there is no file."""
    try:
        text = Path(path).read_bytes()[from_offset:].decode(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.rstrip().splitlines()[-count:])


def _state(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """Size and modification time: both, since a torn tail may be cut and replaced by a line of its length."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns


def _whole_lines(path: str | os.PathLike[str], offset: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            yield line


def _parse(line: bytes, path: str | os.PathLike[str], offset: int) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise StorageError(
            f"{os.fspath(path)}, byte {offset}: expected one JSON object per line, found {line[:80]!r}"
        ) from error
    if not isinstance(event, dict):
        raise StorageError(f"{os.fspath(path)}, byte {offset}: expected a JSON object, found {line[:80]!r}")
    return event
