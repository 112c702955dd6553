"""Every attribute and property that a runner offers, declared in one place."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from danling_core.runner.methods import RunnerMethods

if TYPE_CHECKING:
    import logging

    from danling_core.config import Config


class RunnerMode(StrEnum):
    """What a runner is doing: decides gradients, EMA, metrics and `model.train()`."""

    train = "train"
    evaluate = "evaluate"
    infer = "infer"


class RunnerBase(RunnerMethods):
    """The vocabulary of a runner: types and meanings, no behaviour. Its methods are declared in
    `RunnerMethods`.

    An *iter* is one forward and backward, a *step* one optimizer update, an *epoch* one pass over the data.
    Counters count completed work. A *split* is one named part of the data (train, val, test).
    """

    # general ------------------------------------------------------------------------------------------------
    config: Config
    """What the user asked for; frozen."""
    params: Any
    """The user's hyperparameters: `config.params`, as the model that the runner's annotation `params:
    MyParams` names."""
    mode: RunnerMode
    """What the runner is doing now."""

    @property
    @abstractmethod
    def id(self) -> str:
        """First 8 characters of the experiment id and of the run id: same code and same config, same id."""

    @property
    @abstractmethod
    def name(self) -> str:
        """`{experiment_name}-{run_name}`, unless the config overrides it."""

    @property
    @abstractmethod
    def uuid(self) -> str:
        """`uuid5(UUID(run_id), id)`."""

    @property
    @abstractmethod
    def timestamp(self) -> str:
        """When the run was created: UTC, sortable, to the microsecond."""

    @property
    @abstractmethod
    def seed(self) -> int:
        """The user's seed, exactly; 0 is a seed."""

    @property
    @abstractmethod
    def deterministic(self) -> bool:
        """Whether torch was asked for deterministic algorithms."""

    # progress -----------------------------------------------------------------------------------------------
    @property
    @abstractmethod
    def iters(self) -> int:
        """Completed forward and backward passes."""

    @property
    @abstractmethod
    def steps(self) -> int:
        """Completed optimizer updates, skipped ones included."""

    @property
    @abstractmethod
    def epochs(self) -> int:
        """Completed epochs; while epoch e runs, `epochs == e`."""

    @property
    @abstractmethod
    def iter_end(self) -> int | None:
        """Where the run ends in iters; None where that is not known."""

    @property
    @abstractmethod
    def step_end(self) -> int | None:
        """Where the run ends in steps; None where that is not known."""

    @property
    @abstractmethod
    def epoch_end(self) -> int | None:
        """Where the run ends in epochs; None where that is not known."""

    @property
    @abstractmethod
    def iter_begin(self) -> int:
        """Where the run began in iters; a resume never moves it."""

    @property
    @abstractmethod
    def step_begin(self) -> int:
        """Where the run began in steps; a resume never moves it."""

    @property
    @abstractmethod
    def epoch_begin(self) -> int:
        """Where the run began in epochs; a resume never moves it."""

    @property
    @abstractmethod
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps in one epoch; None for unsized data without `steps_per_epoch` in the config."""

    @property
    @abstractmethod
    def total_iters(self) -> int | None:
        """`iter_end - iter_begin`."""

    @property
    @abstractmethod
    def total_steps(self) -> int | None:
        """`step_end - step_begin`."""

    @property
    @abstractmethod
    def total_epochs(self) -> int | None:
        """`epoch_end - epoch_begin`."""

    @property
    @abstractmethod
    def progress(self) -> float:
        """`(done - begin) / total` in the unit that drives the loop, in [0, 1]."""

    # model --------------------------------------------------------------------------------------------------
    model: Any
    """The model; wrapped in DDP from the start of `train()` where there are several ranks."""
    ema: Any
    """Moving average of the weights, or None: updated after each step taken, saved, used to evaluate and
    infer."""
    criterion: Any
    """`criterion(prediction, target)` gives the mean loss of a batch, a scalar."""
    optimizer: Any
    """Set by hand, or built from the config's `optim`."""
    scheduler: Any
    """Set by hand, or built from the config's `scheduler`; None for a constant learning rate."""
    scheduler_interval: str | None
    """What the scheduler counts: "step", "epoch", or None for the config's word, else for what suits its
    class."""

    # data ---------------------------------------------------------------------------------------------------
    datasets: dict[str, Any]
    """Split to data set: map-style, iterable, or a tuple of whole tensors."""
    datasamplers: dict[str, Any]
    """Split to sampler: the user's own, or those that the runner made."""
    dataloaders: dict[str, Any]
    """Split to loader: the user's own, or those that the runner made from `datasets`."""
    split: str | None
    """The split being trained or evaluated now."""
    collate_fn: Callable[[Any], Any] | None
    """Makes a batch of a list of samples; None for torch's own way."""
    size_of: Callable[[Any], int] | None
    """Samples (or tokens) in a batch: the unit in which losses are weighted; None for the first dimension."""

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """Samples in one batch of one rank, in training."""

    @property
    @abstractmethod
    def batch_size_equivalent(self) -> int:
        """Samples in one optimizer step: batch x world x accumulation."""

    @property
    @abstractmethod
    def accum_steps(self) -> int:
        """Iters in one optimizer step."""

    # results ------------------------------------------------------------------------------------------------
    @property
    @abstractmethod
    def results(self) -> dict[int, dict[str, dict[str, Any]]]:
        """`{epoch: {split: {metric: value}}}`; in step mode the key is the completed steps."""

    @property
    @abstractmethod
    def latest_result(self) -> dict[str, Any] | None:
        """The last result, with its `index`."""

    @property
    @abstractmethod
    def best_result(self) -> dict[str, Any] | None:
        """The result with the best score, with its `index`."""

    @property
    @abstractmethod
    def scores(self) -> dict[int, float]:
        """`{index: score}`."""

    @property
    @abstractmethod
    def latest_score(self) -> float | None:
        """Score of the last result."""

    @property
    @abstractmethod
    def best_score(self) -> float | None:
        """The best score; NaN is never best, the earliest wins a tie."""

    @property
    @abstractmethod
    def best_index(self) -> int | None:
        """Key of the best result."""

    @property
    @abstractmethod
    def best_fn(self) -> Callable[..., Any]:
        """`min` or `max`, after `score_mode`."""

    @property
    @abstractmethod
    def is_best(self) -> bool:
        """Whether the best result is the latest one."""

    @property
    @abstractmethod
    def score_split(self) -> str | None:
        """The split that is scored: as told, else val, validate, the second split, the first."""

    @property
    @abstractmethod
    def score_name(self) -> str:
        """The metric that is the score."""

    # parallel -----------------------------------------------------------------------------------------------
    device: Any
    """This rank's device: `cpu`, or `cuda:{local_rank}`."""

    @property
    @abstractmethod
    def world_size(self) -> int:
        """Number of ranks."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """This rank, in [0, world_size)."""

    @property
    @abstractmethod
    def local_rank(self) -> int:
        """This rank on its node."""

    @property
    @abstractmethod
    def distributed(self) -> bool:
        """Whether there are several ranks."""

    @property
    @abstractmethod
    def is_main_process(self) -> bool:
        """Whether this is rank 0."""

    @property
    @abstractmethod
    def is_local_main_process(self) -> bool:
        """Whether this is the first rank of its node."""

    # storage ------------------------------------------------------------------------------------------------
    @property
    @abstractmethod
    def project_root(self) -> str:
        """Where the project's runs are: any fsspec URL."""

    @property
    @abstractmethod
    def experiments_root(self) -> str:
        """The older name of `project_root`."""

    @property
    @abstractmethod
    def dir(self) -> str:
        """The run's folder: `project_root/{name}-{id}/{timestamp}`, unless the config overrides it."""

    @property
    @abstractmethod
    def checkpoint_dir(self) -> str:
        """Where checkpoints are kept: `dir/{checkpoint_dir_name}`."""

    @property
    @abstractmethod
    def checkpoint_dir_name(self) -> str:
        """Name of the folder of checkpoints inside `dir`."""

    @property
    @abstractmethod
    def log_path(self) -> str:
        """The text log: `dir/run.log`."""

    # logging ------------------------------------------------------------------------------------------------
    logger: logging.Logger
    """The logger named `danling`: the root logger is left alone; ranks other than 0 speak up for warnings
    only."""
    writer: Any
    """The TensorBoard writer, or None."""
    meters: Any
    """The running loss of the split being trained or evaluated; None before."""
    metrics: Any
    """Anything with `update(prediction, target)`, `compute()` and `reset()`; used to train and to evaluate."""
    train_metrics: Any
    """Metrics for training alone, where they differ from `metrics`."""
    evaluate_metrics: Any
    """Metrics for evaluation alone, where they differ from `metrics`."""

    @property
    @abstractmethod
    def log(self) -> bool:
        """Whether a text log is kept."""

    @property
    @abstractmethod
    def tensorboard(self) -> bool:
        """Whether TensorBoard curves are written."""

    @property
    @abstractmethod
    def log_interval(self) -> int:
        """Iters between two progress records; the reported epoch loss does not depend on it."""

    @property
    @abstractmethod
    def save_interval(self) -> int | None:
        """Epochs between kept `epoch-N` checkpoints; `latest` and `best` are saved in any case."""
