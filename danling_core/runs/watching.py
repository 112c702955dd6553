"""A look at the owner of a run from outside: whether it is at work, has given the run up, or is gone."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

from danling_core.runs.lease import STALE_AFTER_SECONDS, current_owner
from danling_core.runs.lease_owner import Owner, beats_on_this_machine, is_dead

Presence = Literal["at work", "released", "gone"]


class OwnerWatch:
    """Watches the owner of a run. An owner on another machine is judged by whether its beat changes under our clock.

    Args:
        parent_url: what `Lease.acquire` was given.
        stale_after_seconds: without a change for so long, it is gone.
        now: Unix time.
        monotonic: seconds.
    """

    def __init__(
        self,
        parent_url: str,
        stale_after_seconds: float = STALE_AFTER_SECONDS,
        *,
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._parent_url = parent_url
        self._stale_after_seconds = stale_after_seconds
        self._now = now
        self._monotonic = monotonic
        self._seen: Owner | None = None
        self._seen_at = monotonic()

    def look(self) -> Presence:
        """Return what the owner is doing; costs one small listing and one read."""
        owner = current_owner(self._parent_url)
        if owner is None:
            return "released"
        if is_dead(owner):
            return "gone"
        if owner != self._seen or beats_on_this_machine(owner, self._now(), self._stale_after_seconds):
            self._seen, self._seen_at = owner, self._monotonic()
        return "gone" if self._monotonic() - self._seen_at > self._stale_after_seconds else "at work"
