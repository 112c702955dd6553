"""One pass of the mirror: what is local and not remote goes up, in the order that readers rely on."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from danling_core import storage
from danling_core.errors import StorageError
from danling_core.mirror.checkpoints import CheckpointUploader
from danling_core.mirror.layout import STAGING, STATE_FILE, Layout
from danling_core.mirror.segments import SegmentedFile
from danling_core.runs.folder import BEST, CHECKPOINTS, EVALUATION, LATEST, RESULTS, STATUS, RunFolder
from danling_core.runs.segments import Segment, segments_by_file

logger = logging.getLogger("danling")

_WHOLE_IN_MEMORY_BYTES = 4 << 20
_UNREADABLE = (errno.EACCES, errno.EPERM, errno.EIO, errno.EISDIR, errno.EINVAL)
_TOLD_BY_CONTENT = (STATUS, RESULTS, LATEST, BEST, EVALUATION)
"""Small, and an older one of the same size may say something else."""


class Uploader:
    """Knows what is remote, and brings up the rest.

    Order within a pass: payloads, their commit record, pointers, logs and small files, `status.json` as it
    was when the pass began. So a remote reader never sees a record without its payload, nor a complete run
    that lacks something. What was pruned locally is then deleted remotely: pointer, record, payload.

    Args:
        local: the working folder; only rank 0 and the launcher write there.
        remote: URL of the run folder.
        guard: called before every request that writes; raises `Fenced` if another process owns the run now.
        generation: of the owner's lease.
        checkpoints: the name of the checkpoints' folder.
        tensorboard_seconds: at least so long between two uploads of a TensorBoard file.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        local: str,
        remote: str,
        guard: Callable[[], None],
        *,
        generation: int = 1,
        checkpoints: str = CHECKPOINTS,
        tensorboard_seconds: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._local = storage.local_path(local)
        self._remote = remote
        self._guard = guard
        self._generation = generation
        self._checkpoints = checkpoints
        self._tensorboard_seconds = tensorboard_seconds
        self._clock = clock
        self._signatures: dict[str, tuple[int, int]] = {}
        self._checkpoint_uploader = CheckpointUploader(
            os.path.join(self._local, checkpoints),
            storage.join(remote, checkpoints),
            os.path.join(self._local, STAGING),
            guard,
            self._note,
        )
        self._segmented: dict[str, SegmentedFile] = {}
        self._segments: dict[str, list[Segment]] = {}
        self._tensorboard_at: float | None = None
        self._is_started = False
        self._state: dict[str, Any] = {
            "synced_at": None,
            "pending_bytes": 0,
            "committed": None,
            "error": None,
            "unreadable": {},
        }

    def run_pass(self, is_final: bool = False, is_full: bool = True) -> None:
        """Everything that was there when this was called is remote when it returns.

        Args:
            is_final: the run is over: unfinished last lines are uploaded too, and what the store has in the
                end is compared with what was sent.
            is_full: TensorBoard files too, however recent their last upload.

        Raises:
            Fenced: another process owns the run; nothing was written after that was known.
            StorageError: the store failed; the next pass goes on from there.
        """
        self._start()
        self._bring_up(is_final, is_full)
        if is_final and self._forget_what_differs():
            self._bring_up(is_final, is_full)
        if is_final or is_full:  # who waits for this pass must hear if the last write came after a takeover
            self._guard()
        self._note(
            synced_at=datetime.now(UTC).isoformat(),
            pending_bytes=self.pending_bytes(self._scan()),
            error=None,
        )

    def _bring_up(self, is_final: bool, is_full: bool) -> None:
        status = self._read_local(STATUS)
        pointers = self._checkpoint_uploader.read_pointers(self._scan())
        layout = self._scan()  # after: it has every record that a pointer names
        self._note(pending_bytes=self.pending_bytes(layout))
        self._checkpoint_uploader.upload(layout)
        layout = self._scan()
        self._checkpoint_uploader.upload_pointers(pointers)
        for entry in layout.appended:
            self._upload_segments(entry.path, is_final)
        for entry in layout.small:
            self._upload_whole(entry.path)
        if is_full or is_final or self._tensorboard_is_due():
            for entry in layout.events:
                self._upload_whole(entry.path)
            self._tensorboard_at = self._clock()
        if status is not None:
            self._write_if_changed(STATUS, status)
        self._checkpoint_uploader.delete_pruned(layout)

    def _forget_what_differs(self) -> bool:
        """Return whether something remote is not what was sent: a request that was held up on the way came after a
        later one. It is sent again next time."""
        found = {entry.path: entry.size for entry in storage.list_tree(self._remote)}
        wrong = {path for path, (_, size) in self._signatures.items() if found.get(path) != size}
        known = [path for path in _TOLD_BY_CONTENT if path in self._signatures]
        contents = storage.read_many([storage.join(self._remote, path) for path in known])
        wrong |= {path for path, data in zip(known, contents, strict=True) if data != self._read_local(path)}
        for path in wrong:
            del self._signatures[path]
        segments = segments_by_file(found)
        torn = [n for n, f in self._segmented.items() if not f.consists_of(segments.get(n, []))]
        for name in torn:
            self._segmented[name].remove()
        moved = self._checkpoint_uploader.forget_what_differs(self._remote_layout(found).records)
        if differing := [*sorted(wrong), *torn, *moved]:
            logger.warning("these were replaced in the store and are sent again: %s", ", ".join(differing))
        return bool(differing)

    def pending_bytes(self, layout: Layout) -> int:
        """Return the bytes of the working folder that are not remote yet; small files are not counted."""
        uploaded = {name: file.uploaded_bytes for name, file in self._segmented.items()}
        logs = sum(max(0, each.size - uploaded.get(each.path, 0)) for each in layout.appended)
        return self._checkpoint_uploader.pending_bytes(layout) + logs

    def make_room(self) -> None:
        """Delete the local payloads of a run that is complete, once the last pass is done: the store has them."""
        status = RunFolder(self._local).find_status()
        if status is not None and status.is_complete:
            shutil.rmtree(os.path.join(self._local, self._checkpoints, "data"), ignore_errors=True)

    def note_error(self, error: BaseException | None) -> None:
        """Put a failure into `mirror.json`, where the run's owner sees it."""
        self._note(error=None if error is None else f"{type(error).__name__}: {error}")

    def _start(self) -> None:
        if self._is_started:
            return
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(os.path.join(self._local, STAGING))
        self._guard()
        sizes = {entry.path: entry.size for entry in storage.list_tree(self._remote)}
        self._checkpoint_uploader.start(self._remote_layout(sizes).records)
        self._segments = segments_by_file(sizes)
        self._is_started = True

    def _remote_layout(self, sizes: Mapping[str, int]) -> Layout:
        entries = (storage.Entry(path, size, 0.0) for path, size in sizes.items())
        return Layout.of(entries, self._checkpoints)

    def _scan(self) -> Layout:
        entries = storage.list_tree(self._local, unreadable=self._tell_unreadable)
        layout = Layout.of(entries, self._checkpoints)
        self._checkpoint_uploader.see(layout)
        return layout

    def _upload_segments(self, path: str, is_final: bool) -> None:
        if path not in self._segmented:
            local = os.path.join(self._local, path)
            known = self._segments.get(path, [])
            self._segmented[path] = SegmentedFile(
                local, self._remote, path, known, self._guard, self._generation
            )
        with self._passing_over(path):
            self._segmented[path].upload(is_final)

    def _upload_whole(self, path: str) -> None:
        """Replace a remote file whose local one has changed, by a snapshot: it may be growing."""
        local = os.path.join(self._local, path)
        with self._passing_over(path):
            stat = os.stat(local)
            signature = (stat.st_mtime_ns, stat.st_size)
            if self._signatures.get(path) == signature:
                return
            if stat.st_size <= _WHOLE_IN_MEMORY_BYTES:
                with open(local, "rb") as file:
                    data = file.read()
                storage.write_bytes(storage.join(self._remote, path), data, guard=self._guard)
            else:
                self._put_snapshot(path)
            self._signatures[path] = signature

    @contextlib.contextmanager
    def _passing_over(self, path: str) -> Iterator[None]:
        """Go on without a file that is gone already or cannot be read; log the latter once."""
        try:
            yield
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno not in _UNREADABLE:
                raise
            self._tell_unreadable(path, error)

    def _tell_unreadable(self, path: str, error: OSError) -> None:
        if path not in self._state["unreadable"]:
            logger.warning("%s is not mirrored: %s", path, error)
            self._note(unreadable={**self._state["unreadable"], path: str(error)})

    def _put_snapshot(self, path: str) -> None:
        snapshot = os.path.join(self._local, STAGING, "snapshot")
        os.makedirs(os.path.dirname(snapshot), exist_ok=True)
        try:
            shutil.copyfile(os.path.join(self._local, path), snapshot)
            storage.put_file(snapshot, storage.join(self._remote, path), guard=self._guard)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(snapshot)

    def _write_if_changed(self, path: str, data: bytes) -> None:
        signature = (hash(data), len(data))
        if self._signatures.get(path) != signature:
            storage.write_bytes(storage.join(self._remote, path), data, guard=self._guard)
            self._signatures[path] = signature

    def _tensorboard_is_due(self) -> bool:
        last = self._tensorboard_at
        return last is None or self._clock() - last >= self._tensorboard_seconds

    def _read_local(self, *parts: str) -> bytes | None:
        try:
            with open(os.path.join(self._local, *parts), "rb") as file:
                return file.read()
        except FileNotFoundError:
            return None

    def _note(self, **facts: Any) -> None:
        self._state = {**self._state, **facts}
        text = json.dumps(self._state, indent=1) + "\n"
        try:
            storage.write_bytes(os.path.join(self._local, STATE_FILE), text.encode(), is_durable=False)
        except StorageError as error:  # a full disk is no reason not to bring up what is on it
            logger.warning("the state of the mirror is not written down: %s", error)
