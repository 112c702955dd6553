"""The records and pointers of a store: which checkpoints exist, in which order, and what each name means."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from danling_core.checkpoints.record import (
    Record,
    check_name,
    is_simple_name,
    pointer_from_bytes,
    pointer_to_bytes,
)
from danling_core.errors import CheckpointCorrupt, CheckpointError, NotFound
from danling_core.storage.folder import Folder, Signature


class BadCheckpoint(NamedTuple):
    """A checkpoint that cannot be used: its name, and why in one line."""

    name: str
    reason: str


def all_damaged(url: str, bad: Sequence[BadCheckpoint]) -> CheckpointError:
    """Return the error of a resume where no checkpoint is left to go back to."""
    reasons = "".join(f"\n  {each.name}: {each.reason}" for each in bad)
    return CheckpointError(
        f"every checkpoint in {url} is damaged, and a new start would throw away what was trained: put a good "
        f"copy back, or begin anew with --fresh, which leaves this folder as it is.{reasons}"
    )


class Ledger:
    """`records/<name>.json`, one per checkpoint, and `<pointer>.json`, each naming one of them.

    A record also says which pointers moved with it, and a pointer file how far it looked. So what a pointer
    means follows from the records where a crash left its file behind, and a commit with all its pointers is
    one rename.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._parsed: dict[str, tuple[Signature | None, Record]] = {}

    def survey(self) -> tuple[list[Record], list[BadCheckpoint]]:
        """Every record that can be read, newest commit first, and those that cannot, with the reason."""
        names = [name.removesuffix(".json") for name in self._folder.names("records") if _is_document(name)]
        records: list[Record] = []
        bad: list[BadCheckpoint] = []
        for found in self._read(names):
            if isinstance(found, Record):
                records.append(found)
            else:
                bad.append(found)
        return sorted(records, key=_place, reverse=True), bad[::-1]

    def records(self) -> list[Record]:
        return self.survey()[0]

    def append(self, draft: Record, guard: Callable[[], None]) -> Record:
        """Write the record of a payload that is in place: from here on the checkpoint exists.

        Its place in the order is read before `guard` is called: a writer that is paused after that, and loses the run
        meanwhile, does not come after what the new owner commits.
        """
        check_name(draft.name)
        sequence = 1 + max((record.sequence for record in self.records()), default=0)
        data = replace(draft, sequence=sequence).to_bytes()
        record = Record.from_bytes(data, draft.name)
        self._folder.write(_record_path(draft.name), data, guard)
        return record

    def remove(self, record: Record, pointers: Sequence[str], guard: Callable[[], None]) -> None:
        """Forget a checkpoint, and the pointer files that would be left dangling; `guard` is called before each."""
        for name in pointers:
            self._folder.delete(f"{name}.json", guard=guard)
        self._folder.delete(_record_path(record.name), guard=guard)
        self._parsed.pop(record.name, None)

    def point(self, name: str, record: Record, guard: Callable[[], None]) -> None:
        """Write a pointer file; `guard` as for `append`."""
        newest = max((each.sequence for each in self.records()), default=record.sequence)
        self._folder.write(f"{check_name(name)}.json", pointer_to_bytes(name, record, newest), guard)

    def pointed(self, name: str) -> Record | None:
        data = self._folder.read_many([f"{check_name(name)}.json"])[0]
        return _meaning(name, data, self.records())

    def pointers(self, records: Sequence[Record]) -> dict[str, Record]:
        """Return the record of every pointer; damaged pointers are left out. `records` as `survey` gave them."""
        found: dict[str, Record] = {}
        for name, data in self._pointer_files(records):
            with contextlib.suppress(CheckpointCorrupt):
                record = _meaning(name, data, records)
                if record is not None:
                    found[name] = record
        return found

    def damaged_pointers(self) -> list[BadCheckpoint]:
        """Return the pointers whose file is damaged or that mean nothing, and why."""
        records = self.records()
        bad: list[BadCheckpoint] = []
        for name, data in self._pointer_files(records):
            try:
                if data is not None:
                    pointer_from_bytes(data, name)
                _meaning(name, data, records)
            except CheckpointCorrupt as error:
                bad.append(BadCheckpoint(name, str(error)))
        return bad

    def _pointer_files(self, records: Sequence[Record]) -> Iterator[tuple[str, bytes | None]]:
        """Yield the name and the file of every pointer that has one, or that a record says moved to it."""
        names = {name.removesuffix(".json") for name in self._folder.names("") if _is_document(name)}
        names |= {name for record in records for name in record.names}
        simple = sorted(name for name in names if is_simple_name(name))
        yield from zip(simple, self._folder.read_many([f"{name}.json" for name in simple]), strict=True)

    def _read(self, names: Sequence[str]) -> list[Record | BadCheckpoint]:
        """Read the named records that are still there; parse a record again only if its file was touched."""
        signatures = {name: self._signature(name) for name in names}
        known = {name: self._parsed.get(name) for name in names}
        stale = [name for name, entry in known.items() if entry is None or entry[0] != signatures[name]]
        contents = dict(
            zip(stale, self._folder.read_many([_record_path(name) for name in stale]), strict=True)
        )
        found: list[Record | BadCheckpoint] = []
        for name in names:
            entry = known[name]
            if name not in contents and entry is not None:
                found.append(entry[1])
                continue
            data = contents[name]
            if data is not None:  # None: it was pruned just now
                found.append(self._parse(name, data, signatures[name]))
        return found

    def _parse(self, name: str, data: bytes, signature: Signature | None) -> Record | BadCheckpoint:
        try:
            record = Record.from_bytes(data, check_name(name))
        except CheckpointError as error:
            return BadCheckpoint(name, str(error))
        self._parsed[name] = signature, record
        return record

    def _signature(self, name: str) -> Signature | None:
        try:
            return self._folder.signature(_record_path(name))
        except NotFound:
            return None


def _place(record: Record) -> tuple[int, int, int]:
    """Return a record's place in the order: of two with one number, that of the later owner comes after."""
    generation = record.attempt.partition(".")[0]
    return record.sequence, int(generation) if generation.isdecimal() else 0, record.step


def _record_path(name: str) -> str:
    return f"records/{name}.json"


def _is_document(name: str) -> bool:
    return name.endswith(".json") and not name.startswith(".")


def _meaning(name: str, data: bytes | None, records: Sequence[Record]) -> Record | None:
    """Return the newest commit that moved the pointer since its file was written, else what the file says.

    Args:
        data: the pointer file; None if it was never written, or a crash came between record and pointer.
    """
    target, as_of, damage = None, 0, None
    try:
        if data is not None:
            target, as_of = pointer_from_bytes(data, name)
    except CheckpointCorrupt as error:
        damage = error
    for record in records:
        if record.sequence > as_of and name in record.names:
            return record
    if damage is not None:
        raise damage
    for record in records:
        if record.name == target:
            return record
    if target is not None:
        raise CheckpointCorrupt(f"pointer {name!r} names checkpoint {target}, which has no readable record")
    return None
