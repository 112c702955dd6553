"""An approval that a group waits for: Prefect's pause for input, answered in its UI or by `danling approve`."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import threading
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from prefect.runtime import flow_run as runtime
from prefect.states import Running
from pydantic import Field

from danling_core.config.sweep import Approval
from danling_core.results.formatting import format_duration
from flows.pool import LauncherPool

logger = logging.getLogger("danling.flows")

_POLL_SECONDS = 2


class Answer(RunInput):
    """Form in Prefect's UI."""

    approve: bool = Field(True, description="go on; otherwise what is left is not begun")
    note: str = Field("", description="why, for who reads the log")


def why_not_approved(approval: Approval, next_up: str, pool: LauncherPool) -> str | None:
    """Wait until somebody answers; return why what is left is not to begin, None where it is approved.

    Where the API is away nobody can answer: what is left does not begin, and the next start of the group asks again.

    Args:
        next_up: what waits, in words.
        pool: ends the wait when it is stopped.
    """
    flow_run_id = runtime.get_id()
    logger.warning(
        "%s waits for an approval, %s at most: resume the flow run %s in Prefect, or: danling approve %s",
        *(next_up, format_duration(approval.timeout_seconds), runtime.get_name(), flow_run_id),
    )
    said: list[Answer | Exception] = []

    def ask() -> None:
        try:
            text = approval.message or f"{next_up} waits for an approval."
            form = Answer.with_initial_data(description=text)
            said.append(pause_flow_run(form, timeout=approval.timeout_seconds, poll_interval=_POLL_SECONDS))
        except Exception as error:
            said.append(error)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(ask,), daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
        if (reason := pool.why_stopped()) is not None:
            return reason
    [answer] = said
    if isinstance(answer, FlowPauseTimeout):
        return _after_timeout(approval, flow_run_id)
    if isinstance(answer, Exception):
        return f"an approval could not be asked for: {type(answer).__name__}: {answer}"
    logger.info("%s is %s: %s", next_up, "approved" if answer.approve else "declined", answer.note)
    return None if answer.approve else f"declined: {answer.note or 'no reason given'}"


def _after_timeout(approval: Approval, flow_run_id: Any) -> str | None:
    waited = format_duration(approval.timeout_seconds)
    with contextlib.suppress(Exception), get_client(sync_client=True) as client:
        client.set_flow_run_state(UUID(str(flow_run_id)), Running(), force=True)
    if approval.on_timeout == "begin":
        logger.warning("nobody has answered within %s: going on, as on_timeout says", waited)
        return None
    return f"not approved within {waited}"
