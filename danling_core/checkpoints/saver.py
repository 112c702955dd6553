"""Saving in the background: the training loop pays for one memory copy, a thread does the rest."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from danling_core.checkpoints import codec
from danling_core.checkpoints.record import Record
from danling_core.checkpoints.snapshot import FlatState, Staging
from danling_core.checkpoints.store import CheckpointStore
from danling_core.errors import CheckpointError, DanLingError, StoreUnavailable

T = TypeVar("T")
OnCommit = Callable[[Record, tuple[str, ...]], None]
Inspect = Callable[[Any], None]
_WORTH_A_RETRY = {
    errno.EIO,
    errno.EINTR,
    errno.EAGAIN,
    errno.EBUSY,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ECONNRESET,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EHOSTUNREACH,
}


@dataclass(frozen=True)
class _Job:
    tree: Any
    size: int
    staging: Staging
    step: int
    attempt: str
    info: Mapping[str, Any]
    names: tuple[str, ...]
    is_required: bool
    inspect: Inspect | None


class BackgroundSaver:
    """Takes snapshots of a state and commits them to a store from one thread.

    `save`, `check`, `drain` and `close` are for the training thread of the rank that writes. At most two
    snapshots
    exist: one being written and one pending, so memory is bounded to twice the state (once, while saving
    keeps up). Their buffers stay, warm for the next save. A failure is raised by the next `save`, `check`,
    `drain` or `close`.

    Args:
        store: where to commit.
        on_commit: called in the background thread after each commit, with the record and its pointer names:
            the place for events and pruning. What it raises surfaces like a failed save.
        retry_pause_seconds: before the one retry of a failure that a retry may fix.
    """

    def __init__(
        self, store: CheckpointStore, on_commit: OnCommit | None = None, *, retry_pause_seconds: float = 1.0
    ) -> None:
        self.last_stall_seconds = 0.0
        """How long the last `save` kept the caller."""
        self.superseded = 0
        """Periodic saves that were given up for a newer one, or because required ones were waiting."""
        self._store = store
        self._on_commit = on_commit
        self._pause = retry_pause_seconds
        self._free = [Staging(), Staging()]
        self._pending: _Job | None = None
        self._is_writing = False
        self._is_closing = False
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def staging_bytes(self) -> int:
        """Host memory held by free staging buffers; all there are once drained."""
        return sum(staging.size for staging in self._free)

    def save(
        self,
        state: Mapping[str, Any],
        *,
        step: int,
        attempt: str,
        info: Mapping[str, Any],
        names: Sequence[str] = ("latest",),
        required: bool = False,
        inspect: Inspect | None = None,
    ) -> bool:
        """Snapshot `state` and commit it in the background. Returns as soon as the state may change again.

        A periodic save gives way to a newer one that comes before it is written. A required one, or one with
        a pointer other than `latest`, never does: if two are waiting already, this call waits.

        Args:
            inspect: given the snapshot in the background, before anything of it is written; what it raises
                surfaces like a failed save.

        Returns:
            False if this (periodic) save was left out because a required one is still waiting.

        Raises:
            CheckpointError: the state has something that cannot be saved, or an earlier save failed.
        """
        self.check()
        began = time.perf_counter()
        is_required = required or bool(set(names) - {"latest"})
        flat = FlatState.of(state)
        staging = self._claim(is_required)
        if staging is not None:
            try:
                tree = staging.copy(flat)
            except BaseException:
                self._give_back(staging)
                raise
            labels = step, attempt, deepcopy(dict(info)), tuple(names)
            self._submit(_Job(tree, flat.size, staging, *labels, is_required, inspect))
        self.last_stall_seconds = time.perf_counter() - began
        return staging is not None

    def check(self) -> None:
        """Raise the failure of a save in the background, once. Nearly free: call it at every step."""
        if self._failure is None:
            return
        with self._changed:
            failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def drain(self) -> None:
        """Wait until everything accepted is committed, then `check`."""
        with self._changed:
            self._changed.wait_for(self._is_idle)
        self.check()

    def close(self) -> None:
        """Drain, stop the thread and free the buffers. Harmless when closed already."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._free = [Staging(), Staging()]
        self.check()

    def __enter__(self) -> BackgroundSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"besides, saving a checkpoint failed: {failure!r}")

    # The training thread's side

    def _claim(self, is_required: bool) -> Staging | None:
        """Return buffers for a new snapshot; None if it must give way."""
        with self._changed:
            while True:
                if self._is_closing:
                    raise CheckpointError("this saver is closed: nothing more can be saved with it")
                if self._pending is None:
                    return self._free.pop()
                if not self._pending.is_required:
                    superseded, self._pending = self._pending, None
                    self.superseded += 1
                    return superseded.staging
                if not is_required:
                    self.superseded += 1
                    return None
                self._changed.wait()

    def _submit(self, job: _Job) -> None:
        with self._changed:
            self._pending = job
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="checkpoint-saver", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def _give_back(self, staging: Staging) -> None:
        with self._changed:
            self._free.append(staging)
            self._changed.notify_all()

    def _is_idle(self) -> bool:
        return self._pending is None and not self._is_writing

    # The background thread's side

    def _run(self) -> None:
        while (job := self._next()) is not None:
            try:
                self._write(job)
            except BaseException as error:
                self._fail(job, error)
            with self._changed:
                self._is_writing = False
                self._free.append(job.staging)
                self._changed.notify_all()

    def _next(self) -> _Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._pending is not None or self._is_closing)
            job, self._pending = self._pending, None
            self._is_writing = job is not None
            self._changed.notify_all()  # a save may be waiting for the place of the pending one
            return job

    def _write(self, job: _Job) -> None:
        job.staging.wait()
        if job.inspect is not None:
            job.inspect(job.tree)
        record = self._with_one_retry(
            lambda: self._store.publish(
                lambda file: codec.write(job.tree, file),
                step=job.step,
                attempt=job.attempt,
                info=job.info,
                names=job.names,
                expected_bytes=job.size,
            )
        )
        self._with_one_retry(lambda: self._store.repoint(record))
        if self._on_commit is not None:
            self._on_commit(record, job.names)

    def _with_one_retry(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except (CheckpointError, StoreUnavailable) as error:
            if not _may_pass(error):
                raise
            time.sleep(self._pause)
        return action()

    def _fail(self, job: _Job, error: BaseException) -> None:
        if not isinstance(error, DanLingError):
            wrapped = CheckpointError(f"saving the checkpoint of step {job.step} failed: {error!r}")
            wrapped.__cause__ = error
            error = wrapped
        with self._changed:
            if self._failure is None:
                self._failure = error
            else:
                self._failure.add_note(f"after it, step {job.step} failed too: {error}")


def _may_pass(error: DanLingError) -> bool:
    """Return whether trying again may help: not for a full or read-only disk, a refusal, or a bad state."""
    cause = error.__cause__
    return isinstance(error, StoreUnavailable) or (
        isinstance(cause, OSError) and cause.errno in _WORTH_A_RETRY
    )
