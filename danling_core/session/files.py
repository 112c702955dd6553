"""The files of a run: events, results, status and checkpoints, written by rank 0 only."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from danling_core import storage
from danling_core.checkpoints.store import CheckpointStore
from danling_core.errors import CheckpointError, ConfigError, StorageError
from danling_core.runs.folder import RunFolder, Status
from danling_core.runs.lease import guard
from danling_core.session.context import RunContext
from danling_core.session.scratch import check_signature
from danling_core.storage.local import sync_file
from danling_core.writers import EventLog, Writer, Writers

if TYPE_CHECKING:
    from danling_core.checkpoints.record import Record
    from danling_core.checkpoints.saver import BackgroundSaver
    from danling_core.results.history import Results
    from danling_core.session.delivery import Delivery

logger = logging.getLogger("danling")

_STATUS_SECONDS = 1.0  # a durable write costs about 1 ms: too much for each epoch of 10 ms


class RunFiles:
    """Every guarded write to a run's folder. Rank 0 only; other ranks have `NoFiles`.

    Args:
        context: where to write, as which attempt.
        status: what is known of the run when it starts.
        checkpoint_dir: local folder of the checkpoints.
        keep_last: checkpoints kept beside those that a pointer names.
        is_given: the folder of checkpoints was named by hand, and may be another run's.
        writers: receive every event after the event log; their maker closes them, after the upload.
        delivery: brings the folder to its store, where it has one; closed with the rest.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        context: RunContext,
        status: Status,
        *,
        checkpoint_dir: str,
        keep_last: int,
        is_given: bool,
        writers: list[Writer],
        delivery: Delivery | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = RunFolder(context.work_dir)
        self.context = context
        self.status = status
        from danling_core.checkpoints.saver import BackgroundSaver  # brings torch

        self._check_owner = _owner_check(context)
        self.store = CheckpointStore(checkpoint_dir, guard=self._check_writer)
        self._is_given = is_given
        self._saver: BackgroundSaver = BackgroundSaver(self.store, self._on_commit)
        self._keep_last = keep_last
        self._delivery = delivery
        self._lock = threading.RLock()  # the loop and the saver's thread emit, and both write the status
        self._clock = clock
        self._status_written_at, self._is_status_noted = float("-inf"), False
        self._event_log = EventLog(storage.local_path(self.folder.events_url), context.attempt)
        self._writers = Writers([self._event_log, *writers], context.attempt)
        self._closing = contextlib.ExitStack()
        self._closing.callback(self._close_writers, writers)
        self._closing.callback(self._saver.close)

    def add_writers(self, writers: list[Writer]) -> None:
        """Pass every event on to these, too, from now on."""
        with self._lock:
            self._writers.writers.extend(writers)

    def emit(self, kind: str, **fields: Any) -> None:
        """Append an event to the log, and pass it on to every writer. Any thread.

        Raises:
            Fenced: another owner has taken the run over.
        """
        self._check_owner()
        with self._lock:
            self._writers.emit(kind, **fields)
            self._write_noted_status()

    def write_results(self, results: Results, identity: dict[str, str]) -> None:
        """Replace results.json, latest.json and best.json. Raises `Fenced`."""
        files: dict[str, Any] = {self.folder.results_url: {"results": results.to_json()}}
        if results.latest_result is not None:
            files[self.folder.latest_url] = results.latest_result
        if results.best_result is not None:
            files[self.folder.best_url] = results.best_result
        for url, values in files.items():
            self._check_owner()  # before each: this process may be paused anywhere
            # not durable: after a loss of power they follow again from the checkpoint, which is
            storage.write_json(url, {**identity, **values}, is_durable=False)
        if self._delivery is not None:
            self._delivery.soon()
        self.check_delivery()

    def write_evaluation(self, evaluation: dict[str, Any], identity: dict[str, str]) -> None:
        """Replace evaluation.json. Raises `Fenced`."""
        self._check_owner()
        storage.write_json(self.folder.evaluation_url, {**identity, **evaluation})

    def write_status(self, **changes: Any) -> Status:
        """Replace status.json; `status="complete"` is the completion record and comes last. Raises `Fenced`."""
        self._check_owner()
        changes["updated_at"] = datetime.now(UTC).isoformat()
        with self._lock:
            self.status = self.status.model_copy(update=changes)
            self.folder.write_status(self.status)
            self._status_written_at, self._is_status_noted = self._clock(), False
            return self.status

    def note_status(self, **changes: Any) -> None:
        """Write a status that may wait, at most once a second: each write is durable. The rest is written by a later
        event. Raises `Fenced`."""
        with self._lock:
            self.status = self.status.model_copy(update=changes)
            self._is_status_noted = True
            self._write_noted_status()

    def _write_noted_status(self) -> None:
        if self._is_status_noted and self._clock() - self._status_written_at >= _STATUS_SECONDS:
            self.write_status()

    def save(self, state: dict[str, Any], **options: Any) -> None:
        """Snapshot a state and commit it in the background; see `BackgroundSaver.save`."""
        mine = {"run_id": self.status.run_id, "timestamp": self.status.timestamp}
        options["info"] = {**options["info"], **mine}
        self._saver.save(state, attempt=self.context.attempt, **options)

    def check_saves(self) -> None:
        """Raise the failure of an earlier save, once. Nearly free."""
        self._saver.check()

    def drain(self) -> None:
        """Wait until all saves are committed; raises as `check_saves`."""
        self._saver.drain()

    def request_delivery(self) -> None:
        """Ask for all that is here now to be brought to the store; `is_delivered` tells when."""
        if self._delivery is not None:
            self._delivery.request()

    def check_delivery(self) -> None:
        """Hold the run to its limits of running ahead of the store. Raises `Fenced`."""
        if self._delivery is not None:
            self._delivery.check()

    def is_delivered(self, timeout_seconds: float) -> bool:
        """Return whether the store has what `request_delivery` asked for, waiting up to `timeout_seconds`.

        Raises:
            Fenced: another process owns the run.
            StoreUnavailable: one mirror after the other ended; everything is in the local folder still.
        """
        return self._delivery is None or self._delivery.is_done(timeout_seconds)

    def _on_commit(self, record: Record, names: tuple[str, ...]) -> None:
        self.emit(
            "checkpoint_committed",
            record=record.name,
            names=list(names),
            step=record.step,
            epochs=record.info.get("epochs"),
        )
        self._prune()
        self.check_delivery()

    def _prune(self) -> None:
        try:
            self.store.prune(self._keep_last)
        except (CheckpointError, StorageError) as error:  # the commit counts; the next one prunes again
            logger.warning("old checkpoints stay for now: %s", error)

    def _check_writer(self) -> None:
        """Do what comes before a record or a pointer: check the right to write, and make the events so far durable."""
        self._check_owner()
        self._event_log.flush()
        self.check_store()

    def check_store(self) -> None:
        """Refuse a folder of checkpoints, named by hand or a link, that another run writes to: each would load and
        prune the other's. Raises `ConfigError`."""
        if not self._is_given and not os.path.islink(self.store.url):
            return
        mine = self.status.run_id, self.status.timestamp
        for record in self.store.records():
            found = record.info.get("run_id", mine[0]), record.info.get("timestamp", mine[1])
            if found != mine:
                raise ConfigError(
                    f"checkpoint_dir {self.store.url} holds checkpoints of run {found[0]} of {found[1]}, and this is "
                    f"{mine[0]} of {mine[1]}: leave checkpoint_dir out (or remove the link), or give each run its own, "
                    f"also each --fresh one, such as {self.store.url.rstrip('/')}-{self.status.timestamp}"
                )

    def flush(self) -> None:
        """Have everything that was written so far survive a loss of power."""
        self._writers.flush()
        for url in (self.folder.results_url, self.folder.latest_url, self.folder.best_url):
            with contextlib.suppress(FileNotFoundError):  # a run without results
                sync_file(storage.local_path(url))

    def close(self) -> None:
        """Wait for the last save and close every writer, also where one of these fails. A second call does
        nothing. What is left to deliver is for `is_over`."""
        self._closing.close()

    def _close_writers(self, others: list[Writer]) -> None:
        self._writers.writers = [writer for writer in self._writers.writers if writer not in others]
        self._writers.close()

    def is_over(self, timeout_seconds: float) -> bool:
        """Return whether the delivery has ended, waiting up to `timeout_seconds`; the first call has it end."""
        return self._delivery is None or self._delivery.is_over(timeout_seconds)

    def leave_delivery(self) -> None:
        """Have the delivery end, and wait for it no more."""
        self.is_over(0.0)
        self._delivery = None


