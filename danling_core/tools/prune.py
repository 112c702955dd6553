"""Removal of checkpoints that are not needed from the runs of a project root: first a plan, then the deletion."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from danling_core import storage
from danling_core.checkpoints import retention
from danling_core.checkpoints.record import Record
from danling_core.checkpoints.store import CheckpointStore
from danling_core.errors import DanLingError
from danling_core.runs.finding import list_runs
from danling_core.runs.folder import RunFolder, find_checkpoints
from danling_core.runs.lease import Lease, is_held
from danling_core.runs.links import another_run
from danling_core.tools.threads import map_threads

_RUNS_AT_ONCE = 16


@dataclass(frozen=True)
class PrunePlan:
    """Files of one run that may be deleted.

    Args:
        folder: of the run.
        records: the checkpoints to delete.
        kept: how many stay.
        reason: why nothing is deleted, although it could be; None if it is.
    """

    folder: RunFolder
    records: tuple[Record, ...] = ()
    kept: int = 0
    reason: str | None = None

    @property
    def size(self) -> int:
        """Return bytes that become free."""
        return sum(record.size for record in self.records)


def plan(root_url: str, *, keep_best: bool, keep_last: int = 1) -> list[PrunePlan]:
    """Return what would be deleted under a root; reads records and pointers only.

    The newest checkpoint of a run always stays, so that it can be resumed; `epoch-N` checkpoints go.

    Args:
        root_url: a project root.
        keep_best: the best checkpoint of each run stays, too.
        keep_last: so many of the newest stay; at least 1.
    """
    folders = [folder for folder, _ in list_runs(root_url)]
    plan_one = functools.partial(_plan_one, keep_best=keep_best, keep_last=keep_last)
    return [each for each in map_threads(_RUNS_AT_ONCE, plan_one, folders) if each.records or each.reason]


def carry_out(plans: Sequence[PrunePlan]) -> list[PrunePlan]:
    """Delete what was planned, of several runs at once; where that failed, `reason` says why."""

    def delete(one: PrunePlan) -> PrunePlan:
        try:
            if one.reason is None:
                _delete(one)
        except DanLingError as error:
            return replace(one, reason=str(error))
        return one

    return map_threads(_RUNS_AT_ONCE, delete, plans)


def _delete(planned: PrunePlan) -> None:
    """Delete what was planned of one run, under its lease.

    Each pointer that would dangle goes first, then the record, then the payload: a reader meets whole
    checkpoints only.

    Raises:
        RunBusy: somebody writes to the run by now.
        StorageError: the store fails; what is left can be deleted by another try.
    """
    lease = Lease.acquire(planned.folder.lease_parent_url, "danling prune")
    try:
        with lease.beating():
            CheckpointStore(find_checkpoints(planned.folder), guard=lease.check).remove(*planned.records)
    finally:
        lease.release()


def _plan_one(folder: RunFolder, keep_best: bool, keep_last: int) -> PrunePlan:
    try:
        store = CheckpointStore(find_checkpoints(folder))
        if (owner := another_run(folder, store.url)) is not None:
            return PrunePlan(folder, reason=f"its checkpoints lie in the folder of another run, {owner}")
        records = store.records()
        pinned = retention.pinned(store.pointers(), ("best",) if keep_best else ())
        removed = retention.removable(records, max(keep_last, 1), pinned)
        kept = [record for record in records if record not in removed]
        if not removed:
            return PrunePlan(folder, kept=len(kept))
        if is_held(folder.lease_parent_url):
            return PrunePlan(folder, kept=len(records), reason="it is being trained")
        if missing := _incomplete(store.url, kept):
            return PrunePlan(
                folder, kept=len(records), reason=f"{missing} would stay, and its payload is damaged"
            )
        return PrunePlan(folder, tuple(removed), len(kept))
    except DanLingError as error:
        return PrunePlan(folder, reason=str(error))


def _incomplete(url: str, kept: Sequence[Record]) -> str | None:
    """Return a checkpoint that would stay and lacks bytes: then the others are needed still."""
    sizes = {entry.path: entry.size for entry in storage.list_tree(storage.join(url, "data"))}
    for record in kept:
        if any(sizes.get(f"{record.name}/{file.name}") != file.size for file in record.files):
            return record.name
    return None
