"""Show each epoch and the evaluation of a running group of ranks as task runs, without ever holding it up."""

from __future__ import annotations

import logging
from typing import Any

from prefect import Task
from prefect.context import TagsContext

from danling_core.config import Config
from flows.naming import span_end, stage_name
from tasks.evaluate import evaluate
from tasks.observation import Observation
from tasks.train import train_epoch

logger = logging.getLogger("danling.flows")


def observe_stages(observation: Observation, config: Config) -> None:
    """Open a task run for every stage that begins and close it when it ends; returns when the run has ended.

    A task run that Prefect cannot make is left out: the stage is read over instead.
    """
    while (opening := observation.next_opening()) is not None:
        if opening["event"] == "epoch_began":
            name = stage_name(opening, config)
            last = span_end(opening, config)
            shown = try_task(train_epoch, name=name, observation=observation, opening=opening, last=last)
        else:
            shown = try_task(evaluate, observation=observation, opening=opening)
        if not shown and observation.cut_off is None:
            observation.until_closed(opening)
        if observation.cut_off is not None:
            raise observation.cut_off


def try_task(task: Task[..., Any], **parameters: Any) -> bool:
    """Call a task; False when Prefect could not run it. What the task itself ends in stays its state.

    It runs without the flow's tags: for each tag of a task run Prefect asks its API for a limit.
    """
    try:
        with TagsContext(current_tags=set()):
            task(**parameters, return_state=True)
    except Exception as error:
        logger.warning(
            "task %s is not shown (the run goes on): %s: %s", task.name, type(error).__name__, error
        )
        return False
    return True
