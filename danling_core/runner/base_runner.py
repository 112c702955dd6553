"""The framework-neutral part of a runner: identity, progress, results, the skeleton of training."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from danling_core import context as run_context
from danling_core import storage
from danling_core.config import Config
from danling_core.context import RunContext
from danling_core.errors import ConfigError, RunInterrupted
from danling_core.formatting import format_epoch_result, format_result, format_step_result
from danling_core.identity import Identity, new_timestamp
from danling_core.progress import Progress, Unit
from danling_core.results import Results
from danling_core.run_folder import Status
from danling_core.runner.base import RunnerMode
from danling_core.runner.files import RunFiles
from danling_core.runner.resolve import resolve
from danling_core.runner.views import RunnerViews


class BaseRunner(RunnerViews):
    """Identity, config, progress, results and the train/evaluate skeleton, without a framework.

    Args:
        config: a `Config`, a mapping, or the path of a YAML or JSON file.

    Raises:
        ConfigError: the config or its params are refused.
    """

    def __init__(self, config: Config | Mapping[str, Any] | str | os.PathLike[str]) -> None:
        self.config, self.params = resolve(type(self), config)
        self.mode = RunnerMode.train
        self.split: str | None = None
        self.datasets: dict[str, Any] = {}
        self.datasamplers: dict[str, Any] = {}
        self.dataloaders: dict[str, Any] = {}
        self.model = self.ema = self.criterion = self.optimizer = self.scheduler = None
        self.metrics = self.train_metrics = self.evaluate_metrics = None
        self.meters: Any = None
        self.writer: Any = None
        self._context: RunContext | None = run_context.current()
        self._owns_run = self._context is None
        self._is_open = False
        self._identity: Identity | None = None
        self._created_at = new_timestamp()
        self._files: RunFiles | None = None
        self._closing = contextlib.ExitStack()
        self._progress = Progress(*_end(self.config))
        self._results = Results(self.config.score_split, self.config.score_name, self.config.score_mode)
        # what a segment has done so far, kept in checkpoints taken inside it
        self._done_splits: dict[str, dict[str, Any]] = {}
        self.logger = logging.getLogger("danling")
        self._log: Any = None
        self.init_distributed()
        self.set_seed()
        if self.config.deterministic:
            self.set_deterministic()

    # what a framework brings -----------------------------------------------------------------------------------
    @abstractmethod
    def init_distributed(self) -> None:
        """Join the other ranks. Collective."""

    @abstractmethod
    def set_seed(self, seed: int | None = None, bias: int | bool | None = None) -> int:
        """Seed every generator of this rank; returns the seed used."""

    @abstractmethod
    def set_deterministic(self) -> None:
        """Ask for deterministic algorithms."""

    @abstractmethod
    def train_epoch(self, split: str = "train") -> dict[str, Any]:
        """Train until the epoch, or in step mode the segment, ends; returns the split's result. Collective."""

    @abstractmethod
    def evaluate_epoch(self, split: str = "val") -> dict[str, Any]:
        """Evaluate one split exactly; returns its result. Collective."""

    @abstractmethod
    def save_checkpoint(self, name: str = "latest", epochs: int | None = None, save_best: bool = True) -> None:
        """Save the run's whole state in the background. Collective."""

    @abstractmethod
    def _set_up(self, train_splits: Sequence[str]) -> None:
        """Device, wrapping, loaders, resume: once, when training or evaluation begins. Collective."""

    @abstractmethod
    def _broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank. Collective."""

    # train and evaluate ----------------------------------------------------------------------------------------
    def train(
        self, train_splits: Sequence[str] | None = None, evaluate_splits: Sequence[str] | None = None
    ) -> dict[int, dict[str, dict[str, Any]]]:
        """Train to the end, or until patience runs out, resuming what is there. Collective. Returns `results`.

        Args:
            train_splits: default: those named `train...`.
            evaluate_splits: evaluated after each epoch; default: the others, without `test...`.

        Raises:
            RunInterrupted: asked to stop; everything is saved and the next call resumes.
        """
        train_splits = self._known_splits(train_splits, self._default_train_splits())
        evaluate_splits = self._known_splits(evaluate_splits, self._default_evaluate_splits(train_splits))
        with self._at_work():
            if self._is_complete():
                self._set_up(train_splits)
                return self.results
            self._results.resolve_split(_in_order(train_splits, evaluate_splits))
            self._set_up(train_splits)
            while not self._progress.finished and not self._results.should_stop(self.config.patience):
                self._segment(train_splits, evaluate_splits)
            if self._files is not None:
                self._files.saver.drain()
            if self._owns_run:
                self.finish()
        return self.results

    def _segment(self, train_splits: Sequence[str], evaluate_splits: Sequence[str]) -> None:
        """One epoch, or in step mode one stretch between evaluations: train, evaluate, report, save."""
        epoch, started, by_epoch = self.epochs, time.monotonic(), self._progress.unit == "epoch"
        self.emit("epoch_began", epoch=epoch, index=epoch if by_epoch else None)
        try:
            for split in train_splits:
                if split not in self._done_splits:
                    self._done_splits[split] = self.train_epoch(split)
            if not by_epoch or (epoch + 1) % self.config.evaluate_every == 0 or epoch + 1 >= self._progress.end:
                evaluated = {split: self.evaluate_epoch(split) for split in evaluate_splits}
                self._done_splits.update(evaluated)
        except RunInterrupted:
            self._save_interrupted()
            raise
        index = epoch if by_epoch else self.steps
        result, self._done_splits = self._broadcast(self._done_splits), {}
        self.append_result(result, index)
        if self._epoch_ended():
            self._count_epoch()
        seconds = time.monotonic() - started
        self._progress.seconds += seconds
        self._after_segment(index)
        self.emit(
            "epoch_finished",
            epoch=epoch,
            index=index,
            result=self.results[index],
            seconds=seconds,
            score=self.scores.get(index),
            is_best=self.is_best,
        )
        self.save_result()
        self.save_checkpoint(epochs=epoch if by_epoch else None)

    def _epoch_ended(self) -> bool:
        return True

    def _count_epoch(self) -> None:
        """A pass over the data is done."""
        self._progress.epochs += 1
        self._progress.steps_in_epoch = 0

    def _save_interrupted(self) -> None:
        """Save where the run stands inside an epoch. Collective."""

    def _after_segment(self, index: int) -> None:
        """Room for schedulers that step on a score."""

    def evaluate(self, evaluate_splits: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
        """Evaluate splits as the model is now, without touching `results`. Collective. Returns `{split: result}`."""
        splits = self._known_splits(evaluate_splits, self._default_evaluate_splits(self._default_train_splits()))
        with self._at_work():
            self._set_up(())
            return self._broadcast({split: self.evaluate_epoch(split) for split in splits})

    def run(self, stages: Sequence[str] | None = None) -> Status | None:
        """All stages of the run, then the completion record: what a worker calls. Collective.

        Returns:
            the status on rank 0, None elsewhere.

        Raises:
            RunInterrupted: asked to stop; saved, and the next run resumes.
        """
        stages = self.config.stages if stages is None else stages
        owns, self._owns_run = self._owns_run, False
        try:
            with self._at_work():
                if not self._is_complete():
                    if "train" in stages:
                        self.train()
                    evaluation = self._evaluate_best() if "evaluate" in stages else None
                    return self.finish(evaluation)
                return self._files.status if self._files is not None else None
        finally:
            self._owns_run = owns

    def _evaluate_best(self) -> dict[str, Any] | None:
        """The evaluate stage: the best checkpoint on the test split, or on the score split where there is none."""
        splits = self.config.evaluate_splits or [s for s in self.datasets | self.dataloaders if s.startswith("test")]
        splits = list(splits) or [s for s in [self.score_split] if s is not None]
        self._known_splits(splits, splits)
        started = time.monotonic()
        self._set_up(())
        loaded = self._load_best()
        self.emit("evaluate_began", splits=splits, checkpoint=loaded)
        result = self._broadcast({split: self.evaluate_epoch(split) for split in splits})
        evaluation = {"checkpoint": loaded, "index": self.best_index, "result": result}
        if self._files is not None:
            storage.write_json(self._files.folder.evaluation_url, {**self._identity_fields(), **evaluation})
        self.emit("evaluate_finished", result=result, seconds=time.monotonic() - started)
        return result

    def _load_best(self) -> str | None:
        """Load the weights of the best checkpoint on every rank; returns its name. Collective."""
        return None

    def finish(self, evaluation: dict[str, Any] | None = None) -> Status | None:
        """Write the completion record, last of all. Rank 0 writes; others return None."""
        files = self._files
        if files is None:
            return None
        files.saver.drain()
        files.flush()
        status = files.write_status(**self._status_fields(), status="complete", evaluation=evaluation, error=None)
        self.emit("completed", status=status.model_dump(mode="json"))
        return status

    # the run's folder ------------------------------------------------------------------------------------------
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
        except RunInterrupted as error:
            self._end_with("interrupted", reason=str(error), step=self.steps)
            raise
        except KeyboardInterrupt:
            self._end_with("interrupted", reason="keyboard interrupt", step=self.steps)
            raise
        except BaseException as error:
            if self._context is None or self._context.control is None:  # a launcher knows better who failed first
                self._end_with("failed", error=f"{type(error).__name__}: {error}", rank=self.rank, step=self.steps)
            raise
        finally:
            self.close()

    def _end_with(self, kind: str, **fields: Any) -> None:
        if self._files is None:
            return
        error = fields.get("error") if kind == "failed" else None
        self._files.write_status(**self._status_fields(), status=kind, error=error)
        self.emit(kind, **fields)

    def _open_run(self) -> None:
        if self._context is None:
            self._context = self._claim_run()
        self.init_logging()
        if not self.is_main_process:
            return
        context = self._context
        previous = _read_status(context.work_dir)
        self._files = RunFiles(
            context,
            previous or self._first_status(),
            checkpoint_dir=self._local_checkpoint_dir(),
            keep_last=self.config.keep_last,
            writers=[log for log in [self._log] if log is not None],
        )
        if not self._files.status.is_complete:
            self._files.write_status(
                status="running", attempt=context.attempt, world_size=self.world_size, error=None
            )

    def _claim_run(self) -> RunContext:
        """Find or create the run's folder when the runner works without a driver. Collective."""
        from danling_core.open_run import open_run

        claimed = None
        if self.is_main_process:
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

    def _status_fields(self) -> dict[str, Any]:
        return {
            "epochs": self.epochs,
            "steps": self.steps,
            "iters": self.iters,
            "progress": self.progress,
            "score_split": self.score_split,
            "score_name": self.score_name,
            "score_mode": "min" if self.scores and self.best_fn is min else "max" if self.scores else None,
            "best_index": self.best_index,
            "best_score": self.best_score,
            "latest_score": self.latest_score,
            "seconds": self._progress.seconds,
        }

    def close(self) -> None:
        """Close files and logs. Called at the end of `train`, `evaluate` and `run`; a second call does nothing."""
        self._is_open = False
        files, self._files = self._files, None
        try:
            if files is not None:
                files.close()
        finally:
            if self._log is not None:
                self._log.close()
            self._closing.close()

    def emit(self, kind: str, **fields: Any) -> None:
        """Append an event of this kind to the run's event log. Does nothing on ranks other than 0."""
        if self._files is not None:
            self._files.emit(kind, **fields)

    # results ---------------------------------------------------------------------------------------------------
    def append_result(self, result: Mapping[str, Any], index: int | None = None) -> None:
        """Report `{split: {metric: value}}`, merging into what `index` (default: the current epoch) already has."""
        self._results.append(result, self.epochs if index is None else index)

    def save_result(self) -> None:
        """Replace results.json, latest.json, best.json and status.json. Rank 0 writes; others return."""
        if self._files is not None:
            self._files.write_results(self._results, self._identity_fields())
            self._files.write_status(**self._status_fields())

    def print_result(self) -> None:
        """Log all results, readably. Rank 0 speaks."""
        if self.is_main_process:
            self.logger.info(self.format_result())

    def format_step_result(self, result: Mapping[str, Any], split: str, steps: int, total: int | None = None) -> str:
        """One line for a step's result."""
        return format_step_result(result, split, steps, total)

    def format_epoch_result(self, result: Mapping[str, Any], epochs: int, total: int | None = None) -> str:
        """One line for an epoch's result."""
        return format_epoch_result(result, epochs, total)

    def format_result(self) -> str:
        """All results, a line each."""
        return format_result(self._results)

    def _identity_fields(self) -> dict[str, str]:
        return {"name": self.name, "id": self.id, "timestamp": self.timestamp}

    # splits ----------------------------------------------------------------------------------------------------
    def _default_train_splits(self) -> list[str]:
        return [split for split in self.datasets | self.dataloaders if split.startswith("train")]

    def _default_evaluate_splits(self, train_splits: Sequence[str]) -> list[str]:
        splits = self.datasets | self.dataloaders
        return [split for split in splits if split not in train_splits and not split.startswith("test")]

    def _known_splits(self, wanted: Sequence[str] | None, default: Sequence[str]) -> list[str]:
        known = list(self.datasets | self.dataloaders)
        splits = list(default if wanted is None else wanted)
        for split in splits:
            if split not in known:
                raise ConfigError(f"split {split!r} has no data: the runner has {known}")
        return splits

    # logging ---------------------------------------------------------------------------------------------------
    def init_logging(self) -> None:
        """Open the logger named `danling` for this rank; the root logger is left alone."""

    def init_print(self, process: int = 0) -> None:
        """Let only rank `process` speak through the logger; `print` itself is left alone."""
        if self._log is not None:
            self._log.process = process


def _end(config: Config) -> tuple[Unit, int]:
    ends: dict[Unit, int | None] = {"epoch": config.epoch_end, "step": config.step_end, "iter": config.iter_end}
    return next((unit, end) for unit, end in ends.items() if end is not None)


def _in_order(train_splits: Sequence[str], evaluate_splits: Sequence[str]) -> list[str]:
    return list(dict.fromkeys([*train_splits, *evaluate_splits]))


def _read_status(work_dir: str) -> Status | None:
    from danling_core.run_folder import RunFolder

    return RunFolder(work_dir).read_status()
