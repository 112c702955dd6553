"""The checkpoint store: commit, list, point, verify, open, prune; in one local folder or at a URL."""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from danling_core.checkpoints import retention
from danling_core.checkpoints.ledger import BadCheckpoint, Ledger
from danling_core.checkpoints.payloads import Payloads
from danling_core.checkpoints.record import Record, check_name, record_name
from danling_core.errors import CheckpointError, NotFound
from danling_core.storage.folder import Folder
from danling_core.storage.hashing import Write
from danling_core.storage.local import is_unfinished

_ORPHAN_AGE_SECONDS = 3600.0

__all__ = ["BadCheckpoint", "CheckpointStore"]


class CheckpointStore:
    """Checkpoints of one run: `data/<name>/state.pt`, `records/<name>.json`, pointers such as `best.json`.

    A checkpoint exists from the moment its record does, and the record also says which pointers moved with
    it: so a crash between two files leaves nothing half done. One process writes (the run's lease sees to
    that); any number may read. Calls may come from several threads.

    Args:
        path_or_url: a local folder, or any URL that `danling_core.storage` knows.
        guard: called before a record or a pointer is written; raises (`Fenced`) if this process must not any
            more.
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
        self.url = path_or_url
        self._folder = Folder(path_or_url, scratch)
        self.is_local = self._folder.is_local
        self._ledger = Ledger(self._folder)
        self._payloads = Payloads(self._folder, scratch)
        self._guard = guard
        self._clock = clock
        self._lock = threading.RLock()
        self._writing: set[str] = set()

    # Writing

    def commit(
        self,
        write: Write,
        *,
        step: int,
        attempt: str,
        info: Mapping[str, Any],
        names: Sequence[str] = (),
        expected_bytes: int | None = None,
    ) -> Record:
        """Write a checkpoint and move the pointers `names` to it. It exists when this returns.

        Args:
            write: puts the payload into an append-only binary file.
            step, attempt, info: see `Record`.
            names: pointers to move: `latest`, `best`, `epoch-3`.
            expected_bytes: how large the payload will be, for the message when the disk is full.

        Raises:
            CheckpointError: the disk is full, read-only or gone; the message says which. No partial data is
                left.
            StorageError: a remote store failed.
        """
        record = self.publish(
            write, step=step, attempt=attempt, info=info, names=names, expected_bytes=expected_bytes
        )
        self.repoint(record)
        return record

    def publish(
        self,
        write: Write,
        *,
        step: int,
        attempt: str,
        info: Mapping[str, Any],
        names: Sequence[str] = (),
        expected_bytes: int | None = None,
    ) -> Record:
        """Commit, but without the pointer files, which `repoint` writes (and can write again after a failure).

        `pointed` says already that the pointers have moved: it asks the records too.
        """
        for each in names:
            check_name(each)
        name = self._claim(step, attempt)
        try:
            file = self._payloads.put(name, write)
            created_at = datetime.fromtimestamp(self._clock(), UTC).isoformat()
            draft = Record(name, step, attempt, 0, tuple(names), (file,), created_at, dict(info))
            with self._lock:
                record = self._ledger.append(draft, self._check_guard)
        except BaseException as error:
            self._discard(name, error)
            if isinstance(error, OSError):
                raise self._failed_save(name, error, expected_bytes) from error
            raise
        finally:
            self._writing.discard(name)
        self._payloads.trust(record)
        return record

    def repoint(self, record: Record) -> None:
        """Write the pointer files that `record` says moved to it."""
        for name in record.names:
            self.point(name, record)

    def point(self, name: str, record: Record) -> None:
        """Make the pointer `name` mean `record`, until a newer commit or call moves it."""
        with self._lock, self._explained(f"point {name!r} to checkpoint {record.name}"):
            self._ledger.point(name, record, self._check_guard)

    def prune(self, keep_last: int = 2) -> list[str]:
        """Remove what need not be kept, judging by the files alone. Returns the names of what was removed.

        Kept: the newest `keep_last`, what a pointer means, and the newest one that verifies. Payloads without a
        record, and damaged records, are removed once untouched for an hour.
        """
        if keep_last < 1:
            raise CheckpointError(
                f"keep_last must be at least 1, found {keep_last}: the newest checkpoint stays"
            )
        with self._lock, self._explained("prune checkpoints"):
            self._check_guard()
            records = self._ledger.records()
            pointers = self._ledger.pointers(records)
            keep = {record.name for record in pointers.values()}
            removed = retention.removable(records, keep_last, keep)
            removed = retention.spare_last_good(records, removed, self._payloads.is_good)
            for record in removed:
                self._remove(record, pointers)
            self._remove_leftovers(self._clock() - _ORPHAN_AGE_SECONDS, keep)
        return [record.name for record in removed]

    def remove(self, *records: Record) -> None:
        """Delete checkpoints: of each the pointers that would dangle, then the record, then the payload."""
        with self._lock, self._explained(f"remove {len(records)} checkpoints"):
            pointers = self._ledger.pointers(self._ledger.records())
            for record in records:
                self._remove(record, pointers)

    # Reading

    def records(self) -> list[Record]:
        """Return the committed checkpoints, newest commit first; `survey` also tells the damaged ones."""
        return self.survey()[0]

    def survey(self) -> tuple[list[Record], list[BadCheckpoint]]:
        """Every record that can be read, newest commit first, and those that cannot, with the reason."""
        with self._explained("list checkpoints"):
            return self._ledger.survey()

    def pointers(self) -> dict[str, Record]:
        """Return the record of every pointer, `latest` and `best` among them; damaged ones are left out."""
        with self._explained("list checkpoints"):
            return self._ledger.pointers(self._ledger.records())

    def pointed(self, name: str) -> Record | None:
        """Return the record that `name` (`latest`, `best`, `epoch-3`) means; None if nothing was ever called so.

        Raises:
            CheckpointCorrupt: the pointer, or the record it names, is damaged or gone.
        """
        with self._explained(f"read pointer {name!r}"):
            return self._ledger.pointed(name)

    def damaged_pointers(self) -> list[BadCheckpoint]:
        """Return the pointers whose file is damaged or that mean nothing, and why."""
        with self._explained("read pointers"):
            return self._ledger.damaged_pointers()

    def verify(self, record: Record) -> None:
        """Read the whole payload and compare sizes and hashes; raises CheckpointCorrupt on any difference."""
        with self._explained(f"verify checkpoint {record.name}"):
            self._payloads.verify(record)

    def open(self, record: Record) -> str:
        """Return a local path of the verified payload. A remote one is downloaded, and stays until `release`.

        Raises:
            CheckpointCorrupt: missing, or not the bytes that were committed.
        """
        with self._explained(f"open checkpoint {record.name}"):
            return self._payloads.open_local(record) if self.is_local else self._payloads.open_remote(record)

    def release(self, record: Record) -> None:
        """Delete the local copy that `open` made of a remote payload; a local payload stays as it is."""
        self._payloads.release(record)

    def newest_good(self) -> tuple[Record | None, list[BadCheckpoint]]:
        """Return the newest checkpoint that verifies, and those that were passed over because they do not, and why."""
        records, bad = self.survey()
        for record in records:
            try:
                if self.is_local:
                    self.verify(record)
                else:
                    self.open(record)  # and keep the download: whoever asks will want to read it
            except CheckpointError as error:
                bad.append(BadCheckpoint(record.name, str(error)))
            else:
                return record, bad
        return None, bad

    # Inside

    def _remove(self, record: Record, pointers: Mapping[str, Record]) -> None:
        dangling = [name for name, target in pointers.items() if target.name == record.name]
        self._ledger.remove(record, dangling, self._check_guard)
        self._payloads.remove(record.name)

    def _claim(self, step: int, attempt: str) -> str:
        """Return a new data folder: `<step>-<attempt>`, or `<step>-<attempt>-2` when that one is taken."""
        base = name = record_name(step, attempt)
        with self._lock, self._explained(f"save checkpoint {base}"):
            count = 1
            while name in self._writing or not self._folder.claim(f"data/{name}"):
                count += 1
                name = f"{base}-{count}"
            self._writing.add(name)
        return name

    def _discard(self, name: str, error: BaseException) -> None:
        """Free the room of a checkpoint that was not committed, without hiding why it was not."""
        try:
            self._folder.delete(f"records/{name}.json")
            self._payloads.remove(name)
        except Exception as failure:
            error.add_note(f"its partial data could not be removed either: {failure!r}")

    def _failed_save(self, name: str, error: OSError, expected_bytes: int | None) -> CheckpointError:
        text = f"cannot save checkpoint {name} in {self.url}: {error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            needed = "an unknown number of" if expected_bytes is None else f"{expected_bytes:,}"
            free = self._folder.free_bytes()
            text += (
                f"; it needs {needed} bytes, {'?' if free is None else f'{free:,}'} are free: make room, "
                "or keep fewer checkpoints (keep_last, save_interval)"
            )
        return CheckpointError(text)

    def _remove_leftovers(self, before: float, keep: set[str]) -> None:
        """Data without record, damaged records and temporary files, untouched since `before` (Unix time)."""
        data = self._folder.names("data")
        damaged = {bad.name for bad in self._ledger.survey()[1]} - keep
        entries = self._folder.names("records")
        recorded = {name.removesuffix(".json") for name in entries}
        paths = [f"data/{name}" for name in data if name not in recorded | self._writing | keep]
        paths += [f"records/{name}" for name in entries if is_unfinished(name) or name[:-5] in damaged]
        paths += [name for name in self._folder.names() if is_unfinished(name)]
        for path in paths:
            with contextlib.suppress(NotFound):
                if self._folder.modified(path) < before:
                    self._check_guard()
                    self._folder.delete(path, recursive=path.startswith("data/"))

    def _check_guard(self) -> None:
        if self._guard is not None:
            self._guard()

    @contextlib.contextmanager
    def _explained(self, action: str) -> Iterator[None]:
        """Raise an error of the operating system as a CheckpointError that names action and place."""
        try:
            yield
        except OSError as error:
            raise CheckpointError(f"cannot {action} in {self.url}: {error}") from error
