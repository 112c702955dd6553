"""The framework-neutral part of a runner: identity, progress, results, the skeleton of training."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from danling_core import storage
from danling_core.config import Config
from danling_core.errors import ConfigError, RunInterrupted
from danling_core.identity.ids import Identity, new_timestamp
from danling_core.results.history import Results
from danling_core.runner.base import RunnerMode
from danling_core.runner.methods import History, Splits, Values
from danling_core.runner.resolve import resolve
from danling_core.runner.run_life import RunLife
from danling_core.runner.serialization import Serialization
from danling_core.runs.folder import Status
from danling_core.session import context as run_context
from danling_core.session.context import RunContext
from danling_core.session.files import RunFiles
from danling_core.suggest import nearest
from danling_core.train.progress import Progress, Unit


class BaseRunner(RunLife, Serialization):
    """Identity, config, progress, results and the train/evaluate skeleton, without a framework.

    Args:
        config: a `Config`, a mapping, or the path of a YAML or JSON file.

    Raises:
        ConfigError: the config or its params are refused.
    """

    def __init__(self, config: Config | Mapping[str, Any] | str | os.PathLike[str]) -> None:
        self._identity: Identity | None = None
        self._take_config(config)
        self.mode = RunnerMode.train
        self.split = None
        self.datasets, self.datasamplers, self.dataloaders = {}, {}, {}
        self.model = self.ema = self.criterion = self.optimizer = self.scheduler = None
        self.scheduler_interval = None
        self.metrics = self.train_metrics = self.evaluate_metrics = None
        self.meters: Any = None
        self.writer: Any = None
        self._context: RunContext | None = run_context.current()
        self._owns_run = self._context is None
        self._is_open = False
        self._files: RunFiles | None = None
        self._closing = contextlib.ExitStack()
        # what a segment has done so far, kept in checkpoints taken inside it
        self._done_splits: dict[str, dict[str, Any]] = {}
        self.logger = logging.getLogger("danling")
        self._log: Any = None
        self.init_distributed()
        self._created_at: str = self._broadcast(new_timestamp())
        self.set_seed()
        if self.config.deterministic:
            self.set_deterministic()

    def _take_config(self, config: Any) -> None:
        given = config if isinstance(config, Config) else Config.load(config)
        self._stated = given.model_dump(mode="json", exclude_unset=True)
        self.config, self.params = resolve(type(self), given)
        self._identity = None
        self._progress = Progress(*_end(self.config))
        self._results = Results(self.config.score_split, self.config.score_name, self.config.score_mode)

    # what a framework brings --------------------------------------------------------------------------------
    @abstractmethod
    def _set_up(self, train_splits: Sequence[str], evaluate_splits: Sequence[str] = ()) -> None:
        """Device, wrapping, loaders, resume: what is not done yet of it. Collective."""

    def _epoch_ended(self) -> bool:
        """Whether the segment that just ended also ended an epoch."""
        return True

    def _count_epoch(self) -> None:
        """A pass over the data is done."""
        self._progress.epochs += 1
        self._progress.steps_in_epoch = 0

    def _timing_fields(self) -> dict[str, Any]:
        """Where the segment's time went, for its event."""
        return {}

    def _save_interrupted(self) -> None:
        """Save where the run stands inside an epoch. Collective."""

    def _load_best(self) -> tuple[str | None, int | None]:
        """Load the weights of the best checkpoint on every rank; returns its name, and the index of its result
        (None: it is another one, since the best is damaged). Collective."""
        return None, None

    def _after_segment(self, index: int) -> None:
        """Room for schedulers that step on a score."""

    # train and evaluate -------------------------------------------------------------------------------------
    def train(self, train_splits: Splits | None = None, evaluate_splits: Splits | None = None) -> History:
        train_splits = self._known_splits(train_splits, self._default_train_splits())
        evaluate_splits = self._known_splits(evaluate_splits, self._default_evaluate_splits(train_splits))
        self._check_split_names()
        with self._at_work():
            if self._is_complete():
                self._set_up(train_splits, evaluate_splits)
                return self.results
            self._results.resolve_split(list(dict.fromkeys([*train_splits, *evaluate_splits])))
            self._set_up(train_splits, evaluate_splits)
            while not self._is_trained:
                self._segment(train_splits, evaluate_splits)
            if self._files is not None:
                self._files.saver.drain()
            if self._owns_run:
                self.finish()
        return self.results

    @property
    def _is_trained(self) -> bool:
        """Whether training is over, the last evaluation included."""
        if self._done_splits:  # a segment that a stop has cut short
            return False
        return self._progress.finished or self._results.should_stop(self.config.patience)

    def _segment(self, train_splits: Sequence[str], evaluate_splits: Sequence[str]) -> None:
        """One epoch, or in step mode one stretch between evaluations: train, evaluate, report, save."""
        epoch, started, by_epoch = self.epochs, time.monotonic(), self._progress.unit == "epoch"
        self.emit("epoch_began", epoch=epoch, index=epoch if by_epoch else None, step=self.steps)
        try:
            for split in train_splits:
                if split not in self._done_splits and (by_epoch or not self._progress.finished):
                    self._done_splits[split] = self.train_epoch(split)
            is_due = (epoch + 1) % self.config.evaluate_every == 0 or epoch + 1 >= self._progress.end
            if is_due or not by_epoch:
                self._done_splits.update(self._evaluate_all(evaluate_splits))
        except RunInterrupted:
            self._save_interrupted()
            raise
        index = epoch if by_epoch else self.steps
        result, self._done_splits = self._broadcast(self._done_splits), {}
        self.append_result(result, index)
        ended = self._epoch_ended()
        if ended:
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
            timings=self._timing_fields(),
        )
        self.save_result()
        self.save_checkpoint(epochs=self.epochs - 1 if ended else None)

    def _evaluate_all(self, splits: Sequence[str]) -> dict[str, Values]:
        """The evaluations that end a segment; a resume repeats all of them or none."""
        return {split: self.evaluate_epoch(split) for split in splits}

    def evaluate(self, evaluate_splits: Splits | None = None) -> Values:
        splits = self._known_splits(
            evaluate_splits, self._default_evaluate_splits(self._default_train_splits())
        )
        with self._at_work():
            self._set_up((), splits)
            return self._broadcast({split: self.evaluate_epoch(split) for split in splits})

    def run(self, stages: Sequence[str] | None = None) -> Status | None:
        stages = self.config.stages if stages is None else stages
        self._check_split_names()
        owns, self._owns_run = self._owns_run, False
        try:
            with self._at_work():
                if self._is_complete():
                    return self._tell_complete()
                if "train" in stages:
                    self.train()
                evaluation = self._evaluate_best() if "evaluate" in stages else None
                return self.finish(evaluation, self._still_to_do(stages))
        finally:
            self._owns_run = owns

    def _still_to_do(self, stages: Sequence[str]) -> str | None:
        """What a complete run has and this one lacks after these stages, if anything."""
        if not self._is_trained:
            return "training is not over"
        return None if "evaluate" in stages else "stage evaluate is still to do"

    def _evaluate_best(self) -> dict[str, Any] | None:
        """The evaluate stage: the best checkpoint on the test split, or on the score split where there is
        none."""
        started = time.monotonic()
        self._set_up(())
        tests = [split for split in self.datasets | self.dataloaders if split.startswith("test")]
        splits = self.config.evaluate_splits or tests or [s for s in [self.score_split] if s is not None]
        loaded, index = self._load_best()
        self.emit("evaluate_began", splits=splits, checkpoint=loaded)
        result = self._broadcast({split: self.evaluate_epoch(split) for split in splits})
        evaluation = {"checkpoint": loaded, "index": index, "result": result}
        if self._files is not None:
            storage.write_json(self._files.folder.evaluation_url, {**self._identity_fields(), **evaluation})
        self.emit("evaluate_finished", result=result, seconds=time.monotonic() - started)
        return result

    # splits -------------------------------------------------------------------------------------------------
    def _default_train_splits(self) -> list[str]:
        return [split for split in self.datasets | self.dataloaders if split.startswith("train")]

    def _default_evaluate_splits(self, train_splits: Sequence[str]) -> list[str]:
        splits = self.datasets | self.dataloaders
        return [s for s in splits if s not in train_splits and not s.startswith(("test", "infer"))]

    def _check_split_names(self) -> None:
        """Raises ConfigError where the config names a split that the runner does not have."""
        known = list(self.datasets | self.dataloaders)
        for place, names in (
            ("evaluate_splits", self.config.evaluate_splits or ()),
            ("dataloader", self.config.dataloader.__pydantic_extra__ or ()),
        ):
            for name in names:
                if name not in known:
                    near = nearest(name, known)
                    hint = f": did you mean {near!r}?" if near else ""
                    raise ConfigError(f"{place} names split {name!r}, and the runner has {known}{hint}")

    def _known_splits(self, wanted: Splits | None, default: Sequence[str]) -> list[str]:
        known = list(self.datasets | self.dataloaders)
        splits = [wanted] if isinstance(wanted, str) else list(default if wanted is None else wanted)
        for split in splits:
            if split not in known:
                raise ConfigError(f"split {split!r} has no data: the runner has {known}")
        return splits


def _end(config: Config) -> tuple[Unit, int]:
    ends: dict[Unit, int | None] = {
        "epoch": config.epoch_end,
        "step": config.step_end,
        "iter": config.iter_end,
    }
    return next((unit, end) for unit, end in ends.items() if end is not None)
