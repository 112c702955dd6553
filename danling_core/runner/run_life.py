"""How a runner holds its run's folder: claims it, opens it, tells how it ended, closes it."""

from __future__ import annotations

import contextlib
import functools
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

from danling_core import storage
from danling_core.errors import DanLingError, RunInterrupted
from danling_core.runner.reporting import Reporting
from danling_core.runs.folder import RunFolder, Status
from danling_core.secrets import redact
from danling_core.session.context import RunContext
from danling_core.session.files import RunFiles
from danling_core.session.rank_failures import failure_of

_DELIVERY_TURN_SECONDS = 2.0


class RunLife(Reporting):
    """From claiming the folder to the completion record. Nested calls share one opening."""

    _is_open: bool
    _owns_run: bool
    _closing: contextlib.ExitStack
    _status_before: Status | None = None
    _steps_at_start: int
    """Completed before this opening, what it resumed included."""

    @abstractmethod
    def _broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank. Collective."""

    def _leave_together(self) -> None:
        """The end of good work: wait for the other ranks, so that none leaves one of them alone. Collective."""

    def finish(
        self, evaluation: dict[str, Any] | None = None, still_to_do: str | None = None
    ) -> Status | None:
        files, status = self._files, None
        if files is not None:
            files.saver.drain()
            files.flush()
        reason = self._wait_delivered()
        if reason is not None:
            raise RunInterrupted(
                f"{reason}: the store does not have everything yet; a resume delivers the rest"
            )
        if files is not None:
            ending = (
                {"status": "complete", "error": None} if still_to_do is None else self._ending(still_to_do)
            )
            status = files.write_status(**self._status_fields(), **ending, evaluation=evaluation)
        self._emit_completed(status)
        return status

    def _emit_completed(self, status: Status | None) -> None:
        """Tell, once the store has the run, that it is complete; and wait until the store has that, too: nobody
        delivers anything more of a run that its status there calls complete. Collective."""
        self._wait_delivered()
        if status is not None:
            self.emit("completed", status=status.model_dump(mode="json"))
        self._wait_delivered()

    def _ending(self, still_to_do: str | None = None) -> dict[str, Any]:
        """The status of a run that did what it was asked for and is not complete: as it was before, if it ended
        then and trained no further."""
        before = self._status_before
        has_trained = self.steps > self._steps_at_start
        if before is not None and not has_trained and before.status in ("interrupted", "failed"):
            return {"status": before.status, "error": before.error}
        return {"status": "interrupted", "error": still_to_do}

    def _tell_complete(self) -> Status | None:
        """The status of a run that is complete already; a launcher is told once more, since the rank that wrote
        it may have died before it could say so."""
        status = self._files.status if self._files is not None else None
        if self._context is not None and self._context.is_launched:
            self._emit_completed(status)
        return status

    def _wait_delivered(self) -> str | None:
        """Wait until the store has all that is here now; at once where the run is local. Collective.

        All wait together, in short turns: a peer that waited in a barrier would be taken for hung.

        Returns:
            None, or the reason why the run is to stop, where that came first.
        """
        if self._is_local:
            return None
        files = self._files
        if files is not None:
            files.request_delivery()
        while True:
            is_done, reason = True, None
            if files is not None and not files.is_delivered(_DELIVERY_TURN_SECONDS):
                files.check_delivery()
                is_done, reason = False, self._stop_reason()
            is_done, reason = self._broadcast((is_done, reason))
            if is_done or reason is not None:
                return reason
            self._keep_beating()

    @property
    def _is_local(self) -> bool:
        """Whether the run is kept where its ranks write it, so that there is nothing to deliver."""
        return self._context is None or storage.is_local(self._context.url)

    # the run's folder ---------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        """Hold the run's folder open, once, however calls nest; tell how it ended where it ended badly."""
        if self._is_open:
            yield
            return
        self._is_open = True
        try:
            self._open_run()
            yield
            if self._files is not None and self._files.status.status == "running":  # evaluated only
                self._files.write_status(**self._ending())
            self._close_files()
            self._end_delivery_together()
            self._leave_together()
        except BaseException as error:
            self._end_after(error)
            raise
        self.close()

    def _end_after(self, error: BaseException) -> None:
        """Tell how the run ended, and close. Trouble with that is logged: the error under way says more."""
        steps: list[Callable[[], None]] = [
            functools.partial(self._tell_end, error),
            self._close_files,
            self.close,
        ]
        if isinstance(error, RunInterrupted):  # which all ranks raise together
            steps.insert(2, self._end_delivery_together)
        elif self._context is not None and self._context.is_launched:
            steps.insert(2, self._leave_delivery)
        for step in steps:
            try:
                step()
            except Exception as trouble:
                self.logger.error(
                    "besides, closing the run failed: %s: %s", type(trouble).__name__, redact(str(trouble))
                )

    def _tell_end(self, error: BaseException) -> None:
        if isinstance(error, RunInterrupted):
            self._end_with("interrupted", reason=str(error), step=self.steps)
        elif isinstance(error, KeyboardInterrupt):
            self._end_with("interrupted", reason="keyboard interrupt", step=self.steps)
        elif not (self.is_main_process and self._files is None):  # else nothing is open that could take it
            self._tell_failure(error)

    def _tell_failure(self, error: BaseException) -> None:
        """Record which rank failed first, and of what; under our own launcher that one finds out."""
        context = self._context
        if context is not None and context.is_launched:
            return
        if context is None or context.failures is None:
            failure = failure_of(error, self.rank, self.steps)
        else:
            failure = context.failures.settle(error, self.steps)
        self._end_with("failed", **{name: failure[name] for name in ("error", "traceback", "rank", "step")})

    def _end_with(self, kind: str, **fields: Any) -> None:
        if self._files is None or self._files.status.is_complete:
            return
        try:
            self._files.saver.drain()  # a save that is under way may still be committed: this event is the last
        except DanLingError as unsaved:
            self.logger.error("the last checkpoint was not saved: %s", unsaved)
        error = fields.get("error") if kind == "failed" else None
        self._files.write_status(**self._status_fields(), status=kind, error=error)
        self.emit(kind, **fields)

    def _close_files(self) -> None:
        if self._files is not None:
            self._files.close()

    def _end_delivery_together(self) -> None:
        """Wait until the mirror has delivered what is left, or given up, in short turns as above. Collective."""
        files = self._files
        while not self._is_local and not self._broadcast(
            files is None or files.is_over(_DELIVERY_TURN_SECONDS)
        ):
            self._keep_beating()

    def _leave_delivery(self) -> None:
        """Let the mirror deliver what is left by itself, and the launcher after it: that one learns of the error
        only when this rank ends, and would take another rank, which waits in a collective, for hung before."""
        if self._files is not None:
            self._files.leave_delivery()

    def _open_run(self) -> None:
        if self._context is None:
            self._context = self._claim_run()
        self._steps_at_start = self.steps
        self.init_logging()
        context = self._context
        previous = RunFolder(context.work_dir).read_status() if self.is_main_process else None
        self._created_at = self._broadcast(self._created_at if previous is None else previous.timestamp)
        if not self.is_main_process:
            return
        if previous is not None and previous.is_complete and not (self._is_local or context.is_launched):
            from danling_core.session.open_run import bring_checkpoints

            bring_checkpoints(context.url, context.work_dir, self.config)
        self._files = RunFiles(
            context,
            previous or self._first_status(),
            checkpoint_dir=self._local_checkpoint_dir(),
            keep_last=self.config.keep_last,
            is_given=self.config.checkpoint_dir is not None,
            writers=[log for log in [self._log] if log is not None],
            delivery=self._start_delivery(context),
        )
        self._status_before = previous
        if not self._files.status.is_complete:
            self._files.write_status(
                status="running", attempt=context.attempt, world_size=self.world_size, error=None
            )

    def _start_delivery(self, context: RunContext) -> Any:
        """What brings the local folder to its store; None where the run is local, or complete and nobody's."""
        if self._is_local or context.generation == 0:
            return None
        from danling_core.mirror.process import MirrorProcess
        from danling_core.session.delivery import Delivery

        start = functools.partial(
            MirrorProcess,
            context.work_dir,
            context.url,
            lease_url=RunFolder(context.url).lease_url,
            generation=context.generation,
            storage_options=self.config.storage_options,
            checkpoints=self.checkpoint_dir_name,
            interval_seconds=self.config.upload_interval_seconds,
        )
        return Delivery(start, context.work_dir, self.config, self._stop_because)

    def _stop_because(self, reason: str) -> None:
        """Have all ranks save and stop, of this run's own accord. Rank 0 only, any thread."""

    def _stop_reason(self) -> str | None:
        """Why this run is to stop, if it is. Rank 0 only."""
        return None

    def _keep_beating(self) -> None:
        """Say that this rank is alive while it waits for something else."""

    def _claim_run(self) -> RunContext:
        """Find or create the run's folder when the runner works without a driver. Collective."""
        from danling_core.session.open_run import open_run

        claimed = None
        if self.is_main_process:
            storage.configure(self.config.storage_options)  # a runner that works alone has the process
            opened = open_run(self.config, self.identity, source_file=self._source_file)
            if opened.lease is not None:
                self._closing.callback(opened.lease.release)
                self._closing.enter_context(opened.lease.beating())
            claimed = RunContext(opened.work_dir, opened.folder.url, opened.generation)
        return self._broadcast(claimed)

    def _is_complete(self) -> bool:
        status = self._files.status.status if self._files is not None else None
        return bool(self._broadcast(status == "complete"))

    def _first_status(self) -> Status:
        config, identity = self.config, self.identity
        return Status(
            status="running",
            name=identity.name,
            id=identity.id,
            run_id=identity.run_id,
            experiment_id=identity.experiment_id,
            experiment_name=config.experiment_name,
            run_name=config.run_name,
            group=config.group,
            timestamp=self.timestamp,
            attempt=self._context.attempt if self._context else "1.0",
            world_size=self.world_size,
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

    def close(self) -> None:
        self._is_open = False
        files, self._files = self._files, None
        try:
            if files is not None:
                files.close()
        finally:
            while files is not None and not files.is_over(_DELIVERY_TURN_SECONDS):
                self._keep_beating()
            self.writer, self._services = None, ()
            if self._log is not None:
                self._log.close()
            self._closing.close()
