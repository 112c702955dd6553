"""Heed a cancellation that no worker passes on: each process reads the states of its own flow runs."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import threading
from collections.abc import Callable, Iterator
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import StateType
from prefect.runtime import flow_run as runtime
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

logger = logging.getLogger("danling.flows")

POLL_SECONDS = 10.0


class _Watch:
    """One thread, while there is somebody to call, which asks the API which flow runs are to be cancelled."""

    def __init__(self) -> None:
        self._calls: dict[object, tuple[UUID, Callable[[str], None]]] = {}
        self._changed = threading.Condition()
        self._is_working = False

    def add(self, flow_run_id: UUID, call: Callable[[str], None]) -> object:
        """Have `call` called once when the flow run is to be cancelled; the key by which to remove it."""
        key = object()
        with self._changed:
            self._calls[key] = (flow_run_id, call)
            if not self._is_working:
                self._is_working = True
                # A copy of the caller's context carries the settings (the API's address) into the thread.
                context = contextvars.copy_context()
                threading.Thread(
                    target=context.run, args=(self._work,), name="danling-cancellation", daemon=True
                ).start()
        return key

    def remove(self, key: object) -> None:
        """Call no more for this key."""
        with self._changed:
            self._calls.pop(key, None)
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: not self._calls, POLL_SECONDS)
                if not self._calls:
                    self._is_working = False
                    return
                waiting = dict(self._calls)
            cancelled = _cancelled({flow_run_id for flow_run_id, _ in waiting.values()})
            for key, (flow_run_id, call) in waiting.items():
                if flow_run_id in cancelled:
                    self.remove(key)
                    call("cancelled in Prefect")


_watch = _Watch()


@contextlib.contextmanager
def heeding_cancel(on_cancel: Callable[[str], None]) -> Iterator[None]:
    """Inside, `on_cancel` is called with a reason, from another thread, once this flow run is to be cancelled.

    For flow runs of `danling`, which have no worker, and after an absence of the API, in which a worker's own
    watch is lost. Without a flow run nothing is watched.
    """
    flow_run_id = runtime.get_id()
    if flow_run_id is None:
        yield
        return
    key = _watch.add(UUID(flow_run_id), on_cancel)
    try:
        yield
    finally:
        _watch.remove(key)


def _cancelled(flow_run_ids: set[UUID]) -> set[UUID]:
    """Return the flow runs that the API wants cancelled; none while it does not answer."""
    wanted = {
        "id": {"any_": list(flow_run_ids)},
        "state": {"type": {"any_": [StateType.CANCELLING, StateType.CANCELLED]}},
    }
    try:
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), get_client(sync_client=True) as client:
            found = client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(wanted))
    except Exception as error:
        logger.debug("the states of the flow runs are not known: %s: %s", type(error).__name__, error)
        return set()
    return {flow_run.id for flow_run in found}
