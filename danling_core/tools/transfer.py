"""Copies whole runs between project roots, local or remote: every committed file, checked after."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from danling_core import storage
from danling_core.checkpoints.store import CheckpointStore
from danling_core.errors import ConfigError, NotFound, RunBusy, StorageError
from danling_core.mirror.layout import Layout
from danling_core.mirror.segments import SegmentedFile
from danling_core.runs.folder import EVENTS, TIMESTAMP, RunFolder, find_checkpoints, read_log
from danling_core.runs.lease import Lease, current_owner, is_held
from danling_core.runs.lease_owner import Owner
from danling_core.runs.segments import is_segment, segments_by_file
from danling_core.tools.threads import map_threads

_FILES_AT_ONCE, _OWNERS_AT_ONCE = 8, 16

OnProgress = Callable[[int, int], None]
"""Called with bytes done and bytes in all, from any thread."""


@dataclass(frozen=True)
class Transfer:
    """Result of a copy.

    Args:
        target: the run's folder in its new place.
        files: how many files it has there, a log being one.
        size: in bytes.
        copied: bytes that had to be moved; the rest was there from an earlier try.
    """

    target: RunFolder
    files: int
    size: int
    copied: int


def dead_owners(folders: Sequence[RunFolder]) -> list[Owner | None]:
    """Return each run's owner if it gave no sign of life while watched for up to 30 s; None where it has no owner,
    or somebody who lives. For `copy_run`, which would watch one after the other."""

    def find(folder: RunFolder) -> Owner | None:
        owner = current_owner(folder.lease_parent_url)
        return None if owner is None or is_held(folder.lease_parent_url) else owner

    return map_threads(_OWNERS_AT_ONCE, find, folders)


def copy_run(
    source: RunFolder,
    root_url: str,
    progress: OnProgress = lambda done, total: None,
    *,
    dead_owner: Owner | None = None,
) -> Transfer:
    """Copy a run to `{root}/{name}-{id}/{timestamp}`, from where it can be read, resumed and copied back.

    The order is that of a mirror: a reader of the target never sees a record without its payload, or a
    complete run that lacks something. Interrupted, it goes on where it stopped when called again. Payloads
    are checked by their hashes on whichever side is local, all files by their sizes in a fresh listing.

    Args:
        source: a run without a living owner.
        root_url: the project root to copy it to, local or remote.
        progress: called as bytes are copied.
        dead_owner: an owner of the source who is known to be dead, unless it has beaten since.

    Raises:
        RunBusy: somebody writes to one of the two.
        ConfigError: the target is there and has gone on by itself.
        CheckpointCorrupt: a payload is not what was committed.
        StorageError: a file did not arrive whole, or a store fails.
    """
    owner = current_owner(source.lease_parent_url)
    if owner != dead_owner and is_held(source.lease_parent_url):
        raise RunBusy(f"{source.url} is being written by {owner}: wait for it")
    target = RunFolder(storage.join(root_url.rstrip("/") or "/", *_place(source)))
    if target == source:
        raise ConfigError(f"{source.url} is under {root_url} already")
    lease = Lease.acquire(target.lease_parent_url, f"copy of {source.url}")
    try:
        with lease.beating(), tempfile.TemporaryDirectory(prefix="danling-copy-") as scratch:
            return _Copy(source, target, lease, scratch, progress).run()
    finally:
        lease.release()


class _Copy:
    def __init__(
        self, source: RunFolder, target: RunFolder, lease: Lease, scratch: str, progress: OnProgress
    ) -> None:
        self._source = source
        self._target = target
        self._lease = lease
        self._scratch = scratch
        self._progress = progress
        self._checkpoints = _checkpoints_name(source)
        self._sizes = _sizes(source)
        self._there = _sizes(target)
        self._log_sizes = _log_sizes(self._sizes)
        self._done = self._copied = 0

    def run(self) -> Transfer:
        whole = [storage.Entry(path, size, 0.0) for path, size in self._sizes.items() if not is_segment(path)]
        layout = Layout.of(whole, self._checkpoints)
        self._log_sizes |= {entry.path: entry.size for entry in layout.appended}
        payloads = [entry for name in layout.records for entry in layout.data.get(name, [])]
        rest = [*layout.small, *layout.events]
        status = [layout.status] if layout.status else []
        phases = [payloads, list(layout.records.values()), layout.pointers, rest]
        files = [entry for phase in (*phases, status) for entry in phase]
        self._total = sum(entry.size for entry in files) + sum(self._log_sizes.values())
        self._check_target()
        self._check_payloads(self._source)
        for phase in phases:
            map_threads(_FILES_AT_ONCE, self._copy_file, phase)
        map_threads(_FILES_AT_ONCE, self._copy_log, sorted(self._log_sizes))
        map_threads(_FILES_AT_ONCE, self._copy_file, status)
        self._check_sizes(files)
        self._check_payloads(self._target)
        return Transfer(self._target, len(files) + len(self._log_sizes), self._total, self._copied)

    def _check_target(self) -> None:
        """Raise ConfigError unless the target's event log is a prefix of the source's."""
        try:
            known = read_log(self._target, EVENTS)
        except NotFound:
            return
        if not read_log(self._source, EVENTS).startswith(known):
            raise ConfigError(f"{self._target.url} has gone on by itself: remove it, or copy to another root")

    def _copy_file(self, entry: storage.Entry) -> None:
        is_payload = "/data/" in entry.path
        if not (is_payload and self._there.get(entry.path) == entry.size):  # payloads never change
            self._move(entry.path)
            self._copied += entry.size
        self._advance(entry.size)

    def _move(self, path: str) -> None:
        source, target = storage.join(self._source.url, path), storage.join(self._target.url, path)
        if storage.is_local(source):
            storage.put_file(storage.local_path(source), target, guard=self._lease.check)
        elif storage.is_local(target):
            self._lease.check()
            storage.get_file(source, storage.local_path(target))
        else:
            passing = os.path.join(self._scratch, path.replace("/", "_"))
            storage.get_file(source, passing)
            storage.put_file(passing, target, guard=self._lease.check)
            os.remove(passing)

    def _copy_log(self, name: str) -> None:
        if storage.is_local(self._target.url):
            data = read_log(self._source, name)
            storage.write_bytes(storage.join(self._target.url, name), data, guard=self._lease.check)
        else:
            parts = segments_by_file(self._there).get(name, [])
            log = (self._local_log(name), self._target.url, name, parts)
            SegmentedFile(*log, self._lease.check, self._lease.generation).upload(is_final=True)
        self._copied += self._log_sizes[name]
        self._advance(self._log_sizes[name])

    def _local_log(self, name: str) -> str:
        if storage.is_local(self._source.url):
            return storage.local_path(storage.join(self._source.url, name))
        path = os.path.join(self._scratch, name.replace("/", "_"))
        storage.write_bytes(path, read_log(self._source, name), is_durable=False)
        return path

    def _check_sizes(self, files: Iterable[storage.Entry]) -> None:
        found = _sizes(self._target)
        found |= _log_sizes(found)
        wanted = {entry.path: entry.size for entry in files} | self._log_sizes
        wrong = [path for path, size in wanted.items() if found.get(path, 0) != size]
        if wrong:
            raise StorageError(f"these did not arrive whole in {self._target.url}: {', '.join(wrong[:5])}")

    def _check_payloads(self, folder: RunFolder) -> None:
        if storage.is_local(folder.url):
            store = CheckpointStore(storage.join(folder.url, self._checkpoints))
            for record in store.records():
                store.verify(record)

    def _advance(self, count: int) -> None:
        self._done += count
        self._progress(self._done, self._total)


def _place(folder: RunFolder) -> tuple[str, str]:
    """Return `{name}-{id}` and timestamp: from the folder's own place, or, if it was put elsewhere, its status."""
    if TIMESTAMP.fullmatch(folder.timestamp):
        return storage.base_name(storage.parent(folder.url)), folder.timestamp
    status = folder.read_status()
    if status is None or not TIMESTAMP.fullmatch(status.timestamp):
        raise NotFound(f"{folder.url} holds no run: no status says what it is called")
    return f"{status.name}-{status.id}", status.timestamp


def _sizes(folder: RunFolder) -> dict[str, int]:
    return {entry.path: entry.size for entry in storage.list_tree(folder.url)}


def _log_sizes(sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the sizes of the logs that are stored in segments."""
    return {name: sum(part.size for part in parts) for name, parts in segments_by_file(sizes).items()}


def _checkpoints_name(folder: RunFolder) -> str:
    """Return the name of the run's folder of checkpoints."""
    url = find_checkpoints(folder)
    if storage.parent(url) != folder.url:
        raise ConfigError(
            f"{folder.url} keeps its checkpoints at {url} (checkpoint_dir), which would not be copied with it: "
            "copy both by hand"
        )
    return storage.base_name(url)
