"""Protocol of a writer: it receives every event of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

Event = dict[str, Any]
"""One event of a run: "event" (its kind), "time" (Unix seconds), "attempt", and the fields of its kind."""

TERMINAL = frozenset({"completed", "failed", "interrupted"})
"""The kinds of which every attempt ends with exactly one."""


def told_end(event: Event) -> str | None:
    """Return the status of a run after this event: complete, interrupted, failed; None where the event ends nothing.

    An attempt that did what it was asked for says "completed", also where the run has something to do still.
    """
    kind = event.get("event")
    if kind == "completed":
        return str((event.get("status") or {}).get("status", "complete"))
    return kind if kind in TERMINAL else None


@runtime_checkable
class Writer(Protocol):
    """Receiver of every event, in order, from the main rank or a reader of its event log."""

    def on_event(self, event: Event) -> None:
        """Take one event; kinds that mean nothing to this writer are ignored. Must not keep or change it."""

    def flush(self) -> None:
        """Make what was written visible to readers."""

    def close(self) -> None:
        """Flush, and release everything. A second call does nothing."""


class Writers:
    """Several writers as one, and the place where an event gets its time and attempt.

    Args:
        writers: called in this order; an error of one is raised to the caller of `emit`.
        attempt: "generation.restart" of the process that emits.
        clock: Unix time in seconds, for tests.
    """

    def __init__(
        self, writers: Iterable[Writer], attempt: str, clock: Callable[[], float] = time.time
    ) -> None:
        self.writers = list(writers)
        self.attempt = attempt
        self._clock = clock

    def emit(self, kind: str, **fields: Any) -> Event:
        """Make the event `kind` and tell every writer; returns it. Main rank only."""
        event: Event = {"event": kind, "time": self._clock(), "attempt": self.attempt, **fields}
        self.on_event(event)
        return event

    def on_event(self, event: Event) -> None:
        """Pass on an event made elsewhere."""
        for writer in self.writers:
            writer.on_event(event)

    def flush(self) -> None:
        """Flush all, in order."""
        for writer in self.writers:
            writer.flush()

    def close(self) -> None:
        """Close all, last one first, even where one fails; what failed is raised after."""
        errors: list[Exception] = []
        while self.writers:
            try:
                self.writers.pop().close()
            except Exception as error:
                errors.append(error)
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise ExceptionGroup("several writers could not be closed", errors)
