"""Every attribute that a runner offers, declared in one place."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, Generic, TypeVar, overload
from uuid import UUID

from danling_core.config import Config
from danling_core.errors import ConfigError
from danling_core.identity.ids import Identity
from danling_core.session.session import RunSession
from danling_core.train.state import TrainingState
from danling_core.train.step import Step

T = TypeVar("T")


class RunnerMode(StrEnum):
    """Mode of a runner: decides gradients, EMA, metrics and `model.train()`."""

    train = "train"
    evaluate = "evaluate"
    infer = "infer"


class From(Generic[T]):
    """A read-only attribute that one of the runner's parts holds.

    Args:
        part: the part's name in `Parts`.
        doc: the attribute's meaning.
        name: what the part calls it, where that is another name.
    """

    def __init__(self, part: str, doc: str, *, name: str = "") -> None:
        self.part = part
        self.__doc__ = doc
        self.source = name
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name
        self.source = self.source or name

    @overload
    def __get__(self, runner: None, owner: type) -> From[T]: ...

    @overload
    def __get__(self, runner: object, owner: type) -> T: ...

    def __get__(self, runner: object | None, owner: type) -> Any:
        if runner is None:
            return self
        return self.value(getattr(self.parts_of(runner), self.part))

    def value(self, part: Any) -> Any:
        """Return the attribute's value in its part."""
        return getattr(part, self.source)

    def __set__(self, runner: object, value: T) -> None:
        raise AttributeError(f"self.{self.name} follows from the config and the run, and cannot be set")

    def parts_of(self, runner: object) -> Any:
        """Return the parts of a runner; AttributeError where its constructor has not made them yet."""
        try:
            return runner._parts  # type: ignore[attr-defined]
        except AttributeError:
            raise AttributeError(
                f"self.{self.name} is used before super().__init__(config) was called in "
                f"{type(runner).__name__}.__init__"
            ) from None


class Held(From[T]):
    """An attribute that a part holds and a user may set."""

    def __set__(self, runner: object, value: T) -> None:
        setattr(getattr(self.parts_of(runner), self.part), self.source, value)


class HeldMapping(Held[T]):
    """An attribute that a user may set to a mapping by split, and to nothing else."""

    def __set__(self, runner: object, value: T) -> None:
        if not isinstance(value, Mapping):
            raise ConfigError(
                f"self.{self.name} is a {type(value).__name__}, wanted a mapping by split: "
                f"self.{self.name} = {{'train': ..., 'val': ...}}"
            )
        super().__set__(runner, value)


class Running(From[int]):
    """An attribute that depends on the split that is being passed over."""

    def __get__(self, runner: Any, owner: type) -> Any:
        return self if runner is None else self.parts_of(runner).splits.batch_size_of(runner.split)


class Mode(From[RunnerMode]):
    """The attribute `mode`: a text is made a `RunnerMode`, and another one refused."""

    def __get__(self, runner: Any, owner: type) -> Any:
        return self if runner is None else vars(runner)[self.name]

    def __set__(self, runner: object, value: RunnerMode | str) -> None:
        known = [mode.value for mode in RunnerMode]
        if value not in known:
            raise ConfigError(f"self.mode is {value!r}, wanted one of {', '.join(known)}")
        vars(runner)[self.name] = RunnerMode(value)


class Whole(From[T]):
    """A part itself, as an attribute."""

    def value(self, part: Any) -> Any:
        return part


class also_a_switch:
    """A method of a runner whose name is also a setting: as a value it is true where the config says so.

    Args:
        method: of the same name as the setting.
    """

    def __init__(self, method: Callable[..., Any]) -> None:
        self.__doc__ = method.__doc__
        self.__wrapped__ = method
        self.name = method.__name__

    def __get__(self, runner: Any, owner: type) -> Any:
        return self.__wrapped__ if runner is None else _Switch(self.__wrapped__, runner, self.name)

    def __set__(self, runner: object, value: object) -> None:
        raise AttributeError(f"self.{self.name} follows from the config, and cannot be set")


class _Switch:
    """A bound method that is true or false."""

    __slots__ = ("__wrapped__", "_name", "_runner")

    def __init__(self, method: Callable[..., Any], runner: Any, name: str) -> None:
        self.__wrapped__ = method
        self._runner = runner
        self._name = name

    def __call__(self, *values: Any, **named: Any) -> Any:
        return self.__wrapped__(self._runner, *values, **named)

    def __bool__(self) -> bool:
        return bool(getattr(self._runner.config, self._name))

    def __eq__(self, other: object) -> bool:
        return bool(self) == other

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{self._name}={bool(self)}"


