"""`danling approve`: answer a group that waits for an approval."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from danling_core.errors import NotFound, RunFailed
from flows.cli_deploy import configured_api
from flows.cli_text import say
from flows.exit_codes import DONE


def approve(text: str, is_declined: bool, note: str) -> int:
    """Answer the flow run of this id or name that waits; list those that wait where none is named."""
    from prefect.client.orchestration import get_client

    configured_api()
    with get_client(sync_client=True) as client:
        waiting = _waiting(client)
        if not text:
            for each in waiting:
                say(f"{each.name:24} {each.id}  since {each.state.timestamp:%Y-%m-%d %H:%M}")
            if not waiting:
                say("no group waits for an approval")
            return DONE
        found = [each for each in waiting if text in (each.name, str(each.id))]
        if len(found) != 1:
            names = ", ".join(f"{each.name} ({each.id})" for each in (found or waiting)) or "none waits"
            problem = "several groups of that name wait, give an id" if found else "it does not wait"
            raise NotFound(f"{text!r}: {problem}: {names}")
        _answer(client, found[0].id, {"approve": not is_declined, "note": note})
    say(f"{found[0].name}: {'declined' if is_declined else 'approved'}")
    return DONE


def _waiting(client: Any) -> list[Any]:
    from prefect.client.schemas.filters import FlowFilter, FlowRunFilter

    return list(
        client.read_flow_runs(
            flow_filter=FlowFilter.model_validate({"name": {"any_": ["group"]}}),
            flow_run_filter=FlowRunFilter.model_validate({"state": {"type": {"any_": ["PAUSED"]}}}),
            limit=200,
        )
    )


def _answer(client: Any, flow_run_id: UUID, answer: dict[str, Any]) -> None:
    from prefect.client.schemas.responses import SetStateStatus

    result = client.resume_flow_run(flow_run_id, run_input=answer)
    if result.status != SetStateStatus.ACCEPT:
        reason = getattr(result.details, "reason", None) or "no reason given"
        raise RunFailed(f"Prefect does not take the answer: {reason}", None, None)
