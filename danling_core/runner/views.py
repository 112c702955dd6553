"""The read-only side of a runner: every property, derived from config, progress, results and context."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from danling_core import storage
from danling_core.identity.ids import Identity, identify
from danling_core.results.history import Results
from danling_core.runner.base import RunnerBase
from danling_core.session.context import RunContext
from danling_core.train.lengths import Lengths
from danling_core.train.progress import Progress


class RunnerViews(RunnerBase):
    """What a runner shows; nothing here changes anything."""

    _context: RunContext | None
    _identity: Identity | None
    _created_at: str
    _progress: Progress
    _results: Results

    # identity and storage -----------------------------------------------------------------------------------
    @property
    def identity(self) -> Identity:
        """Experiment id, run id and the names that follow from them."""
        if self._identity is None:
            self._identity = identify(self.config, self._source_file)
        return self._identity

    @property
    def _source_file(self) -> str | None:
        return getattr(sys.modules.get(type(self).__module__), "__file__", None)

    @property
    def id(self) -> str:
        return self.identity.id

    @property
    def name(self) -> str:
        return self.identity.name

    @property
    def uuid(self) -> str:
        return str(self.identity.uuid)

    @property
    def timestamp(self) -> str:
        if self._context is not None and self.config.dir is None:
            return self._context.url.rstrip("/").rsplit("/", 1)[-1]
        return self._created_at

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def deterministic(self) -> bool:
        return self.config.deterministic

    @property
    def project_root(self) -> str:
        return self.config.project_root

    @property
    def experiments_root(self) -> str:
        return self.config.project_root

    @property
    def dir(self) -> str:
        if self._context is not None:
            return self._context.url
        if self.config.dir is not None:
            return self.config.dir
        return storage.join(self.project_root, f"{self.name}-{self.id}", self.timestamp)

    @property
    def checkpoint_dir(self) -> str:
        if self.config.checkpoint_dir is not None:
            return self.config.checkpoint_dir
        return storage.join(self.dir, self.checkpoint_dir_name)

    def _local_checkpoint_dir(self) -> str:
        if self.config.checkpoint_dir is not None:
            return self.config.checkpoint_dir
        assert self._context is not None
        return os.path.join(self._context.work_dir, self.checkpoint_dir_name)

    @property
    def checkpoint_dir_name(self) -> str:
        return self.config.checkpoint_dir_name

    @property
    def log_path(self) -> str:
        return self.config.log_path or storage.join(self.dir, "run.log")

    # progress -----------------------------------------------------------------------------------------------
    @property
    def iters(self) -> int:
        return self._progress.iters

    @property
    def steps(self) -> int:
        return self._progress.steps

    @property
    def epochs(self) -> int:
        return self._progress.epochs

    @property
    def _lengths(self) -> Lengths:
        """What is known of the length of a pass."""
        return Lengths(None, None, self.accum_steps, self.config.steps_per_epoch)

    @property
    def steps_per_epoch(self) -> int | None:
        return self._lengths.epoch_steps

    @property
    def step_end(self) -> int | None:
        config, per_epoch = self.config, self.steps_per_epoch
        if config.step_end is not None:
            return config.step_end
        if config.iter_end is not None:
            return self._lengths.iters_to_steps(config.iter_end)
        return None if config.epoch_end is None or per_epoch is None else config.epoch_end * per_epoch

    @property
    def iter_end(self) -> int | None:
        if self.config.iter_end is not None:
            return self.config.iter_end
        return None if self.step_end is None else self._lengths.steps_to_iters(self.step_end)

    @property
    def epoch_end(self) -> int | None:
        if self.config.epoch_end is not None:
            return self.config.epoch_end
        if self.step_end is None or not self.steps_per_epoch:
            return None
        return -(-self.step_end // self.steps_per_epoch)

    @property
    def iter_begin(self) -> int:
        return self._progress.iter_begin

    @property
    def step_begin(self) -> int:
        return self._progress.step_begin

    @property
    def epoch_begin(self) -> int:
        return self._progress.epoch_begin

    @property
    def total_iters(self) -> int | None:
        return None if self.iter_end is None else self.iter_end - self.iter_begin

    @property
    def total_steps(self) -> int | None:
        return None if self.step_end is None else self.step_end - self.step_begin

    @property
    def total_epochs(self) -> int | None:
        return None if self.epoch_end is None else self.epoch_end - self.epoch_begin

    @property
    def progress(self) -> float:
        return self._progress.fraction(self.steps_per_epoch)

    @property
    def accum_steps(self) -> int:
        return self.config.accum_steps

    @property
    def log(self) -> bool:
        return self.config.log

    @property
    def tensorboard(self) -> bool:
        return self.config.tensorboard

    @property
    def log_interval(self) -> int:
        return self.config.log_interval

    @property
    def save_interval(self) -> int | None:
        return self.config.save_interval

    # results, read ------------------------------------------------------------------------------------------
    @property
    def results(self) -> dict[int, dict[str, dict[str, Any]]]:
        return self._results.history

    @property
    def latest_result(self) -> dict[str, Any] | None:
        return self._results.latest_result

    @property
    def best_result(self) -> dict[str, Any] | None:
        return self._results.best_result

    @property
    def scores(self) -> dict[int, float]:
        return self._results.scores

    @property
    def latest_score(self) -> float | None:
        return self._results.latest_score

    @property
    def best_score(self) -> float | None:
        return self._results.best_score

    @property
    def best_index(self) -> int | None:
        return self._results.best_index

    @property
    def best_fn(self) -> Callable[..., Any]:
        return self._results.best_fn

    @property
    def is_best(self) -> bool:
        return self._results.is_best

    @property
    def score_split(self) -> str | None:
        return self._results.score_split

    @property
    def score_name(self) -> str:
        return self._results.score_name

    # ranks --------------------------------------------------------------------------------------------------
    @property
    def distributed(self) -> bool:
        return self.world_size > 1

    @property
    def is_main_process(self) -> bool:
        return self.rank == 0

    @property
    def is_local_main_process(self) -> bool:
        return self.local_rank == 0
