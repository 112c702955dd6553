"""Rank 0's view of the way to the store: how far ahead the run is, and where that must end."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING

from danling_core import storage
from danling_core.errors import Fenced, StoreUnavailable

if TYPE_CHECKING:
    from danling_core.config import Config
    from danling_core.mirror.process import MirrorProcess

logger = logging.getLogger("danling")
_DEATHS_IN_A_ROW = 3


class Delivery:
    """Keeps a run within the limits that its config sets to running ahead of its store. Rank 0 only.

    Args:
        start: starts the mirror, which brings the working folder to the store; again, should it die.
        work_dir: the working folder.
        config: with `max_unsynced_seconds` and `max_scratch_bytes`.
        stop: called with the reason why the run must save and stop; a resume goes on from there.
        clock: Unix time.
    """

    def __init__(
        self,
        start: Callable[[], MirrorProcess],
        work_dir: str,
        config: Config,
        stop: Callable[[str], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._start = start
        self._mirror = start()
        self._work_dir = work_dir
        self._max_unsynced_seconds = config.max_unsynced_seconds
        self._max_scratch_bytes = config.max_scratch_bytes
        self._interval_seconds = config.upload_interval_seconds
        self._stop = stop
        self._clock = clock
        self._known_at = clock()
        self._warned_of: str | None = None
        self._told_unreadable: set[str] = set()
        self._is_asked = False
        self._has_ended = False
        self._deaths = 0
        self._replacing = threading.Lock()

    def soon(self) -> None:
        """Have small files that changed uploaded without waiting for the interval."""
        self._mirror.request_soon()

    def check(self) -> None:
        """Warn of a store that does not take what it is given, and stop the run at its limits. Any thread.

        Called at every commit and epoch's end. Costs one small file and one local listing.

        Raises:
            Fenced: another process owns the run; nothing of this one has gone up since.
        """
        self._check_mirror()
        lag = self.unsynced_seconds()
        self._warn(lag)
        if self._max_unsynced_seconds is not None and lag > self._max_unsynced_seconds:
            self._stop(
                f"the store has had nothing for {lag:.0f} s, and max_unsynced_seconds is "
                f"{self._max_unsynced_seconds:g}"
            )
        if self._max_scratch_bytes is not None and (used := self.scratch_bytes()) > self._max_scratch_bytes:
            self._stop(
                f"{self._work_dir} holds {used:,} bytes, and max_scratch_bytes is {self._max_scratch_bytes:,}"
            )

    def unsynced_seconds(self) -> float:
        """Return the time since the store had everything that was there, or was given a checkpoint."""
        state = self._mirror.state()
        known = (state.get("synced_at"), (state.get("committed") or {}).get("at"))
        times = [datetime.fromisoformat(each).timestamp() for each in known if each is not None]
        self._known_at = max([self._known_at, *times])  # a mirror that is replaced knows nothing at first
        return max(0.0, self._clock() - self._known_at)

    def scratch_bytes(self) -> int:
        """Return the bytes of the working folder on the local disk; payloads under way count once."""
        # the mirror reports what cannot be read
        files = storage.list_tree(self._work_dir, unreadable=lambda path, error: None)
        return sum(entry.size for entry in files if not entry.path.startswith("."))

    def request(self) -> None:
        """Ask for everything that exists now; `is_done` tells when. Raises `Fenced`."""
        self._check_mirror()
        self._mirror.request_sync()
        self._is_asked, self._deaths = True, 0

    def is_done(self, timeout_seconds: float) -> bool:
        """Return whether what was asked for is served, waiting for it up to `timeout_seconds`; a mirror that dies
        meanwhile is replaced.

        Raises:
            Fenced: another process owns the run.
            StoreUnavailable: one mirror after the other ended; everything is in the local folder still.
        """
        try:
            is_done = self._mirror.wait_synced(timeout_seconds=timeout_seconds)
        except StoreUnavailable:
            self._check_mirror()
            return False
        self._is_asked = not is_done
        return is_done

    def is_over(self, timeout_seconds: float) -> bool:
        """Return whether the mirror has ended, waiting for it up to `timeout_seconds`; the first call ends its input,
        after which it delivers what is left for as long as it may.

        What it could not deliver is logged and not raised: the end of the run is recorded by then, and nothing is lost.
        """
        if self._has_ended:
            return True
        try:
            self._mirror.close(timeout_seconds)
        except (Fenced, StoreUnavailable):
            if self._mirror.failure() is None:
                return False
            self._tell_what_is_left()
        self._has_ended = True
        return True

    def _tell_what_is_left(self) -> None:
        try:
            self._mirror.close()
        except Fenced as error:
            logger.error("the end of the run is not in the store: %s", error)
        except StoreUnavailable as error:
            logger.error(
                "the end of the run is not in the store: %s; the next start of this run on this machine delivers it, "
                "unless the store calls the run complete already: then only the last lines of its log are missing",
                error,
            )

    def _check_mirror(self) -> None:
        with self._replacing:  # the saver's thread and the loop may both find it dead
            failure = self._mirror.failure()
            if isinstance(failure, Fenced):
                raise failure
            if failure is None:
                return
            if self._is_asked:
                self._deaths += 1
                if self._deaths > _DEATHS_IN_A_ROW:
                    raise failure
            logger.warning("%s: another one is started", failure)
            self._mirror = self._start()
            if self._is_asked:
                self._mirror.request_sync()

    def _warn(self, lag: float) -> None:
        state = self._mirror.state()
        if unreadable := set(state.get("unreadable") or {}) - self._told_unreadable:
            self._told_unreadable |= unreadable
            logger.warning(
                "these cannot be read and stay out of the store: %s", ", ".join(sorted(unreadable))
            )
        error = state.get("error")
        if error is None or lag < 2 * self._interval_seconds:
            self._warned_of = None if error is None else self._warned_of
        elif self._warned_of is None:
            committed = (state.get("committed") or {}).get("record", "no checkpoint")
            logger.warning(
                "the store has had nothing for %.0f s (it has %s); training goes on, in %s: %s",
                lag,
                committed,
                os.path.abspath(self._work_dir),
                error,
            )
            self._warned_of = error
