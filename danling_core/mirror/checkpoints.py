"""The mirror's part for checkpoints: payload, then record, then pointer; and prunes in the reverse order."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from danling_core import storage
from danling_core.checkpoints.record import Record, pointer_from_bytes
from danling_core.errors import CheckpointError
from danling_core.mirror.layout import Layout

logger = logging.getLogger("danling")


class CheckpointUploader:
    """Brings up the committed checkpoints of a local store, and deletes remotely what was pruned locally.

    Args:
        local: the local store's folder.
        remote: URL of the remote store.
        staging: a folder on the same disk, for hard links to payloads under way.
        guard: called before every request that writes; raises `Fenced` if another process owns the run now.
        note: called with `committed={"record": ..., "at": ...}` when a checkpoint is remote.
    """

    def __init__(
        self, local: str, remote: str, staging: str, guard: Callable[[], None], note: Callable[..., Any]
    ) -> None:
        self._local = local
        self._remote = remote
        self._staging = staging
        self._guard = guard
        self._note = note
        self._remote_records: set[str] = set()
        self._seen_records: set[str] = set()
        self._seen_pointers: set[str] = set()
        self._pointers: dict[str, bytes] = {}

    def start(self, remote_records: Iterable[str]) -> None:
        """Take note of the records that are remote already. Called once."""
        self._remote_records = set(remote_records)

    def forget_what_differs(self, remote_records: Iterable[str]) -> list[str]:
        """Return files that are not what was sent, which go up again next time.

        Args:
            remote_records: those of a fresh listing.
        """
        lost = self._seen_records & self._remote_records - set(remote_records)
        self._remote_records -= lost
        urls = [storage.join(self._remote, name) for name in self._pointers]
        contents = dict(zip(self._pointers, storage.read_many(urls), strict=True))
        moved = [name for name, data in contents.items() if data != self._pointers[name]]
        for name in moved:
            del self._pointers[name]
        return [*sorted(lost), *moved]

    def see(self, layout: Layout) -> None:
        """Take note of a scan, to know later what was pruned."""
        self._seen_records |= set(layout.records)
        self._seen_pointers |= {os.path.basename(entry.path) for entry in layout.pointers}

    def pending_bytes(self, layout: Layout) -> int:
        """Return payloads of committed checkpoints that are not remote yet."""
        waiting = set(layout.records) - self._remote_records
        return sum(entry.size for name in waiting for entry in layout.data.get(name, []))

    def upload(self, layout: Layout) -> None:
        """Upload the scanned checkpoints, newest first. Later commits wait for the next pass, so that a slow
        store gets the other files too; what is pruned meanwhile is left out."""
        for name in sorted(set(layout.records) - self._remote_records, reverse=True):
            with self._staged(name) as staged:
                if staged is not None:
                    self._upload_one(name, *staged)

    def read_pointers(self, layout: Layout) -> dict[str, bytes]:
        """Read the scanned pointers, for `upload_pointers` once their records are remote."""
        names = [os.path.basename(entry.path) for entry in layout.pointers]
        found = {name: self._read(name) for name in names}
        return {name: data for name, data in found.items() if data is not None}

    def upload_pointers(self, pointers: Mapping[str, bytes]) -> None:
        """Upload the pointers that have moved to a record that is remote."""
        for name, data in pointers.items():
            if self._pointers.get(name) != data and self._target(name, data) in self._remote_records:
                storage.write_bytes(storage.join(self._remote, name), data, guard=self._guard)
                self._pointers[name] = data

    def _target(self, name: str, data: bytes) -> str | None:
        try:
            return pointer_from_bytes(data, name.removesuffix(".json"))[0]
        except CheckpointError as error:
            logger.warning("a pointer is not mirrored: %s", error)
            return None

    def delete_pruned(self, layout: Layout) -> None:
        """Only what this mirror has seen here and is here no more; never the last record, nor one that a
        remote pointer names still."""
        present = {os.path.basename(entry.path) for entry in layout.pointers}
        for name in sorted(self._seen_pointers - present):
            storage.delete(storage.join(self._remote, name), guard=self._guard)
            self._seen_pointers.discard(name)
            self._pointers.pop(name, None)
        pointed = {self._target(name, data) for name, data in self._pointers.items()}
        gone = (self._seen_records & self._remote_records) - set(layout.records) - pointed
        if not self._remote_records - gone:
            return
        for name in sorted(gone):
            storage.delete(storage.join(self._remote, "records", f"{name}.json"), guard=self._guard)
            storage.delete(storage.join(self._remote, "data", name), recursive=True, guard=self._guard)
            self._remote_records.discard(name)
            self._seen_records.discard(name)

    def _upload_one(self, name: str, record: bytes, payload: dict[str, str]) -> None:
        for file_name, path in payload.items():
            storage.put_file(path, storage.join(self._remote, "data", name, file_name), guard=self._guard)
        url = storage.join(self._remote, "records", f"{name}.json")
        storage.write_bytes(url, record, guard=self._guard)
        self._remote_records.add(name)
        self._note(committed={"record": name, "at": datetime.now(UTC).isoformat()})

    @contextlib.contextmanager
    def _staged(self, name: str) -> Iterator[tuple[bytes, dict[str, str]] | None]:
        """Return the record's bytes and hard links to its payload, safe from a prune; None if it cannot be had."""
        folder = os.path.join(self._staging, name)
        try:
            yield self._stage(name, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _stage(self, name: str, folder: str) -> tuple[bytes, dict[str, str]] | None:
        data = self._read("records", f"{name}.json")
        if data is None:
            return None
        paths = {}
        try:
            os.makedirs(folder, exist_ok=True)
            for file in Record.from_bytes(data, name).files:
                paths[file.name] = os.path.join(folder, file.name)
                _link_or_copy(os.path.join(self._local, "data", name, file.name), paths[file.name])
                if os.stat(paths[file.name]).st_size != file.size:
                    raise CheckpointError(f"{file.name} is not {file.size} bytes long")
        except (FileNotFoundError, CheckpointError) as error:
            logger.warning("checkpoint %s is not mirrored: %s", name, error)
            return None
        return data, paths

    def _read(self, *parts: str) -> bytes | None:
        try:
            with open(os.path.join(self._local, *parts), "rb") as file:
                return file.read()
        except FileNotFoundError:
            return None


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