def _owner_check(context: RunContext) -> Callable[[], None]:
    """Return the check that stands before every write.

    It raises `Fenced` where another process has taken the run over, and `StorageError` where the folder is gone:
    a write would make it again, without its checkpoints.

    It costs a stat and one listing of a small folder. A remote run is written by its mirror, which checks for
    itself; in its local folder, a later owner on this machine has signed.
    """
    check_lease: Callable[[], None] = (
        guard(RunFolder(context.url).lease_url, context.generation)
        if storage.is_local(context.url)
        else functools.partial(check_signature, context.work_dir, context.generation)
    )

    def check() -> None:
        if not os.path.isdir(context.work_dir):
            raise StorageError(
                f"the run's folder {context.work_dir} disappeared during the run, and its checkpoints with it: "
                "put it back, or start again with a fresh run"
            )
        check_lease()

    return check


class NoFiles:
    """The files of a rank that writes none, and of a run that is not open: every write does nothing."""

    status = None

    def emit(self, kind: str, **fields: Any) -> None: ...

    def write_results(self, results: Results, identity: dict[str, str]) -> None: ...

    def write_evaluation(self, evaluation: dict[str, Any], identity: dict[str, str]) -> None: ...

    def write_status(self, **changes: Any) -> None: ...

    def note_status(self, **changes: Any) -> None: ...

    def check_saves(self) -> None: ...

    def drain(self) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...

    def request_delivery(self) -> None: ...

    def check_delivery(self) -> None: ...

    def is_delivered(self, timeout_seconds: float) -> bool:
        return True

    def is_over(self, timeout_seconds: float) -> bool:
        return True

    def leave_delivery(self) -> None: ...
