"""The train task: one task run for one epoch (in step mode: up to one evaluation), open while ranks train it."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed

from danling_core.results.formatting import format_epoch_result
from tasks.observation import Event, Observation
from tasks.unclosed import ended_inside


@task(name="train epoch", task_run_name="{name}", cache_policy=NO_CACHE, persist_result=False)
def train_epoch(
    name: str, observation: Observation, opening: Event, last: int | None = None
) -> State[dict[str, Any] | None]:
    """Wait for the end of the epoch that `opening` began, or of epoch `last`; its metrics are the state's message.

    The ranks do not wait for this task. Failed: the run ended inside the epoch. `name` is what the run is called.
    """
    closing = observation.until_closed(opening, last)
    if closing is not None:
        return Completed(message=_message(closing), data={"index": closing["index"], **closing["result"]})
    return ended_inside(observation, name)


def _message(closing: Event) -> str:
    metrics = format_epoch_result(closing.get("result", {}), is_best=bool(closing.get("is_best")), label="")
    return f"{metrics.removeprefix(' | ')} | {closing.get('seconds', 0.0):.3g} s"
