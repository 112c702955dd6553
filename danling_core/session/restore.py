"""Which checkpoint of a run is taken up: chosen by rank 0, read by every rank."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from danling_core.checkpoints.ledger import all_damaged
from danling_core.checkpoints.record import Record
from danling_core.checkpoints.store import CheckpointStore
from danling_core.errors import CheckpointCorrupt, DanLingError
from danling_core.session.files import NoFiles, RunFiles

if TYPE_CHECKING:
    from danling_core.parallel.ranks import Ranks

logger = logging.getLogger("danling")


def newest(files: RunFiles | NoFiles, ranks: Ranks) -> Record | None:
    """Return the newest good checkpoint on every rank; None where there is none at all. Collective.

    Raises:
        CheckpointError: there are checkpoints, and every one is damaged.
        ConfigError: the checkpoints are another run's.
    """
    return _agree(files, ranks, _newest)


def best(files: RunFiles | NoFiles, ranks: Ranks) -> Record | None:
    """Return the best checkpoint on every rank, or the newest good one where it is damaged or missing. Collective."""
    return _agree(files, ranks, _best)


def read(record: Record, files: RunFiles | NoFiles, folder: str) -> dict[str, Any]:
    """Return the verified state of a checkpoint, on the CPU.

    Args:
        folder: local folder of the checkpoints, for ranks that hold no files.
    """
    from danling_core.checkpoints.codec import load_state

    store = files.store if isinstance(files, RunFiles) else CheckpointStore(folder)
    return load_state(store, record, map_location="cpu")


def _agree(
    files: RunFiles | NoFiles, ranks: Ranks, choose: Callable[[RunFiles], Record | None]
) -> Record | None:
    """Return what rank 0 chooses, or raise what it raises, on every rank."""
    chosen: Record | DanLingError | None = None
    if isinstance(files, RunFiles):
        try:
            chosen = choose(files)
        except DanLingError as error:
            chosen = error
    chosen = ranks.broadcast(chosen)
    if isinstance(chosen, DanLingError):
        raise chosen
    return chosen


def _newest(files: RunFiles) -> Record | None:
    files.check_store()
    record, bad = files.store.newest_good()
    for each in bad:
        logger.warning("checkpoint %s is bad (%s): going back to the one before", each.name, each.reason)
    if record is not None or not bad:
        return record
    raise all_damaged(files.store.url, bad)


def _best(files: RunFiles) -> Record | None:
    try:
        found = files.store.pointed("best")
        if found is not None:
            files.store.open(found)  # verifies it
            return found
    except CheckpointCorrupt as error:
        logger.warning("the best checkpoint is bad (%s): the newest good one takes its place", error)
    return _newest(files)
