"""A run that another process has in work: follow it, wait for it, or give up."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

from danling_core import storage
from danling_core.errors import NotFound, StorageError
from danling_core.launch.plan import RunPlan
from danling_core.runs.folder import EVENTS, RunFolder, read_log
from danling_core.runs.watching import OwnerWatch, Presence
from danling_core.session.open_run import newest_folder
from danling_core.writers.follow import follow
from flows.outcome import RunOutcome
from flows.pool import LauncherPool

logger = logging.getLogger("danling.flows")

IfBusy = Literal["follow", "wait", "fail"]
"""What to do about a run that another process has in work: show its epochs and end as it does (and take it over if it
dies), wait for its end and go on then, or fail."""

_LOOK_SECONDS = 1.0
_REMOTE_LOOK_SECONDS = 5.0
_OPENINGS = ("epoch_began", "evaluate_began")
_CLOSINGS = ("epoch_finished", "evaluate_finished")


class OtherOwner:
    """The process that has a run in work, seen from another one.

    Args:
        plan: of the run.
        why_stopped: returns why nobody wants the run any more; None while somebody does.
    """

    def __init__(self, plan: RunPlan, why_stopped: Callable[[], str | None]) -> None:
        self.presence: Presence = "at work"
        self._plan = plan
        self._why_stopped = why_stopped
        self._folder = newest_folder(plan.config, plan.identity)
        self._watch = None if self._folder is None else OwnerWatch(self._folder.lease_parent_url)
        self._is_local = self._folder is None or storage.is_local(self._folder.url)
        self._look_at = 0.0

    def is_over(self) -> bool:
        """Return whether there is nothing left to wait for: see `presence`."""
        if self._why_stopped() is not None:
            return True
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + (_LOOK_SECONDS if self._is_local else _REMOTE_LOOK_SECONDS)
            with contextlib.suppress(StorageError):  # the store is away: the next look says more
                self.presence = "released" if self._watch is None else self._watch.look()
        return self.presence != "at work"

    def wait(self) -> None:
        """Return when `is_over`."""
        while not self.is_over():
            time.sleep(0.1)

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield the run's events as they come, from the stage on that is under way, until `is_over`."""
        if self._folder is None:
            return self.wait()
        offset = _begin_of_stage(_log(self._folder))
        if self._is_local:
            path = storage.local_path(storage.join(self._folder.url, EVENTS))
            yield from follow(path, from_offset=offset, poll_seconds=0.1, stop=self.is_over)
            return None
        while True:
            is_last = self.is_over()
            data = _log(self._folder)
            end = data.rfind(b"\n") + 1
            yield from _parsed(data[offset:end])
            offset = max(offset, end)
            if is_last:
                return None
            time.sleep(0.1 if self._why_stopped() else _REMOTE_LOOK_SECONDS)

    def outcome(self) -> RunOutcome | None:
        """Return how the run has ended; None where its owner is gone, and the run is to be taken over."""
        names, folder = self._plan.names, self._folder
        if (reason := self._why_stopped()) is not None:
            error = f"{reason}: it is not followed any more, and goes on where it is in work"
            return RunOutcome(
                **names, status="interrupted", error=error, folder=None if folder is None else folder.url
            )
        if folder is None or self.presence == "gone":
            return None
        status = folder.find_status()
        if status is None or status.status == "running":
            return None
        return RunOutcome.from_status(status, folder, **names, skipped=status.is_complete)


def other_owner(plan: RunPlan, pool: LauncherPool) -> OtherOwner:
    """Return the process that has the run in work, to be left when the pool is stopped."""
    return OtherOwner(plan, pool.why_stopped)


def _log(folder: RunFolder) -> bytes:
    try:
        return read_log(folder, EVENTS)
    except NotFound:
        return b""


def _begin_of_stage(data: bytes) -> int:
    """Return the offset of the event that opened the stage under way; the end of the log where none is."""
    offset, begin = 0, None
    for line in data.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        for event in _parsed(line):
            begin = offset if event["event"] in _OPENINGS else None if event["event"] in _CLOSINGS else begin
        offset += len(line)
    return offset if begin is None else begin


def _parsed(lines: bytes) -> Iterator[dict[str, Any]]:
    for line in lines.splitlines():
        with contextlib.suppress(StorageError):
            event = storage.parse_json_object(line, EVENTS)
            if isinstance(event.get("event"), str):
                yield event
