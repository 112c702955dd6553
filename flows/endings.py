"""The Prefect states in which runs, experiments and groups end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefect.client.schemas.objects import State, StateType
from prefect.states import Completed, Failed

from danling_core.errors import RunFailed
from flows.leaderboard import cell
from flows.outcome import RunOutcome, describe, summarise


def conclude_run(outcome: RunOutcome) -> State[Any]:
    """Completed with the outcome as data, Failed with the first failure, or Interrupted (a Cancelled)."""
    if outcome.status == "complete":
        return Completed(message=describe(outcome), data=outcome.dict())
    if outcome.status == "interrupted":
        return _interrupted(describe(outcome))
    return Failed(
        message=describe(outcome), data=RunFailed(describe(outcome), outcome.traceback, outcome.rank)
    )


def conclude_all(rows: list[dict[str, Any]], outcomes: Sequence[RunOutcome]) -> State[Any]:
    """Completed with the leaderboard when every run is complete; else a summary that names the others."""
    bad = [outcome for outcome in outcomes if outcome.status in ("failed", "refused")]
    if bad:
        summary = summarise(bad, len(outcomes))
        return Failed(message=summary, data=RunFailed(summary, bad[0].traceback, bad[0].rank))
    stopped = [outcome for outcome in outcomes if outcome.status == "interrupted"]
    if stopped:
        return _interrupted(
            f"{len(stopped)} of {len(outcomes)} runs interrupted; run it again to resume them"
        )
    first = [f"{row['name']} ({cell(row['score'])})" for row in rows[:3] if row["rank"]]
    best = f", best {first[0]}" if first else ""
    then = f", then {', '.join(first[1:])}" if first[1:] else ""
    return Completed(message=f"{len(outcomes)} runs complete{best}{then}", data=rows)


def _interrupted(message: str) -> State[Any]:
    return State(type=StateType.CANCELLED, name="Interrupted", message=message)
