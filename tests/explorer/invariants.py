"""What must hold in every state that a reader may meet, and after a resume: each by its name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from danling_core import storage
from danling_core.checkpoints.record import Record
from danling_core.checkpoints.store import CheckpointStore
from danling_core.errors import DanLingError, NotFound
from danling_core.runs.finding import list_runs
from danling_core.runs.folder import EVENTS, RunFolder, Status, read_log
from danling_core.tools.verify import verify

COMMITTED = "a reader finds committed checkpoints only, and each verifies"
NOT_LOST = "what was told to be committed is not lost"
POINTERS = "latest and best name good checkpoints"
COMPLETE = "a run that is complete has all of its files"
WHOLE = "a reader finds the old file or the new one, never a part"
PATIENT = "an owner is taken over only after it has been silent for long by the observer's clock"
STAYS = "what was told to be complete stays complete"
FENCED = "after a take-over the former owner changes nothing"
NEEDED = "nothing is deleted that a living run or a reader under way needs"
RESUMES = "no damaged or missing small file refuses a run that has good checkpoints"
GROWS = "the event log of a run only grows: what a reader has read there stays"
ONE = "whoever starts a run goes on with the one that is there"
BITS = "the end is that of the run that was never disturbed"

_FILES = ("results.json", "latest.json", "best.json", "evaluation.json")
_REPLACED = {*_FILES, "status.json", "metadata.json", "config.yaml"}
_DIFFERS = {"timestamp", "time", "seconds", "uuid", "attempt", "environment", "checkpoint", "record"}


class Broken(AssertionError):
    """An invariant that does not hold.

    Args:
        invariant: its name.
        found: what was found instead.
    """

    def __init__(self, invariant: str, found: object) -> None:
        self.invariant = invariant
        super().__init__(f"{invariant}: {found}")


@contextlib.contextmanager
def holding(invariant: str) -> Iterator[None]:
    """Take every error inside for a breach of an invariant."""
    try:
        yield
    except Broken:
        raise
    except Exception as error:
        raise Broken(invariant, f"{type(error).__name__}: {error}") from error


def check_as_reader(root_url: str, told: Sequence[str] = (), *, has_power: bool = True) -> None:
    """Look at the runs of a root as anybody may at any time. Raises `Broken`.

    Args:
        root_url: the project root.
        told: what the runs have said: `committed NAME`, `complete`.
        has_power: files that follow from a checkpoint are whole, too. A loss of power may damage them until a resume.
    """
    found: set[str] = set()
    statuses: list[Status] = []
    for folder, status in list_runs(root_url):
        with holding(COMMITTED):
            records = check_checkpoints(CheckpointStore(folder.checkpoints_url), ("latest", "best"))
        if has_power:
            _check_whole(folder)
        found |= {record.name for record in records}
        statuses += [status] if status is not None else []
        if status is not None and status.is_complete:
            check_complete(folder)
    committed = [word.removeprefix("committed ") for word in told if word.startswith("committed ")]
    if committed and not any(name >= committed[-1] for name in found):
        raise Broken(NOT_LOST, f"{committed[-1]} is not among {sorted(found)}")
    if "complete" in told and not any(status.is_complete for status in statuses):
        raise Broken(STAYS, [status.status for status in statuses])


def check_checkpoints(store: CheckpointStore, pointers: Sequence[str]) -> list[Record]:
    """Check that every record of a store verifies, and that every pointer means one of them. Raises `Broken`."""
    with holding(COMMITTED):
        records, bad = store.survey()
        if bad:
            raise Broken(COMMITTED, bad)
        for record in records:
            store.verify(record)
    with holding(POINTERS):
        for pointed in filter(None, map(store.pointed, pointers)):
            store.verify(pointed)
    return records


def _check_whole(folder: RunFolder) -> None:
    for name in (*_FILES, "status.json", "metadata.json"):
        with holding(WHOLE), contextlib.suppress(NotFound):
            storage.read_json_object(storage.join(folder.url, name))


def check_replaced(changes: Iterable[str]) -> None:
    """Check that small files were replaced by others, never removed before. Raises `Broken`.

    Args:
        changes: `PUT PATH` or `DELETE PATH`, as readers see them.
    """
    for change in changes:
        method, _, path = change.partition(" ")
        if method == "DELETE" and path.rpartition("/")[2] in _REPLACED:
            raise Broken(WHOLE, f"a moment without {path}")


class Reader:
    """Somebody who looks at the runs of a root from time to time, and keeps what the event logs said.

    Args:
        root_url: the project root.
    """

    def __init__(self, root_url: str) -> None:
        self._root_url = root_url
        self._logs: dict[str, bytes] = {}

    def look(self, told: Sequence[str] = ()) -> None:
        """Check what is there now, also against what was there before. Raises `Broken`."""
        check_as_reader(self._root_url, told)
        for folder, _ in list_runs(self._root_url):
            before, found = self._logs.get(folder.url, b""), b""
            with holding(GROWS), contextlib.suppress(NotFound):
                found = read_log(folder, EVENTS)
            if not found.startswith(before):
                raise Broken(GROWS, f"{len(before)} bytes were read, now there are {len(found)} others")
            self._logs[folder.url] = found


def check_complete(folder: RunFolder) -> None:
    """Check a run that says that it is complete. Raises `Broken`."""
    with holding(COMPLETE):
        end_of(folder.url)
        report = verify(folder.url)
    if not report.is_good or report.not_bitwise:
        raise Broken(COMPLETE, f"{[*map(str, report.findings)]} {report.not_bitwise or ''}")
    with holding(POINTERS):
        store = CheckpointStore(folder.checkpoints_url)
        for name in ("latest", "best"):
            pointed = store.pointed(name)
            if pointed is None:
                raise Broken(POINTERS, f"{name} names none")
            store.verify(pointed)


def check_end(root_url: str, reference: Mapping[str, str]) -> None:
    """Check that the only run is complete, and came to the same as one that was never disturbed. Raises `Broken`."""
    found_runs = list_runs(root_url)
    if len(found_runs) != 1:
        raise Broken(ONE, [folder.url for folder, _ in found_runs])
    [(folder, status)] = found_runs
    if status is None or not status.is_complete:
        raise Broken(RESUMES, f"the status is {status}")
    check_complete(folder)
    found = end_of(folder.url)
    differing = [name for name, value in reference.items() if found.get(name) != value]
    if differing:
        raise Broken(BITS, f"{', '.join(differing)} differ")


def end_of(url: str) -> dict[str, str]:
    """Return what a run has come to: all of its newest checkpoint, and its files of results."""
    store = CheckpointStore(storage.join(url, "checkpoints"))
    record = store.pointed("latest")
    if record is None:
        raise DanLingError("there is no latest checkpoint")
    state: dict[str, Any] = torch.load(store.open(record), weights_only=True)
    files = {name: storage.read_json(storage.join(url, name)) for name in _FILES}
    return {name: repr(_lasting(value)) for name, value in {**state, **files}.items()}


def _lasting(value: Any) -> Any:
    """Return a value without what differs between two runs of the same bits, with every bit of its tensors."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, list | tuple):
        return [_lasting(inner) for inner in value]
    if isinstance(value, dict):
        return {key: _lasting(inner) for key, inner in value.items() if key not in _DIFFERS}
    return value
