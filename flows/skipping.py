"""Runs that are complete already, found without the orchestrator."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from danling_core import storage
from danling_core.errors import DanLingError
from danling_core.identity.ids import identify
from danling_core.launch.client import Prepared
from danling_core.session.open_run import newest_complete
from flows.outcome import RunOutcome
from flows.pool import pinned

logger = logging.getLogger("danling.flows")


def complete_already(prepared: Sequence[Prepared]) -> list[RunOutcome] | None:
    """Return the outcome of each run if all of them are complete; None if there is something to train.

    None also where that is not known: the run's flow meets the same trouble, and reports it.
    """
    found: list[RunOutcome] = []
    try:
        for one in prepared:
            if (outcome := _outcome(one)) is None:
                return None
            found.append(outcome)
    except (DanLingError, OSError) as error:
        logger.debug("it is not known whether the runs are complete: %s", error)
        return None
    return found


def _outcome(prepared: Prepared) -> RunOutcome | None:
    config = pinned(prepared)
    with storage.using(config.storage_options):
        opened = newest_complete(config, identify(config, prepared.source_file))
    if opened is None or opened.complete is None:
        return None
    return RunOutcome.from_status(opened.complete, opened.folder, skipped=True)
