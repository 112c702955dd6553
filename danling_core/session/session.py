"""One opening of a run, on every rank: from claiming its folder to the last word about how it ended."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from danling_core import storage
from danling_core.config import Config
from danling_core.errors import ConfigError, DanLingError, RunInterrupted
from danling_core.results.history import Results
from danling_core.runs.folder import RunFolder, Status
from danling_core.secrets import redact
from danling_core.session import writers
from danling_core.session.context import RunContext
from danling_core.session.files import NoFiles, RunFiles
from danling_core.session.place import RunPlace
from danling_core.session.rank_failures import failure_of
from danling_core.writers import TensorBoardWriter, TextLog
from danling_core.writers.services import Service

if TYPE_CHECKING:
    from danling_core.parallel.ranks import Ranks
    from danling_core.train.limits import Limits
    from danling_core.train.progress import Progress

logger = logging.getLogger("danling")
_UPLOAD_TURN_SECONDS = 2.0


class Stop(Protocol):
    """The ranks' agreement to stop, as far as a session needs it; see `parallel.stopping.Stopping`."""

    reason: str

    @property
    def requested(self) -> bool: ...

    def wish(self, reason: str) -> None: ...


class RunSession:
    """Claims the run, opens its files and writers, and records how it ended. Nested calls share one opening.

    Args:
        config, place: of the run.
        ranks: all of them take part in every method that is called collective.
        progress, history, limits: what the status reports.
        emit, open_log, close: the runner's own methods, which a user may override.
        stop: returns the agreement to stop as it is now.
    """

    def __init__(
        self,
        config: Config,
        place: RunPlace,
        ranks: Ranks,
        *,
        progress: Progress,
        history: Results,
        limits: Limits,
        emit: Callable[..., None],
        open_log: Callable[[], None],
        close: Callable[[], None],
        stop: Callable[[], Stop],
    ) -> None:
        self.files: RunFiles | NoFiles = NoFiles()
        self.writer: Any = None
        """The TensorBoard writer, or None."""
        self.services: Sequence[Service] = ()
        self.is_open = False
        self.owns_run = place.context is None
        """Whether `train` ends the run, since no worker does."""
        self.steps_at_start = 0
        """Completed before this opening, what it resumed included."""
        self._config = config
        self._place = place
        self._ranks = ranks
        self._progress = progress
        self._history = history
        self._limits = limits
        self._emit = emit
        self._open_log = open_log
        self._close = close
        self._stop = stop
        self._board: TensorBoardWriter | None = None
        self._log: TextLog | None = None
        self._heard_rank = 0
        self._status_before: Status | None = None
        self._closing = contextlib.ExitStack()

    # opening ------------------------------------------------------------------------------------------------
    def claim(self) -> None:
        """Find or create the run's folder, unless a worker has done so. Collective."""
        if self._place.context is None:
            self._place.context = self._claim()
        self.steps_at_start = self._progress.steps

    def _claim(self) -> RunContext:
        from danling_core.session.open_run import open_run

        claimed, config, place = None, self._config, self._place
        if self._ranks.is_main_process:
            storage.configure(config.storage_options)  # a runner that works alone has the process
            opened = open_run(
                config, place.identity, source_file=place.source_file, timestamp=place.created_at
            )
            if opened.lease is not None:
                self._closing.callback(opened.lease.release)
                beating = opened.lease.beating(
                    on_stop=lambda request: self._stop().wish(f"stopped by {request.by}")
                )
                self._closing.enter_context(beating)
            claimed = RunContext(opened.work_dir, opened.folder.url, opened.generation)
        context: RunContext = self._ranks.broadcast(claimed)
        return context

    def open_log(self) -> None:
        """Open the text log of this rank."""
        self._log = writers.open_text_log(self._config, self._place, self._ranks)
        self._log.process = self._heard_rank
        if self._ranks.is_main_process and self._place.context is not None:  # before the lease is released
            self._closing.callback(writers.store_text_log, self._config, self._place)

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Let what is logged inside the block reach the console, also where no log is open."""
        with TextLog(rank=self._ranks.rank) if self._log is None else contextlib.nullcontext():
            yield

    def hear(self, rank: int) -> None:
        """Let only this rank speak through the logger."""
        self._heard_rank = rank
        if self._log is not None:
            self._log.process = rank

    def open(self) -> None:
        """Open the files on rank 0, and say in the status that the run is running. Collective."""
        place, is_main = self._place, self._ranks.is_main_process
        previous = RunFolder(place.work_dir).find_status() if is_main else None
        place.created_at = self._ranks.broadcast(place.created_at if previous is None else previous.timestamp)
        if not is_main:
            return
        context = place.context
        assert context is not None
        if previous is not None and previous.is_complete and not (place.is_local or context.is_launched):
            from danling_core.session.open_run import bring_checkpoints

            bring_checkpoints(context.url, context.work_dir, self._config)
        self.files = RunFiles(
            context,
            previous or self._first_status(),
            checkpoint_dir=place.local_checkpoint_dir,
            keep_last=self._config.keep_last,
            is_given=self._config.checkpoint_dir is not None,
            writers=[log for log in [self._log] if log is not None],
            delivery=self._start_upload(context),
        )
        self._status_before = previous
        if not self.files.status.is_complete:
            self.files.write_status(
                status="running", attempt=context.attempt, world_size=self._ranks.world_size, error=None
            )

    def _start_upload(self, context: RunContext) -> Any:
        """Start the mirror. None for a local run, or a complete one without a lease."""
        if self._place.is_local or context.generation == 0:
            return None
        from danling_core.mirror.process import MirrorProcess
        from danling_core.session.delivery import Delivery

        config = self._config
        start = functools.partial(
            MirrorProcess,
            context.work_dir,
            context.url,
            lease_url=RunFolder(context.url).lease_url,
            generation=context.generation,
            storage_options=config.storage_options,
            checkpoints=config.checkpoint_dir_name,
            interval_seconds=config.upload_interval_seconds,
        )
        return Delivery(start, context.work_dir, config, lambda reason: self._stop().wish(reason))

    def open_writers(self) -> None:
        """Open curves, services and the progress bar, from where a resume stands. Rank 0; others return."""
        files, config, place = self.files, self._config, self._place
        if not isinstance(files, RunFiles):
            return
        board = writers.open_tensorboard(config, place, self._history.latest_index, self._progress.steps)
        if not files.status.is_complete:  # services of a complete run have everything
            self.services = writers.open_services(config, place)
        opened: list[Any] = []
        if board is not None:
            self.writer, self._board, opened = board.summary, board, [board]
        files.add_writers([*opened, *self.services, *writers.open_progress_bar(config, place, self._limits)])

    def writer_of(self, split: str) -> Any:
        """Return the TensorBoard writer for the curves `{split}/...`: another one where these are over steps."""
        if self.writer is not None and self._board is not None and split.endswith("_steps"):
            return self._board.steps
        return self.writer

    @property
    def work_dir(self) -> str:
        """Return the local folder that ranks write to; the run's own where it is local. Once the run is claimed."""
        return self._place.work_dir

    @property
    def attempt(self) -> str:
        """Generation and restart of this opening: "1.0" at first."""
        return self._place.context.attempt if self._place.context is not None else "1.0"

    # state --------------------------------------------------------------------------------------------------
    def check_open(self, method: str) -> None:
        """Refuse a call that writes to a run that is not open. Raises ConfigError."""
        if not self.is_open:
            raise ConfigError(
                f"{method} writes to the run's folder, which is open inside train(), evaluate() and run(): call it "
                "there, or put your loop into `with self.at_work():`"
            )

    @property
    def is_writing(self) -> bool:
        """Return whether this rank writes files of a run that is not complete."""
        return isinstance(self.files, RunFiles) and not self.files.status.is_complete

    def is_complete(self) -> bool:
        """Return whether the run is complete already, on every rank the same. Collective."""
        status = self.files.status
        return bool(self._ranks.broadcast(status is not None and status.is_complete))

    def status_fields(self) -> dict[str, Any]:
        """Return how far the run is and how good, for status.json."""
        progress, history = self._progress, self._history
        return {
            "epochs": progress.epochs,
            "steps": progress.steps,
            "iters": progress.iters,
            "progress": self._limits.fraction,
            "score_split": history.score_split,
            "score_name": history.score_name,
            "score_mode": history.score_mode,
            "best_index": history.best_index,
            "best_score": history.best_score,
            "latest_score": history.latest_score,
            "seconds": progress.seconds,
        }

    def save_results(self) -> None:
        """Replace the files of results and the status. Rank 0; others return."""
        self.files.write_results(self._history, self._place.identity_fields())
        self.files.note_status(**self.status_fields())

    def _first_status(self) -> Status:
        config, place, identity = self._config, self._place, self._place.identity
        return Status(
            status="running",
            name=identity.name,
            id=identity.id,
            run_id=identity.run_id,
            experiment_id=identity.experiment_id,
            experiment_name=config.experiment_name,
            run_name=config.run_name,
            group=config.group,
            timestamp=place.timestamp,
            attempt=self.attempt,
            world_size=self._ranks.world_size,
            epochs=0,
            steps=0,
            iters=0,
            progress=0.0,
            score_split=config.score_split,
            score_name=config.score_name,
            score_mode=config.score_mode,
            best_index=None,
            best_score=None,
            latest_score=None,
            evaluation=None,
            seconds=0.0,
            updated_at="",
            error=None,
        )

    # the end of good work -----------------------------------------------------------------------------------
    def finish(
        self, evaluation: dict[str, Any] | None = None, still_to_do: str | None = None
    ) -> Status | None:
        """Write the completion record, last of all. Collective; returns it on rank 0.

        Args:
            evaluation: the result of the evaluate stage.
            still_to_do: why the run is not complete, though all that was asked for is done.

        Raises:
            RunInterrupted: the run is to stop before the store has everything.
        """
        self.files.drain()
        self.files.flush()
        reason = self._wait_uploaded()
        if reason is not None:
            raise RunInterrupted(
                f"{reason}: the store does not have everything yet; a resume delivers the rest"
            )
        complete = {"status": "complete", "error": None}
        ending = complete if still_to_do is None else self._ending(still_to_do)
        status = self.files.write_status(**self.status_fields(), **ending, evaluation=evaluation)
        self._emit_completed(status)
        return status

    def tell_complete(self) -> Status | None:
        """Return the status of a run that was complete already. Collective.

        A launcher gets the event once more: the rank that wrote the status may have died before it sent it.
        """
        if self._place.is_launched:
            self._emit_completed(self.files.status)
        return self.files.status

    def _emit_completed(self, status: Status | None) -> None:
        """Emit `completed` after the upload, then upload that event. Collective.

        Nothing is uploaded once the remote status is `complete`.
        """
        self._wait_uploaded()
        if status is not None:
            self._emit("completed", status=status.model_dump(mode="json"))
        self._wait_uploaded()

    def _ending(self, still_to_do: str | None = None) -> dict[str, Any]:
        """Return the status of a run that is not complete: the one before, if that was an end and nothing was trained
        since."""
        before = self._status_before
        has_trained = self._progress.steps > self.steps_at_start
        if before is not None and not has_trained and before.status in ("interrupted", "failed"):
            return {"status": before.status, "error": before.error}
        return {"status": "interrupted", "error": still_to_do}

    def _wait_uploaded(self) -> str | None:
        """Wait until the store has all that is here now; at once where the run is local. Collective.

        All wait together, in short turns: a peer that waited in a barrier would be taken for hung.

        Returns:
            None, or the reason why the run is to stop, where that came first.
        """
        if self._place.is_local:
            return None
        files = self.files
        files.request_delivery()
        while True:
            is_done, reason = True, None
            if isinstance(files, RunFiles) and not files.is_delivered(_UPLOAD_TURN_SECONDS):
                files.check_delivery()
                stop = self._stop()
                is_done, reason = False, stop.reason if stop.requested else None
            is_done, reason = self._ranks.broadcast((is_done, reason))
            if is_done or reason is not None:
                return reason
            self.beat()

    def beat(self) -> None:
        """Show that this rank is alive while it waits for something else."""
        self.heartbeat()(self._progress.steps)

    def heartbeat(self) -> Callable[[int], None]:
        """Return the function that shows at each step that this rank is alive; without a launcher it does nothing."""
        context = self._place.context
        if context is None or context.control is None:
            return lambda step: None
        return context.control.ranks[self._ranks.local_rank].beat

    # closing ------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the run's folder open, once, however calls nest; record a bad end. Collective."""
        if self.is_open:
            yield
            return
        self.is_open = True
        try:
            self.claim()
            self._open_log()
            self.open()
            yield
            if self.files.status is not None and self.files.status.status == "running":  # evaluated only
                self.files.write_status(**self._ending())
            self.files.close()
            self._end_upload_together()
            self._ranks.leave()
        except BaseException as error:
            self._end_after(error)
            raise
        self._close()

    def close(self) -> None:
        """Close files and logs, and release the lease. A second call does nothing."""
        self.is_open = False
        files, self.files = self.files, NoFiles()
        try:
            files.close()
        finally:
            while not files.is_over(_UPLOAD_TURN_SECONDS):
                self.beat()
            self.writer, self._board, self.services = None, None, ()
            log, self._log = self._log, None
            if log is not None:
                log.close()
            self._closing.close()

    def _end_after(self, error: BaseException) -> None:
        """Record how the run ended, and close. Trouble with that is logged: the error under way says more."""
        steps: list[Callable[[], None]] = [
            functools.partial(self._record_end, error),
            self._close_files,
            self._close,
        ]
        if isinstance(error, RunInterrupted):  # which all ranks raise together
            steps.insert(2, self._end_upload_together)
        elif self._place.is_launched:
            # The mirror and the launcher deliver what is left: the launcher learns of the error only when this rank
            # ends, and would take another rank, which waits in a collective, for hung before.
            steps.insert(2, lambda: self.files.leave_delivery())
        for step in steps:
            try:
                step()
            except Exception as trouble:
                logger.error(
                    "besides, closing the run failed: %s: %s", type(trouble).__name__, redact(str(trouble))
                )

    def _close_files(self) -> None:
        self.files.close()

    def _record_end(self, error: BaseException) -> None:
        steps = self._progress.steps
        if isinstance(error, RunInterrupted):
            self._end_with("interrupted", reason=str(error), step=steps)
        elif isinstance(error, KeyboardInterrupt):
            self._end_with("interrupted", reason="keyboard interrupt", step=steps)
        elif isinstance(self.files, RunFiles) or not self._ranks.is_main_process:
            self._record_failure(error)

    def _record_failure(self, error: BaseException) -> None:
        """Record which rank failed first, and of what. Under our own launcher that one finds out."""
        context = self._place.context
        if context is not None and context.is_launched:
            return
        if context is None or context.failures is None:
            failure = failure_of(error, self._ranks.rank, self._progress.steps)
        else:
            failure = context.failures.settle(error, self._progress.steps)
        self._end_with("failed", **{name: failure[name] for name in ("error", "traceback", "rank", "step")})

    def _end_with(self, kind: str, **fields: Any) -> None:
        if not self.is_writing:
            return
        try:
            self.files.drain()  # a save that is under way may still be committed: this event is the last
        except DanLingError as unsaved:
            logger.error("the last checkpoint was not saved: %s", unsaved)
        error = fields.get("error") if kind == "failed" else None
        self.files.write_status(**self.status_fields(), status=kind, error=error)
        self._emit(kind, **fields)

    def _end_upload_together(self) -> None:
        """Wait until the mirror has uploaded what is left, or given up, in short turns as above. Collective."""
        while not self._place.is_local and not self._ranks.broadcast(
            self.files.is_over(_UPLOAD_TURN_SECONDS)
        ):
            self.beat()
