"""Call flows in threads that keep their parent's context, so that the orchestrator shows them under it."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from prefect.context import TagsContext
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

from flows.pool import LauncherPool


def call_all(calls: Sequence[Callable[[], None]], limit: int, pool: LauncherPool) -> None:
    """Make the calls, `limit` at a time, each in a copy of this context; returns when all have ended.

    An error of a call is raised when all have ended (the first, in the order of the calls). An error or a
    signal in this thread interrupts the pool's runs, waits for them, and goes on.
    """
    with ThreadPoolExecutor(max_workers=max(1, limit), thread_name_prefix="danling-fan-out") as executor:
        futures: list[Future[None]] = [
            executor.submit(contextvars.copy_context().run, call) for call in calls
        ]
        try:
            wait(futures)
        except BaseException as error:
            pool.interrupt(f"{type(error).__name__} in the flow around it")
            raise
    for future in futures:
        future.result()


@contextlib.contextmanager
def nested(tags: Sequence[str]) -> Iterator[None]:
    """Let flows called inside carry these tags, and send no heartbeat: the flow around them does."""
    with (
        temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}),
        TagsContext(current_tags=set(tags)),
    ):
        yield
