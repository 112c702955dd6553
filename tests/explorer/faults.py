"""Faults put into the real code, one at a time: an explorer that finds them would find their like."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

from danling_core import storage
from danling_core.checkpoints.record import Record
from danling_core.checkpoints.store import CheckpointStore
from danling_core.mirror import pull
from danling_core.mirror.checkpoints import CheckpointUploader
from danling_core.mirror.layout import Layout
from danling_core.mirror.uploader import Uploader
from danling_core.runs import lease
from danling_core.runs.folder import LEASE, STATUS
from danling_core.runs.lease_owner import Owner, is_dead
from danling_core.session.files import RunFiles
from danling_core.session.session import RunSession
from danling_core.storage import hashing, operations
from danling_core.storage.local import LocalBackend
from danling_core.storage.settings import Settings
from tests.explorer.invariants import COMMITTED, COMPLETE, FENCED, GROWS, PATIENT, POINTERS, WHOLE, Broken
from tests.explorer.spaces import SPACES, Space


@dataclass(frozen=True)
class Fault:
    """Something that a careless developer would have written.

    Args:
        what: in words.
        put_in: a context in which the code has it.
        space: the name of the space that finds it.
        invariant: what it breaks.
        only: cases with these words are tried; all by default.
    """

    what: str
    put_in: Callable[[], AbstractContextManager[object]]
    space: str
    invariant: str
    only: str = ""


class Found(NamedTuple):
    """The case that breaks an invariant.

    Args:
        number: of the case in its space.
        where: in words.
        tried: how many cases were tried.
        error: what does not hold.
    """

    number: int
    where: str
    tried: int
    error: Broken


def space_of(fault: Fault) -> Space:
    """Return the space that finds a fault."""
    return next(space for space in SPACES if space.name == fault.space)


def find(fault: Fault, most: int = 300) -> Found | None:
    """Return the first case that breaks something where the code has the fault; None after `most` cases."""
    with fault.put_in(), space_of(fault).cases() as cases:
        numbers = [number for number in spread(len(cases)) if fault.only in cases[number].where]
        for tried, number in enumerate(numbers[:most], start=1):
            try:
                cases[number].check()
            except Broken as error:
                return Found(number, cases[number].where, tried, error)
    return None


def spread(count: int) -> list[int]:
    """Return the numbers below `count`, each as far from those before as it can be: that of the reversed bits."""
    width = max(1, (count - 1).bit_length())
    return sorted(range(count), key=lambda number: int(f"{number:0{width}b}"[::-1], 2))


@contextmanager
def _replaced(*places: tuple[Any, str, Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for owner, name, careless in places:
            stack.enter_context(mock.patch.object(owner, name, careless))
        yield


def _without_sync() -> AbstractContextManager[None]:
    """Leave `fsync` out of the payload of a checkpoint, as a write that only flushes."""
    here = mock.Mock(wraps=os, fsync=lambda descriptor: None)
    return _replaced((hashing, "os", here))


def _record_first() -> AbstractContextManager[None]:
    """Upload the record of a checkpoint, then its payload."""

    def upload(self: CheckpointUploader, name: str, record: bytes, payload: dict[str, str]) -> None:
        url = storage.join(self._remote, "records", f"{name}.json")
        storage.write_bytes(url, record, guard=self._guard)
        for file_name, path in payload.items():
            storage.put_file(path, storage.join(self._remote, "data", name, file_name), guard=self._guard)
        self._remote_records.add(name)

    return _replaced((CheckpointUploader, "_upload_one", upload))


def _payload_deleted_first() -> AbstractContextManager[None]:
    """Free the room of a checkpoint, then forget it."""

    def remove(self: CheckpointStore, record: Record, pointers: dict[str, Record]) -> None:
        self._payloads.remove(record.name)
        dangling = [name for name, target in pointers.items() if target.name == record.name]
        self._ledger.remove(record, dangling, self._check_guard)

    return _replaced((CheckpointStore, "_remove", remove))


def _pointer_first() -> AbstractContextManager[None]:
    """Upload the pointers as soon as they have moved, then what they mean."""
    upload = CheckpointUploader.upload

    def pointers_first(self: CheckpointUploader, layout: Layout) -> None:
        for name, data in self.read_pointers(layout).items():
            if self._pointers.get(name) != data:
                storage.write_bytes(storage.join(self._remote, name), data, guard=self._guard)
                self._pointers[name] = data
        upload(self, layout)

    return _replaced((CheckpointUploader, "upload", pointers_first))


def _lease_not_read_again() -> AbstractContextManager[None]:
    """Take the lease for one's own until it is released."""
    return _replaced((lease, "check_generation", lambda url, generation: []))


