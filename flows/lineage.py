"""The flow runs in which this process shows what it does: the one at work, and those around it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from prefect.runtime import flow_run as runtime

_flow_runs: ContextVar[tuple[str, ...]] = ContextVar("danling_flow_runs", default=())


@contextlib.contextmanager
def in_flow_run() -> Iterator[None]:
    """Count the flow run of this context among the others, inside the block and in copies of its context."""
    flow_run_id = runtime.get_id()
    around = _flow_runs.get()
    token = _flow_runs.set(around if flow_run_id is None or flow_run_id in around else (flow_run_id, *around))
    try:
        yield
    finally:
        _flow_runs.reset(token)


def flow_runs() -> tuple[str, ...]:
    """Return the ids of the flow run at work and of those around it in this process, the innermost first."""
    return _flow_runs.get()
