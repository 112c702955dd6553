"""Report to the orchestrator from one thread: bounded, newest wins, never raises, drains with a deadline."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

logger = logging.getLogger("danling.reporter")

Report = Callable[[], Any]


class Reporter:
    """Thread that sends reports, so that training never waits for the API.

    A report replaces a waiting one of its key. When too many keys wait, the oldest is dropped. A report that
    fails is logged (the first of a series as a warning) and forgotten: the run folder is the record.

    Args:
        max_waiting: how many keys may wait.
        min_interval_seconds: at least this long between two reports of one key.
        clock: time in seconds; replaced in tests.
    """

    def __init__(
        self,
        max_waiting: int = 256,
        min_interval_seconds: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_waiting = max_waiting
        self._min_interval_seconds = min_interval_seconds
        self._clock = clock
        self._waiting: dict[str, Report] = {}
        self._due: dict[str, float] = {}
        self._changed = threading.Condition()
        self._is_busy = False
        self._is_hurried = False
        self._is_closed = False
        self._is_failing = False
        self.dropped = 0
        self.failed = 0
        # A copy of the caller's context carries the settings (the API's address) into the thread.
        context = contextvars.copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(self._work,), name="danling-reporter", daemon=True
        )
        self._thread.start()

    def submit(self, key: str, report: Report) -> None:
        """Have `report` made soon, in place of one waiting under its key. Returns at once, never raises."""
        with self._changed:
            if self._is_closed:
                return
            if key not in self._waiting and len(self._waiting) >= self._max_waiting:
                self._waiting.pop(next(iter(self._waiting)))
                self.dropped += 1
            self._waiting[key] = report
            self._changed.notify_all()

    def drain(self, deadline_seconds: float = 10.0) -> bool:
        """Wait until all that was submitted is reported, without intervals; False at the deadline."""
        end = self._clock() + deadline_seconds
        with self._changed:
            self._is_hurried = True
            self._changed.notify_all()
            while (self._waiting or self._is_busy) and (left := end - self._clock()) > 0:
                self._changed.wait(min(left, 0.1))
            self._is_hurried = False
            return not (self._waiting or self._is_busy)

    def close(self, deadline_seconds: float = 10.0) -> bool:
        """Drain, then end the thread; what is not reported by the deadline is lost. Returns as `drain`."""
        is_drained = self.drain(deadline_seconds)
        with self._changed:
            self._is_closed = True
            self._waiting.clear()
            self._changed.notify_all()
        if is_drained:
            self._thread.join(deadline_seconds)
        return is_drained

    def _work(self) -> None:
        while (job := self._next_job()) is not None:
            self._make(*job)
            with self._changed:
                self._is_busy = False
                self._changed.notify_all()

    def _next_job(self) -> tuple[str, Report] | None:
        with self._changed:
            while True:
                if self._is_closed:
                    return None
                now = self._clock()
                waits = {
                    key: 0.0 if self._is_hurried else self._due.get(key, now) - now for key in self._waiting
                }
                key = next((key for key, wait in waits.items() if wait <= 0), None)
                if key is not None:
                    self._due[key] = now + self._min_interval_seconds
                    self._is_busy = True
                    return key, self._waiting.pop(key)
                self._changed.wait(min(waits.values(), default=None))

    def _make(self, key: str, report: Report) -> None:
        try:
            report()
        except Exception as error:
            self.failed += 1
            level = logging.DEBUG if self._is_failing else logging.WARNING
            logger.log(
                level, "could not report %s (training goes on): %s: %s", key, type(error).__name__, error
            )
            self._is_failing = True
        else:
            self._is_failing = False


@contextlib.contextmanager
def reporting(deadline_seconds: float = 10.0, **options: Any) -> Iterator[Reporter]:
    """Yield the reporter of the flow around this one, or a new one that is closed at the end."""
    if (ambient := _ambient.get()) is not None:
        yield ambient
        return
    reporter = Reporter(**options)
    token = _ambient.set(reporter)
    try:
        yield reporter
    finally:
        _ambient.reset(token)
        reporter.close(deadline_seconds)


_ambient: contextvars.ContextVar[Reporter | None] = contextvars.ContextVar("danling_reporter", default=None)
