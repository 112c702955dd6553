"""The mirror's part for checkpoints: payload, then record, then pointer; and prunes in the reverse order."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

from .. import storage
from ..checkpoints.record import Record, pointer_from_bytes
from ..errors import CheckpointError
from .layout import Layout

logger = logging.getLogger("danling")


class CheckpointUploader:
    """Brings up the committed checkpoints of a local store, and deletes remotely what was pruned locally.

    Args:
        local: the local store's folder.
        remote: URL of the remote store.
        staging: a folder on the same disk, for hard links to payloads under way.
        guard: called before every write; raises `Fenced` if another process owns the run now.
        note: told `committed={"record": ..., "at": ...}` when a checkpoint is remote.
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
        """Told once which records are remote already."""
        self._remote_records = set(remote_records)

    def see(self, layout: Layout) -> None:
        """Told of every scan, so as to know later what was pruned."""
        self._seen_records |= set(layout.records)
        self._seen_pointers |= {os.path.basename(entry.path) for entry in layout.pointers}

    def pending_bytes(self, layout: Layout) -> int:
        """Payloads of committed checkpoints that are not remote yet."""
        waiting = set(layout.records) - self._remote_records
        return sum(entry.size for name in waiting for entry in layout.data.get(name, []))

    def upload(self, layout: Layout, scan: Callable[[], Layout]) -> None:
        """Newest first; looks again after each, since training goes on and prunes meanwhile."""
        passed_over: set[str] = set()
        while waiting := sorted(set(layout.records) - self._remote_records - passed_over, reverse=True):
            with self._staged(waiting[0]) as staged:
                if staged is None:
                    passed_over.add(waiting[0])
                else:
                    self._upload_one(waiting[0], *staged)
            layout = scan()

    def upload_pointers(self, layout: Layout) -> None:
        """Those that have moved, to a record that is remote."""
        for name in (os.path.basename(entry.path) for entry in layout.pointers):
            data = self._read(name)
            if data is None or self._pointers.get(name) == data:
                continue
            try:
                target, _ = pointer_from_bytes(data, name)
            except CheckpointError as error:
                logger.warning("a pointer is not mirrored: %s", error)
                continue
            if target in self._remote_records:
                self._guard()
                storage.write_bytes(storage.join(self._remote, name), data)
                self._pointers[name] = data

    def delete_pruned(self, layout: Layout) -> None:
        """Only what this mirror has seen here and is here no more; never the last record."""
        present = {os.path.basename(entry.path) for entry in layout.pointers}
        for name in sorted(self._seen_pointers - present):
            self._guard()
            storage.delete(storage.join(self._remote, name))
            self._seen_pointers.discard(name)
            self._pointers.pop(name, None)
        gone = (self._seen_records & self._remote_records) - set(layout.records)
        if not self._remote_records - gone:
            return
        for name in sorted(gone):
            self._guard()
            storage.delete(storage.join(self._remote, "records", f"{name}.json"))
            storage.delete(storage.join(self._remote, "data", name), recursive=True)
            self._remote_records.discard(name)
            self._seen_records.discard(name)

    def _upload_one(self, name: str, record: bytes, payload: dict[str, str]) -> None:
        for file_name, path in payload.items():
            self._guard()
            storage.put_file(path, storage.join(self._remote, "data", name, file_name))
        self._guard()
        storage.write_bytes(storage.join(self._remote, "records", f"{name}.json"), record)
        self._remote_records.add(name)
        self._note(committed={"record": name, "at": datetime.now(UTC).isoformat()})

    @contextlib.contextmanager
    def _staged(self, name: str) -> Iterator[tuple[bytes, dict[str, str]] | None]:
        """The record's bytes and hard links to its payload, safe from a prune; None if it cannot be had."""
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
