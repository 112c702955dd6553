"""The checkpoint store: commit, list, point, verify, open and prune checkpoints under one local folder or URL."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from typing import Any, NamedTuple

from danling_core.checkpoints import durable, retention
from danling_core.checkpoints.backend import Backend, LocalBackend, RemoteBackend, Signature
from danling_core.checkpoints.record import (
    DataFile,
    Record,
    check_name,
    pointer_from_bytes,
    pointer_to_bytes,
    record_name,
)
from danling_core.errors import CheckpointCorrupt, CheckpointError, NotFound

PAYLOAD = "state.pt"


class BadCheckpoint(NamedTuple):
    """A checkpoint that cannot be used: its name, and why in one line."""

    name: str
    reason: str


class CheckpointStore:
    """Checkpoints of one run: `data/<name>/state.pt`, `records/<name>.json`, and pointers such as `best.json`.

    A checkpoint exists from the moment its record does, and the record also says which pointers moved with it: so a
    crash between two files leaves nothing half done. One process writes (the run's lease sees to that); any number
    may read. Calls may come from several threads.

    Args:
        path_or_url: a local folder, or any URL that `danling_core.storage` knows.
        guard: called before a record or a pointer is written; raises (`Fenced`) if this process must not any more.
        scratch: local folder for the temporary files of a remote store; the system's by default.
        clock: Unix time, for `created_at` and the age of leftovers.
    """

    def __init__(
        self,
        path_or_url: str,
        *,
        guard: Callable[[], None] | None = None,
        scratch: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.url, self.is_local, self._backend = _backend(path_or_url, scratch)
        self._guard = guard
        self._scratch = scratch
        self._clock = clock
        self._lock = threading.RLock()
        self._writing: set[str] = set()
        self._parsed: dict[str, tuple[Signature | None, Record]] = {}
        self._verified: dict[str, list[Signature | None]] = {}
        self._opened: dict[str, str] = {}
        self._downloads: str | None = None

    # Writing

    def commit(
        self, write: durable.Write, *, step: int, attempt: str, info: Mapping[str, Any], names: Sequence[str] = ()
    ) -> Record:
        """Write a checkpoint and move the pointers `names` to it. It exists when this returns, or not at all.

        Args:
            write: puts the payload into an append-only binary file.
            step, attempt, info: see `Record`.
            names: pointers to move: `latest`, `best`, `epoch-3`.

        Raises:
            CheckpointError: the disk is full, read-only, or gone; the message says which, and nothing is left behind.
            StorageError: a remote store failed.
        """
        record = self.publish(write, step=step, attempt=attempt, info=info, names=names)
        self.repoint(record)
        return record

    def publish(
        self, write: durable.Write, *, step: int, attempt: str, info: Mapping[str, Any], names: Sequence[str] = ()
    ) -> Record:
        """`commit` without the pointer files, which `repoint` writes (and can write again after a failure).

        Readers that go through `pointed` see the pointers moved already: the record says so.
        """
        for each in names:
            check_name(each)
        name = self._claim(step, attempt)
        try:
            with self._explained(f"save checkpoint {name}"):
                size, digest = self._backend.put(f"data/{name}/{PAYLOAD}", write)
            record = self._write_record(
                Record(
                    name=name,
                    step=step,
                    attempt=attempt,
                    sequence=0,
                    names=tuple(names),
                    files=(DataFile(PAYLOAD, size, digest),),
                    created_at=datetime.fromtimestamp(self._clock(), timezone.utc).isoformat(),
                    info=dict(info),
                )
            )
        except BaseException as error:
            self._discard(name, error)
            raise
        finally:
            self._writing.discard(name)
        self._verified[name] = self._signatures(record)
        return record

    def repoint(self, record: Record) -> None:
        """Write the pointer files that `record` says moved to it."""
        for name in record.names:
            self.point(name, record)

    def point(self, name: str, record: Record) -> None:
        """Make the pointer `name` mean `record`, until a newer commit or call moves it."""
        check_name(name)
        with self._lock, self._explained(f"point {name!r} to checkpoint {record.name}"):
            self._check_guard()
            as_of = max((each.sequence for each in self.records()), default=record.sequence)
            self._backend.write(f"{name}.json", pointer_to_bytes(record, as_of))

    def prune(
        self,
        keep_last: int = 2,
        keep_names: Sequence[str] = ("best", "epoch-*"),
        *,
        protect: Sequence[str] = (),
        orphan_age_seconds: float = 3600.0,
    ) -> list[str]:
        """Remove what need not be kept, judging by the files alone. Returns the names of the checkpoints removed.

        Kept: the newest `keep_last`, what `latest` and every pointer matching `keep_names` (shell patterns) mean, the
        newest one that verifies, and the names in `protect` (one being restored, say). Payloads without a record, and
        damaged records, go once nobody has touched them for `orphan_age_seconds`.
        """
        if keep_last < 1:
            raise CheckpointError(f"keep_last must be at least 1, found {keep_last}: the newest checkpoint always stays")
        with self._lock, self._explained("prune checkpoints"):
            self._check_guard()
            records, _ = self.survey()
            pointers = self._resolve(records)
            pinned = retention.pinned(pointers, keep_names) | set(protect)
            doomed = retention.doomed(records, keep_last, pinned)
            if doomed:
                doomed = retention.spare_last_good(records, doomed, self._seems_good)
            for record in doomed:
                self._remove(record, [name for name, target in pointers.items() if target.name == record.name])
            self._remove_leftovers(self._clock() - orphan_age_seconds, pinned)
        return [record.name for record in doomed]

    # Reading

    def records(self) -> list[Record]:
        """The committed checkpoints, newest commit first; `survey` also tells the damaged ones."""
        return self.survey()[0]

    def survey(self) -> tuple[list[Record], list[BadCheckpoint]]:
        """Every record that can be read, newest commit first, and those that cannot, with the reason."""
        names = [name.removesuffix(".json") for name in self._backend.names("records") if _is_file_name(name)]
        records: list[Record] = []
        bad: list[BadCheckpoint] = []
        for found in self._read_all(names):
            if isinstance(found, Record):
                records.append(found)
            elif found is not None:
                bad.append(found)
        return sorted(records, key=lambda record: (record.sequence, record.step), reverse=True), bad[::-1]

    def pointers(self) -> dict[str, Record]:
        """What every pointer means now, `latest` and `best` among them; damaged ones are left out."""
        return self._resolve(self.records())

    def pointed(self, name: str) -> Record | None:
        """The record that `name` (`latest`, `best`, `epoch-3`) means; None if nothing was ever called so.

        Raises:
            CheckpointCorrupt: the pointer, or the record it names, is damaged or gone.
        """
        return self._pointed(check_name(name), self.records())

    def verify(self, record: Record) -> None:
        """Read the whole payload and compare sizes and hashes; raises CheckpointCorrupt on any difference."""
        with tempfile.TemporaryDirectory(prefix="danling-verify-", dir=self._scratch) as folder:
            for file in record.files:
                self._check(record, file, folder)
        self._verified[record.name] = self._signatures(record)

    def open(self, record: Record) -> str:
        """A local path of the verified payload. A remote one is downloaded, and stays until `release`.

        Raises:
            CheckpointCorrupt: missing, or not the bytes that were committed.
        """
        file = record.files[0]
        if self.is_local:
            if not self._seems_good(record):
                raise CheckpointCorrupt(f"checkpoint {record.name} is not what was committed: see newest_good")
            return self._backend.fetch(_data_path(record, file), "")
        if record.name not in self._opened:
            folder = tempfile.mkdtemp(dir=self._download_folder())
            try:
                self._opened[record.name] = self._check(record, file, folder)
            except BaseException:
                shutil.rmtree(folder)
                raise
        return self._opened[record.name]

    def release(self, record: Record) -> None:
        """Delete the local copy that `open` made of a remote payload; a local payload stays as it is."""
        path = self._opened.pop(record.name, None)
        if path is not None:
            shutil.rmtree(os.path.dirname(path))

    def newest_good(self, skip: Sequence[str] = ()) -> tuple[Record | None, list[BadCheckpoint]]:
        """The newest checkpoint that verifies, and those that were passed over because they do not, with the reason.

        Args:
            skip: names of records not to be considered.
        """
        records, bad = self.survey()
        for record in records:
            if record.name in skip:
                continue
            try:
                # A remote payload is kept: whoever asks will open it next.
                self.verify(record) if self.is_local else self.open(record)
            except CheckpointError as error:
                bad.append(BadCheckpoint(record.name, str(error)))
            else:
                return record, bad
        return None, bad

    # Inside

    def _claim(self, step: int, attempt: str) -> str:
        """A new data folder: `<step>-<attempt>`, or `<step>-<attempt>-2` when that one is taken."""
        base = record_name(step, attempt)
        with self._lock, self._explained(f"save checkpoint {base}"):
            count = 1
            while True:
                name = base if count == 1 else f"{base}-{count}"
                if name not in self._writing and self._backend.claim(f"data/{name}"):
                    self._writing.add(name)
                    return name
                count += 1

    def _write_record(self, draft: Record) -> Record:
        with self._lock, self._explained(f"commit checkpoint {draft.name}"):
            self._check_guard()
            sequence = 1 + max((record.sequence for record in self.records()), default=0)
            data = Record(**{**vars(draft), "sequence": sequence}).to_bytes()
            self._backend.write(f"records/{draft.name}.json", data)
        return Record.from_bytes(data, draft.name)

    def _discard(self, name: str, error: BaseException) -> None:
        """Free the room of a checkpoint that was not committed, without hiding why it was not."""
        try:
            self._backend.delete(f"records/{name}.json")
            self._backend.delete(f"data/{name}")
        except Exception as failure:
            error.add_note(f"its partial data could not be removed either: {failure!r}")

    def _remove(self, record: Record, pointers: Sequence[str]) -> None:
        for name in pointers:
            self._backend.delete(f"{name}.json")
        self._backend.delete(f"records/{record.name}.json")
        self._backend.delete(f"data/{record.name}")
        self._parsed.pop(record.name, None)
        self._verified.pop(record.name, None)

    def _remove_leftovers(self, before: float, keep: set[str]) -> None:
        """Data without a record, damaged records and temporary files, all untouched since `before` (Unix time)."""
        data = self._backend.names("data")
        _, bad = self.survey()
        recorded = {name.removesuffix(".json") for name in self._backend.names("records")}
        damaged = [each.name for each in bad if each.name not in keep and each.name in recorded]
        paths = [f"data/{name}" for name in data if name not in recorded | self._writing | keep]
        paths += [f"records/{name}.json" for name in damaged]
        for folder in ("", "records/"):
            paths += [f"{folder}{name}" for name in self._backend.names(folder.rstrip("/")) if name.endswith(".tmp")]
        for path in paths:
            with contextlib.suppress(NotFound):
                if self._backend.modified(path) < before:
                    self._backend.delete(path)

    def _read_all(self, names: Sequence[str]) -> Iterator[Record | BadCheckpoint | None]:
        if self.is_local or len(names) < 2:
            yield from map(self._read_record, names)
            return
        with ThreadPoolExecutor(max_workers=8, thread_name_prefix="records") as pool:
            yield from pool.map(self._read_record, names)

    def _read_record(self, name: str) -> Record | BadCheckpoint | None:
        """The record called `name`, or why it is bad; None if it was pruned just now."""
        path = f"records/{name}.json"
        try:
            signature = self._backend.signature(path)
            known = self._parsed.get(name)
            if known is not None and known[0] == signature:
                return known[1]
            record = Record.from_bytes(self._backend.read(path), check_name(name))
        except NotFound:
            return None
        except CheckpointError as error:
            return BadCheckpoint(name, str(error))
        self._parsed[name] = signature, record
        return record

    def _resolve(self, records: Sequence[Record]) -> dict[str, Record]:
        names = {name.removesuffix(".json") for name in self._backend.names("") if _is_file_name(name)}
        names |= {name for record in records for name in record.names}
        found: dict[str, Record] = {}
        for name in sorted(names):
            with contextlib.suppress(CheckpointCorrupt):
                record = self._pointed(check_name(name), records)
                if record is not None:
                    found[name] = record
        return found

    def _pointed(self, name: str, records: Sequence[Record]) -> Record | None:
        """The newest commit that moved the pointer since its file was written, else what the file says."""
        target, as_of, damage = None, 0, None
        try:
            target, as_of = pointer_from_bytes(self._backend.read(f"{name}.json"), name)
        except NotFound:
            pass  # Never written, or a crash came between the record and the pointer file.
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

    def _check(self, record: Record, file: DataFile, folder: str) -> str:
        """The local path of a payload file whose size and hash are as committed; raises CheckpointCorrupt."""
        path = _data_path(record, file)
        try:
            size = self._backend.size(path)
            if size != file.size:
                raise CheckpointCorrupt(
                    f"checkpoint {record.name}: {file.name} has {size} bytes, {file.size} were committed: truncated"
                    if size < file.size
                    else f"checkpoint {record.name}: {file.name} has {size} bytes, only {file.size} were committed"
                )
            local = self._backend.fetch(path, folder)
            found = durable.hash_file(local)
        except (NotFound, FileNotFoundError) as error:
            raise CheckpointCorrupt(f"checkpoint {record.name}: {file.name} is missing") from error
        if found != file.xxh3:
            raise CheckpointCorrupt(
                f"checkpoint {record.name}: {file.name} has xxh3 {found}, committed was {file.xxh3}: bits have changed"
            )
        return local

    def _seems_good(self, record: Record) -> bool:
        """Whether a record verifies; one that did before is read again only if its files were touched since."""
        try:
            known = self._verified.get(record.name)
            if known is None or None in known or known != self._signatures(record):
                self.verify(record)
        except (CheckpointCorrupt, NotFound):
            return False
        return True

    def _signatures(self, record: Record) -> list[Signature | None]:
        return [self._backend.signature(_data_path(record, file)) for file in record.files]

    def _download_folder(self) -> str:
        if self._downloads is None:
            self._downloads = tempfile.mkdtemp(prefix="danling-checkpoints-", dir=self._scratch)
            weakref.finalize(self, shutil.rmtree, self._downloads, ignore_errors=True)
        return self._downloads

    def _check_guard(self) -> None:
        if self._guard is not None:
            self._guard()

    @contextlib.contextmanager
    def _explained(self, action: str) -> Iterator[None]:
        """Turn what the operating system says into a CheckpointError that says what to do."""
        try:
            yield
        except OSError as error:
            raise CheckpointError(f"cannot {action} in {self.url}: {error}") from error


def _backend(path_or_url: str, scratch: str | None) -> tuple[str, bool, Backend]:
    if "://" not in path_or_url:
        return path_or_url, True, LocalBackend(path_or_url)
    from danling_core import storage

    if storage.is_local(path_or_url):
        return path_or_url, True, LocalBackend(storage.local_path(path_or_url))
    return path_or_url, False, RemoteBackend(path_or_url, scratch)


def _data_path(record: Record, file: DataFile) -> str:
    return f"data/{record.name}/{file.name}"


def _is_file_name(name: str) -> bool:
    return name.endswith(".json") and not name.startswith(".")
