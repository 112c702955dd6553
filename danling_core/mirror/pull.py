"""Brings what a resume needs from a remote run folder to a local working folder."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Mapping

from danling_core import storage
from danling_core.checkpoints.ledger import BadCheckpoint, all_damaged
from danling_core.checkpoints.record import Record
from danling_core.checkpoints.store import CheckpointStore
from danling_core.errors import CheckpointError, NotFound
from danling_core.mirror.layout import STAGING, Layout
from danling_core.runs.folder import (
    BEST,
    CHECKPOINTS,
    CONFIG,
    EVALUATION,
    EVENTS,
    LATEST,
    METADATA,
    RESULTS,
    STATUS,
    RunFolder,
    read_log,
)
from danling_core.runs.segments import is_segment, segments_by_file

logger = logging.getLogger("danling")

_SMALL_FILES = (CONFIG, METADATA, STATUS, RESULTS, LATEST, BEST, EVALUATION)
_WRITTEN_BY_THE_DRIVER = (CONFIG, METADATA)


def pull_small_files(folder: RunFolder, work_dir: str) -> None:
    """Fetch the few small files that say how a run went, in place of local ones: for a run that is complete."""
    _fetch_all(folder, work_dir, _SMALL_FILES)


def pull(folder: RunFolder, work_dir: str, checkpoints: str = CHECKPOINTS) -> None:
    """Return small files, logs, all commit records, and the payloads of the newest good checkpoint and of `best`.

    What the working folder holds already is kept where it continues what is remote (a resume on the same
    machine, which may be ahead of the store), and removed where another machine has written to the run since.
    The caller holds the run's lease.

    Args:
        folder: the remote run folder; may be empty.
        work_dir: the local working folder.
        checkpoints: the name of the checkpoints' folder.
    """
    if not _continues(folder, work_dir):
        logger.warning("%s has gone on elsewhere: the working copy in %s is replaced", folder.url, work_dir)
        _empty(work_dir)
    remote = storage.list_tree(folder.url)
    layout = Layout.of((entry for entry in remote if not is_segment(entry.path)), checkpoints)
    wanted = [entry.path for entry in (*layout.small, *([layout.status] if layout.status else []))]
    missing = [path for path in wanted if not os.path.exists(os.path.join(work_dir, path))]
    _fetch_all(folder, work_dir, {*missing, *(path for path in wanted if path in _WRITTEN_BY_THE_DRIVER)})
    _pull_logs(folder, work_dir, {entry.path: entry.size for entry in remote})
    if layout.records:
        pull_checkpoints(
            storage.join(folder.url, checkpoints),
            os.path.join(work_dir, checkpoints),
            os.path.join(work_dir, STAGING),
        )


def pull_checkpoints(url: str, local: str, scratch: str) -> None:
    """Commit records, pointers, and the payloads of the newest good checkpoint and of `best`, verified.

    Args:
        url: the remote checkpoint store.
        local: the folder of the local one. What it has already stays.
        scratch: a folder on the same disk, for downloads under way.

    Raises:
        CheckpointError: there are checkpoints, and every one is damaged.
    """
    os.makedirs(scratch, exist_ok=True)
    source, target = CheckpointStore(url, scratch=scratch), CheckpointStore(local)
    records, bad = source.survey()
    newest = _first_good(source, target, records, bad)
    if newest is None and bad:
        raise all_damaged(url, bad)
    pointed = source.pointers()
    if "best" in pointed and pointed["best"] != newest:
        _fetch_payload(source, target, pointed["best"])
    unusable = {each.name for each in bad}
    names = [f"records/{record.name}.json" for record in records if record.name not in unusable]
    names += [f"{name}.json" for name, record in pointed.items() if record.name not in unusable]
    _fetch_all(
        RunFolder(url), local, [name for name in names if not os.path.exists(os.path.join(local, name))]
    )


def _first_good(
    source: CheckpointStore, target: CheckpointStore, records: Iterable[Record], bad: list[BadCheckpoint]
) -> Record | None:
    """Return the newest whose payload is in the local store then; those that are passed over go into `bad`."""
    for record in records:
        reason = _fetch_payload(source, target, record)
        if reason is None:
            return record
        bad.append(BadCheckpoint(record.name, reason))
    return None


def _fetch_payload(source: CheckpointStore, target: CheckpointStore, record: Record) -> str | None:
    """Bring the verified payload into the local store; return why it could not."""
    folder = os.path.join(storage.local_path(target.url), "data", record.name)
    try:
        target.verify(record)
        return None
    except CheckpointError:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        downloaded = source.open(record)
        os.makedirs(folder, exist_ok=True)
        os.replace(downloaded, os.path.join(folder, record.files[0].name))
        source.release(record)
    except CheckpointError as error:
        logger.warning("passing over a remote checkpoint: %s", error)
        return str(error)
    return None


def _continues(folder: RunFolder, work_dir: str) -> bool:
    """Return whether the local events begin with the remote ones, so that no other owner has written in between."""
    try:
        with open(os.path.join(work_dir, EVENTS), "rb") as file:
            local = file.read()
    except FileNotFoundError:
        return not os.path.exists(os.path.join(work_dir, STATUS))
    try:
        return local.startswith(read_log(folder, EVENTS))
    except NotFound:
        return True


def _pull_logs(folder: RunFolder, work_dir: str, sizes: Mapping[str, int]) -> None:
    for name, segments in segments_by_file(sizes).items():
        path = os.path.join(work_dir, name)
        if os.path.exists(path) and os.path.getsize(path) >= sum(segment.size for segment in segments):
            continue
        storage.write_bytes(path, read_log(folder, name), is_durable=False)


def _fetch_all(folder: RunFolder, local: str, names: Iterable[str]) -> None:
    wanted = sorted(names)
    contents = storage.read_many([storage.join(folder.url, name) for name in wanted])
    for name, data in zip(wanted, contents, strict=True):
        if data is not None:
            storage.write_bytes(os.path.join(local, name), data, is_durable=False)


def _empty(work_dir: str) -> None:
    for name in os.listdir(work_dir):
        path = os.path.join(work_dir, name)
        shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.remove(path)
