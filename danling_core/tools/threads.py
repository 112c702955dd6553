"""The same work for many items at once, in threads."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_threads(limit: int, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Call `work` with each item in threads, and return the results in order. The caller's storage settings hold.

    The first failure, or a Ctrl-C, is raised once the calls under way have ended; no others begin.

    Args:
        limit: so many calls at once.
        work: called from threads.
        items: one call for each.
    """
    with ThreadPoolExecutor(limit, thread_name_prefix="danling-map") as pool:
        calls = [pool.submit(contextvars.copy_context().run, work, item) for item in items]
        try:
            return [call.result() for call in calls]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