class RunnerBase:
    """The vocabulary of a runner: types and meanings, no behaviour.

    An *iter* is one forward and backward, a *step* one optimizer update, an *epoch* one pass over the data.
    Counters count completed work. A *split* is one named part of the data (train, val, test).
    """

    # general ----------------------------------------------------------------------------------------------
    run_session: Whole[RunSession] = Whole(
        "session", "The run's folder while it is open: `run_session.files.drain()` waits for all saves."
    )
    config: Config
    """The user's config, with all defaults; frozen."""
    params: Any
    """The user's hyperparameters: `config.params`, as the model that the runner's annotation `params: MyParams`
    names."""
    mode: From[RunnerMode] = Mode("", "What the runner is doing now: train, evaluate or infer.")
    identity: From[Identity] = From("place", "Experiment id, run id, and the names that follow from them.")
    id: From[str] = From(
        "place",
        "First 8 characters of the experiment id and of the run id: same code and same config, same id.",
    )
    name: From[str] = From("place", "`{experiment_name}-{run_name}`, unless the config overrides it.")
    uuid: From[UUID] = From("place", "`uuid5(UUID(run_id), id)`.")
    timestamp: From[str] = From("place", "When the run was created: UTC, sortable, to the microsecond.")
    seed: From[int] = From("config", "The user's seed, exactly; 0 is a seed.")
    deterministic: From[bool] = From("config", "Whether torch was asked for deterministic algorithms.")

    # progress ---------------------------------------------------------------------------------------------
    iters: From[int] = From("progress", "Completed forward and backward passes.")
    steps: From[int] = From("progress", "Completed optimizer updates, skipped ones included.")
    epochs: From[int] = From("progress", "Completed epochs; while epoch e runs, `epochs == e`.")
    iter_begin: From[int] = From("progress", "Where the run began in iters; a resume never moves it.")
    step_begin: From[int] = From("progress", "Where the run began in steps; a resume never moves it.")
    epoch_begin: From[int] = From("progress", "Where the run began in epochs; a resume never moves it.")
    iter_end: From[int | None] = From("limits", "Where the run ends in iters; None where that is not known.")
    step_end: From[int | None] = From("limits", "Where the run ends in steps; None where that is not known.")
    epoch_end: From[int | None] = From(
        "limits", "Where the run ends in epochs; None where that is not known."
    )
    total_iters: From[int | None] = From("limits", "`iter_end - iter_begin`.")
    total_steps: From[int | None] = From("limits", "`step_end - step_begin`.")
    total_epochs: From[int | None] = From("limits", "`epoch_end - epoch_begin`.")
    steps_per_epoch: From[int | None] = From(
        "limits",
        "Optimizer steps in one epoch; None for unsized data without `steps_per_epoch` in the config.",
    )
    progress: From[float] = From(
        "limits", "`(done - begin) / total` in the unit that drives the loop, in [0, 1].", name="fraction"
    )
    bitwise: From[bool] = From(
        "setup", "Whether the run is, bit for bit, the one that was never interrupted.", name="is_bitwise"
    )
    resumed: From[dict[str, Any] | None] = From(
        "setup", "Where this process took the run up: step, epoch and record; None where nothing was there."
    )

    # model ------------------------------------------------------------------------------------------------
    model: Any
    """The model; wrapped in DDP from the start of `train()` where there are several ranks."""
    ema: Any
    """Average of the weights, or None: updated after each step taken, saved, used to evaluate and infer. One of your
    own is a `torch.optim.swa_utils.AveragedModel`, or has `update(model, taken)` and `module`."""
    criterion: Any
    """`criterion(prediction, target)` gives the mean loss of a batch, a scalar."""
    optimizer: Any
    """Set by hand, or built from the config's `optim`."""
    scheduler: Any
    """Set by hand, or built from the config's `scheduler`; None for a constant learning rate."""
    current_step: From[Step] = From(
        "step",
        "What the `train_step` under way counts for: weight, count, whether the optimizer steps.",
        name="value",
    )
    callbacks: Held[list[Any]] = Held(
        "callbacks", "Callbacks of the runner's own, called after those of the config.", name="own"
    )
    scheduler_interval: str | None
    """What the scheduler counts: "step", "epoch", or None for the config's word, else for what suits its class."""
    training_state: Whole[TrainingState] = Whole(
        "state", "All that a checkpoint holds, by name; `register(name, part)` adds a part of your own."
    )

    # data -------------------------------------------------------------------------------------------------
    datasets: HeldMapping[dict[str, Any]] = HeldMapping(
        "splits", "Split to data set: map-style, iterable, or a tuple of whole tensors."
    )
    datasamplers: HeldMapping[dict[str, Any]] = HeldMapping(
        "splits", "Split to sampler: the user's own, or those that the runner made."
    )
    dataloaders: HeldMapping[dict[str, Any]] = HeldMapping(
        "splits", "Split to loader: the user's own, or those that the runner made from `datasets`."
    )
    split: str | None
    """The split being trained or evaluated now."""
    tokens_per_sample: float | None = None
    """Tokens in one sample, for the curve `tokens_per_second`; None for none."""
    flops_per_sample: float | None = None
    """Floating-point operations of one sample, forward and backward, for the curves `teraflops_per_second` and
    `flops_utilisation`; None for none."""
    collate_fn: Callable[[Any], Any] | None = None
    """Makes a batch of a list of samples; None for torch's own way."""
    size_of: Callable[[Any], int] | None = None
    """Samples (or tokens) in a batch: the unit in which losses are weighted; None for the first dimension."""
    batch_size: From[int] = Running(
        "splits", "Samples in one batch of one rank, of the running split; else in training."
    )
    batch_size_equivalent: From[int] = From(
        "splits", "Samples in one optimizer step: batch x world x accumulation."
    )
    accum_steps: From[int] = From("config", "Iters in one optimizer step.")

    # results ----------------------------------------------------------------------------------------------
    results: From[dict[int, dict[str, dict[str, Any]]]] = From(
        "history",
        "`{epoch: {split: {metric: value}}}`; in step mode the key is the completed steps.",
        name="history",
    )
    latest_result: From[dict[str, Any] | None] = From("history", "The last result, with its `index`.")
    best_result: From[dict[str, Any] | None] = From(
        "history", "The result with the best score, with its `index`."
    )
    scores: From[dict[int, float]] = From("history", "`{index: score}`.")
    latest_score: From[float | None] = From("history", "Score of the last result.")
    best_score: From[float | None] = From(
        "history", "The best score; NaN is never best, the earliest wins a tie."
    )
    best_index: From[int | None] = From("history", "Key of the best result.")
    best_fn: From[Callable[..., Any]] = From("history", "`min` or `max`, after `score_mode`.")
    is_best: From[bool] = From("history", "Whether the best result is the latest one.")
    score_split: From[str | None] = From(
        "history", "The split that is scored: the config's, else val, validate, the second split, the first."
    )
    score_name: From[str] = From("history", "The metric that is the score.")

    # parallel ---------------------------------------------------------------------------------------------
    device: From[Any] = From("ranks", "This rank's device: `cpu`, or `cuda:{local_rank}`.")
    world_size: From[int] = From("ranks", "Number of ranks.")
    rank: From[int] = From("ranks", "This rank, in [0, world_size).")
    local_rank: From[int] = From("ranks", "This rank on its node.")
    distributed: From[bool] = From("ranks", "Whether there are several ranks.")
    is_main_process: From[bool] = From("ranks", "Whether this is rank 0.")
    is_local_main_process: From[bool] = From("ranks", "Whether this is the first rank of its node.")

    # storage ----------------------------------------------------------------------------------------------
    project_root: From[str] = From("config", "Where the project's runs are: any fsspec URL.")
    experiments_root: From[str] = From("config", "The older name of `project_root`.", name="project_root")
    dir: From[str] = From(
        "place", "The run's folder: `project_root/{name}-{id}/{timestamp}`, unless the config overrides it."
    )
    checkpoint_dir: From[str] = From("place", "Where checkpoints are kept: `dir/{checkpoint_dir_name}`.")
    checkpoint_dir_name: From[str] = From("config", "Name of the folder of checkpoints inside `dir`.")
    log_path: From[str] = From("place", "The text log: `dir/run.log`.")

    # logging ----------------------------------------------------------------------------------------------
    logger: logging.Logger
    """The logger named `danling`: the root logger is left alone; ranks other than 0 speak up for warnings only."""
    writer: Held[Any] = Held("session", "The TensorBoard writer, or None.")
    meters: Any
    """The running loss of the split being trained or evaluated."""
    metrics: Any
    """Anything with `update(prediction, target)`, `compute()` and `reset()`; used to train and to evaluate."""
    train_metrics: Any
    """Metrics for training alone, where they differ from `metrics`."""
    evaluate_metrics: Any
    """Metrics for evaluation alone, where they differ from `metrics`."""
    log: Any
    """Whether a text log is kept; called, it logs a value of a step."""
    tensorboard: From[bool] = From("config", "Whether TensorBoard curves are written.")
    log_interval: From[int | None] = From(
        "config",
        "Iters between two reports inside an epoch, or None; the reported epoch loss does not depend on it.",
    )
    save_interval: From[int | None] = From(
        "config", "Epochs between kept `epoch-N` checkpoints; `latest` and `best` are saved in any case."
    )
