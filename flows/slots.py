"""Slots that runs of several processes share, such as the GPUs of a lab: global concurrency limits of Prefect."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from danling_core.errors import RunInterrupted
from flows.pool import LauncherPool

logger = logging.getLogger("danling.flows")

LEASE_STORAGE = {
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem"
}
"""Has a server remember over a restart who holds slots."""
_LEASE_SECONDS = 60.0  # a holder that dies without a word is freed after so long
_TRY_SECONDS = 2.0


@contextlib.contextmanager
def taken(slots: Mapping[str, int], pool: LauncherPool) -> Iterator[None]:
    """Hold so many slots of each limit inside the block, waiting for them as long as the pool is not stopped.

    A limit that Prefect does not have yet is made, as large as what is wanted of it. Where its API is away the run goes
    on without slots: training does not depend on it.

    Raises:
        RunInterrupted: the pool was stopped while we waited.
    """
    with contextlib.ExitStack() as stack:
        try:
            for name, count in sorted(slots.items()):
                _make_if_missing(name, count)
                _take(name, count, pool, stack)
        except RunInterrupted:
            raise
        except Exception as error:
            logger.warning(
                "no slots are held (the run goes on): %s: %s",
                type(error).__name__,
                str(error).splitlines()[0],
            )
        yield


def _take(name: str, count: int, pool: LauncherPool, stack: contextlib.ExitStack) -> None:
    from prefect.concurrency.sync import concurrency

    options: dict[str, Any] = {"strict": True, "raise_on_lease_renewal_failure": False}
    is_told = False
    while True:
        try:
            stack.enter_context(
                concurrency(
                    name, count, timeout_seconds=_TRY_SECONDS, lease_duration=_LEASE_SECONDS, **options
                )
            )
        except TimeoutError:
            if (reason := pool.why_stopped()) is not None:
                raise RunInterrupted(f"not started: {reason}") from None
            if not is_told:
                logger.warning("waiting for %d slot(s) of %r", count, name)
                is_told = True
        else:
            return


def _make_if_missing(name: str, count: int) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
    from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(name)
        except ObjectNotFound:
            with contextlib.suppress(ObjectAlreadyExists):  # by another run, just now
                client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=count))
                logger.warning(
                    "made the concurrency limit %r of %d; another size: prefect gcl update %s --limit N",
                    *(name, count, name),
                )
