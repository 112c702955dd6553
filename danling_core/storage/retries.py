"""Repeats what a repetition can fix: exponential backoff with jitter, under a deadline."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from danling_core.errors import DanLingError, StoreUnavailable
from danling_core.storage.failures import translate

T = TypeVar("T")
_CHANCE = random.Random().random  # not the global generator, which belongs to the run's bits


@dataclass(frozen=True)
class Retry:
    """Retry policy for a failing store. Tests pass clock, sleep and chance in.

    Args:
        deadline_seconds: no new attempt begins later than this after the first; 0 means one attempt.
        first_wait_seconds: the mean of the first wait; each later one is twice as long.
        max_wait_seconds: no mean wait is longer than this.
    """

    deadline_seconds: float = 120.0
    first_wait_seconds: float = 0.25
    max_wait_seconds: float = 15.0
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    chance: Callable[[], float] = _CHANCE

    def wait_seconds(self, attempt: int) -> float:
        """Return the wait after attempt number `attempt` (from 0): between half and one and a half of the mean."""
        mean = min(self.max_wait_seconds, self.first_wait_seconds * 2.0 ** min(attempt, 30))
        return mean * (0.5 + self.chance())

    def call(self, operation: str, url: str, function: Callable[[], T], identity: str = "") -> T:
        """Call `function()`, and repeat it while it fails in a way that may pass.

        Raises:
            StoreUnavailable: it still failed at the deadline.
            StorageError: it failed in a way that no repetition fixes (at once).
        """
        started = self.clock()
        attempt = 0
        while True:
            try:
                return function()
            except DanLingError:
                raise
            except Exception as error:
                failure = translate(error, operation, url, identity)
                if not isinstance(failure, StoreUnavailable):
                    raise failure from error
                wait = self.wait_seconds(attempt)
                attempt += 1
                elapsed = self.clock() - started
                if elapsed + wait > self.deadline_seconds:
                    tried = f"{attempt} attempts in {elapsed:.0f} s" if attempt > 1 else "one attempt"
                    raise StoreUnavailable(f"{failure} (gave up after {tried})") from error
            self.sleep(wait)