def _guard_asked_once() -> AbstractContextManager[None]:
    """Check the right to write before an operation, and repeat its request without."""

    def attempt(settings: Settings, operation: str, url: str, call: Any, guard: Any = None) -> Any:
        store, path, identity = operations._backend(url, settings)
        if guard is not None:
            guard()
        return settings.retry.call(operation, url, lambda: call(store, path), identity)

    return _replaced((operations, "_attempt_with", attempt))


def _renamed_on_a_store() -> AbstractContextManager[None]:
    """Write under another name and rename, which a store has not: it copies and deletes."""
    write = operations.write_bytes

    def write_and_rename(url: str, data: bytes, *, is_durable: bool = True, guard: Any = None) -> None:
        if storage.is_local(url):
            return write(url, data, is_durable=is_durable, guard=guard)
        temporary = f"{url}.new"
        write(temporary, data, guard=guard)
        operations.delete(url, guard=guard)
        write(url, operations.read_bytes(temporary), guard=guard)
        return operations.delete(temporary)

    return _replaced((storage, "write_bytes", write_and_rename))


def _old_listing() -> AbstractContextManager[None]:
    """Keep the lease's listing, which is asked before each write, until one writes there oneself, as `fsspec` does.

    Each actor is a process, and has its own.
    """
    list_names, create = storage.list_names, storage.create_exclusive
    known: dict[tuple[threading.Thread, str], list[str]] = {}

    def kept(url: str) -> list[str]:
        key = threading.current_thread(), url
        if not url.endswith(LEASE):
            return list_names(url)
        if key not in known:
            known[key] = list_names(url)
        return known[key]

    def create_and_forget(url: str, data: bytes) -> bool:
        known.pop((threading.current_thread(), storage.parent(url)), None)
        return create(url, data)

    return _replaced((storage, "list_names", kept), (storage, "create_exclusive", create_and_forget))


def _complete_first() -> AbstractContextManager[None]:
    """Tell the end of a run at once, and bring up the rest.

    To upload the status first is harmless alone: the run waits until the store has all the rest before it writes it.
    Not to wait is harmless alone, too: the status goes up last.
    """
    bring_up = Uploader._bring_up

    def status_first(self: Uploader, is_final: bool, is_full: bool) -> None:
        status = self._read_local(STATUS)
        if status is not None:
            self._write_if_changed(STATUS, status)
        bring_up(self, is_final, is_full)

    not_waiting = (RunSession, "_wait_uploaded", lambda self: None)
    return _replaced((Uploader, "_bring_up", status_first), not_waiting)


def _cut_in_place() -> AbstractContextManager[None]:
    """Write results into the file that readers have."""

    def write(self: LocalBackend, path: str, data: bytes, is_durable: bool) -> None:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)

    write_results = RunFiles.write_results

    def in_place(self: RunFiles, *results: Any) -> None:
        with mock.patch.object(LocalBackend, "write", write):
            write_results(self, *results)

    return _replaced((RunFiles, "write_results", in_place))


def _scratch_trusted() -> AbstractContextManager[None]:
    """Go on with what is on this machine, whoever has gone on with the run elsewhere."""
    return _replaced((pull, "_continues", lambda folder, work_dir: True))


def _judged_by_the_clock() -> AbstractContextManager[None]:
    """Compare the time of an owner's last beat with one's own clock."""

    def is_silent(owner: Owner) -> bool:
        return is_dead(owner) or lease.time.time() - owner.beat_at > lease.STALE_AFTER_SECONDS

    return _replaced((lease, "is_dead", is_silent))


FAULTS = [
    Fault("fsync is left out", _without_sync, "run, disk", COMMITTED),
    Fault("record before payload", _record_first, "run and mirror, S3", COMMITTED),
    Fault("payload deleted before record", _payload_deleted_first, "prune, disk", COMMITTED),
    Fault("pointer before record", _pointer_first, "run and mirror, GCS", POINTERS),
    Fault("lease not read again", _lease_not_read_again, "two owners, S3", FENCED),
    Fault("repeated after a take-over", _guard_asked_once, "two owners, S3", FENCED, "an answer lost"),
    Fault("rename on a store", _renamed_on_a_store, "run and mirror, S3", WHOLE),
    Fault("an old listing is trusted", _old_listing, "two owners, GCS", FENCED),
    Fault("complete before the rest", _complete_first, "run and mirror, S3", COMPLETE),
    Fault("results cut in place", _cut_in_place, "run, disk", WHOLE),
    Fault("scratch trusted after a take-over", _scratch_trusted, "run on two machines in turn, S3", GROWS),
    Fault("beats judged by the clock", _judged_by_the_clock, "two owners, S3", PATIENT),
]
