"""The evaluate task: open while the ranks evaluate the best checkpoint."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed

from danling_core.results.formatting import format_epoch_result
from tasks.observation import Event, Observation
from tasks.unclosed import ended_inside


@task(name="evaluate", task_run_name="evaluate", cache_policy=NO_CACHE, persist_result=False)
def evaluate(observation: Observation, opening: Event) -> State[dict[str, Any] | None]:
    """Wait for the end of the evaluation that `opening` began; its metrics are the state's message."""
    closing = observation.until_closed(opening)
    if closing is not None:
        metrics = format_epoch_result(closing.get("result", {}), label="").removeprefix(" | ")
        return Completed(
            message=f"{metrics} | {closing.get('seconds', 0.0):.3g} s", data=closing.get("result")
        )
    return ended_inside(observation, "its evaluation")
