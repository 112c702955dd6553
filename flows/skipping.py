"""Runs that are complete already, found without the orchestrator."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from danling_core import storage
from danling_core.errors import DanLingError
from danling_core.launch.plan import RunPlan
from danling_core.session.open_run import newest_complete
from flows.outcome import RunOutcome

logger = logging.getLogger("danling.flows")


def complete_already(plans: Sequence[RunPlan]) -> list[RunOutcome] | None:
    """Return the outcome of each run if all of them are complete; None if there is something to train.

    None also where that is not known: the run's flow meets the same trouble, and reports it.
    """
    found: list[RunOutcome] = []
    try:
        for plan in plans:
            if (outcome := _outcome(plan)) is None:
                return None
            found.append(outcome)
    except (DanLingError, OSError) as error:
        logger.debug("it is not known whether the runs are complete: %s", error)
        return None
    return found


def _outcome(plan: RunPlan) -> RunOutcome | None:
    with storage.using(plan.config.storage_options):
        opened = newest_complete(plan.config, plan.identity)
    if opened is None or opened.complete is None:
        return None
    return RunOutcome.from_status(opened.complete, opened.folder, skipped=True, **plan.names)
