"""Parts of a runner, which know no runner, in the one private attribute that it has."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from danling_core.results.history import Results
from danling_core.session import context
from danling_core.session.place import RunPlace
from danling_core.session.session import RunSession
from danling_core.train.epoch import EpochState, is_trained
from danling_core.train.limits import Limits
from danling_core.train.progress import Progress
from danling_core.train.state import TrainingState
from danling_core.train.step import ALONE, Step

if TYPE_CHECKING:
    from danling_core.callbacks import Callbacks
    from danling_core.config import Config
    from danling_core.data.splits import DataSplits
    from danling_core.optim.precision import Precision
    from danling_core.parallel.modules import Modules
    from danling_core.parallel.ranks import Ranks
    from danling_core.parallel.seeding import Generators
    from danling_core.parallel.stopping import NeverStopping, Stopping
    from danling_core.parallel.strategies import SingleRank
    from danling_core.runner.attributes import Attributes, ModuleState
    from danling_core.train.evaluator import Evaluator
    from danling_core.train.meters import LossMeter
    from danling_core.train.progress_report import ProgressReport
    from danling_core.train.stepper import Steppers
    from danling_core.train.timing import Timings

logger = logging.getLogger("danling")


@dataclass
class SetUp:
    """State of the setting up, and what a resume found.

    Args:
        is_placed: the model is on its device.
        is_trainable: optimizer, schedule and wrapped model are there.
        is_announced: the ranks listen for a stop, and the writers are open.
        was_announced: they did, also where a stop has ended that.
        has_weights: the weights are those of a checkpoint or of training, so that an evaluation resumes nothing.
        is_resume_due: a call of `train` must still look for a checkpoint.
        resumed: step, epoch and record that this process went on from, or None.
        begun_with: the weights or the state that the config had a new run begin with, or None.
        is_bitwise: whether the run is the same, bit for bit, as one that was never interrupted.
        reasons: why it is not.
        is_stepped: a first step was made.
        to_evaluate_at_end: the splits of an evaluate stage that follows the training.
        is_under_way: set-up is being made now, and a resume in it.
    """

    is_placed: bool = False
    is_trainable: bool = False
    is_announced: bool = False
    was_announced: bool = False
    has_weights: bool = False
    is_resume_due: bool = True
    resumed: dict[str, Any] | None = None
    begun_with: dict[str, Any] | None = None
    is_bitwise: bool = True
    reasons: list[str] = field(default_factory=list)
    is_under_way: bool = False
    is_stepped: bool = False
    to_evaluate_at_end: list[str] = field(default_factory=list)

    def not_bitwise(self, reason: str) -> None:
        """Say why the run is not the same as one that was never interrupted, and warn of it."""
        self.is_bitwise = False
        if reason not in self.reasons:
            self.reasons.append(reason)
            logger.warning("%s: the run will not be bitwise equal to one that was not interrupted", reason)

    @contextlib.contextmanager
    def under_way(self) -> Iterator[None]:
        """Say inside the block that the set-up is being made."""
        before, self.is_under_way = self.is_under_way, True
        try:
            yield
        finally:
            self.is_under_way = before


class CurrentStep:
    """The step that is being made; as a context, the end of it."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: Step = ALONE

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None:  # a failed step is kept, for its error message
            self.value = ALONE


@dataclass
class Parts:
    """All parts of one runner. `attributes` is there once they are looked at, and `steppers` has some once the run is
    trainable.

    Args:
        stated: what the user's config states, without defaults.
        other_modules: the states of modules in attributes of the user's own.
        saves_due: saves that were asked for inside a step, to be made at its end.
        losses: the running losses of all optimizers but the first, by the name of the optimizer.
        split_state: what a checkpoint taken inside a split had counted of it, until training takes it up.
    """

    config: Config
    stated: dict[str, Any]
    place: RunPlace
    ranks: Ranks
    progress: Progress
    history: Results
    limits: Limits
    splits: DataSplits
    session: RunSession
    precision: Precision
    strategy: SingleRank
    modules: Modules
    steppers: Steppers
    evaluator: Evaluator
    timings: Timings
    report: ProgressReport
    stop: Stopping | NeverStopping
    callbacks: Callbacks
    generators: Generators
    epoch: EpochState = field(default_factory=EpochState)
    state: TrainingState = field(default_factory=TrainingState)
    setup: SetUp = field(default_factory=SetUp)
    step: CurrentStep = field(default_factory=CurrentStep)
    saves_due: list[Callable[[], None]] = field(default_factory=list)
    attributes: Attributes | None = None
    losses: dict[str, LossMeter] = field(default_factory=dict)
    other_modules: dict[str, ModuleState] = field(default_factory=dict)
    split_state: dict[str, Any] | None = None

    def adopt(self, before: Parts) -> None:
        """Take over data, place, group of ranks and the user's own state from the parts of another config."""
        self.ranks.adopt(before.ranks)
        self.splits.take_data(before.splits)
        self.state.adopt(before.state)
        self.callbacks.own = before.callbacks.own
        self.place.context, self.place.created_at = before.place.context, before.place.created_at


class Methods(Protocol):
    """Methods of a runner that its parts call, since a user may override them."""

    collate_fn: Any
    size_of: Any
    tokens_per_sample: float | None
    flops_per_sample: float | None

    def emit(self, kind: str, **fields: Any) -> None: ...

    def init_logging(self) -> None: ...

    def close(self) -> None: ...


def make_parts(config: Config, stated: dict[str, Any], runner: Methods) -> Parts:
    """Make the parts of a torch runner.

    Args:
        config: with all defaults.
        stated: what the user's config states of it.
        runner: whose methods the parts call.
    """
    from danling_core.data.splits import DataSplits
    from danling_core.optim.precision import Precision
    from danling_core.parallel.modules import Modules
    from danling_core.parallel.ranks import Ranks
    from danling_core.parallel.seeding import Generators
    from danling_core.parallel.stopping import NeverStopping
    from danling_core.parallel.strategies import strategy_for
    from danling_core.runner.resolve import make_callbacks
    from danling_core.train.evaluator import Evaluator
    from danling_core.train.progress_report import ProgressReport
    from danling_core.train.stepper import Steppers
    from danling_core.train.timing import Timings

    def emit(kind: str, **fields: Any) -> None:
        if session.is_open:  # a loop of the user's own may have no run
            runner.emit(kind, **fields)

    ranks = Ranks(config.device)
    device = ranks.device
    strategy = strategy_for(config, ranks, device)
    splits = DataSplits(
        config, ranks, device.type, collate_fn=lambda: runner.collate_fn, size_of=lambda: runner.size_of
    )
    place = RunPlace(config, type(runner), context.current())
    progress, timings = Progress.of(config), Timings()
    limits = Limits(config, progress, splits.lengths)
    history = Results(config.score_split, config.score_name, config.score_mode)
    session = RunSession(
        config,
        place,
        ranks,
        progress=progress,
        history=history,
        limits=limits,
        emit=emit,
        open_log=lambda: runner.init_logging(),
        close=lambda: runner.close(),
        stop=lambda: parts.stop,
    )
    parts = Parts(
        config=config,
        stated=stated,
        place=place,
        ranks=ranks,
        progress=progress,
        history=history,
        limits=limits,
        splits=splits,
        session=session,
        precision=Precision(config.precision, device.type, skip_non_finite=config.non_finite == "skip"),
        strategy=strategy,
        modules=Modules(strategy),
        steppers=Steppers(),
        evaluator=Evaluator(device, is_stop_requested=lambda: parts.stop.requested, beat=session.beat),
        timings=timings,
        report=ProgressReport(
            emit,
            progress,
            limits,
            timings,
            steppers=lambda: parts.steppers.curves(),
            units=lambda: {"tokens": runner.tokens_per_sample, "flops": runner.flops_per_sample},
            world_size=ranks.world_size,
            device=device,
            has_curves=config.tensorboard or bool(config.loggers),
        ),
        stop=NeverStopping(),
        callbacks=make_callbacks(config, lambda: place.work_dir),
        generators=Generators(),
    )
    return parts


def still_to_do(parts: Parts, stages: Sequence[str]) -> str | None:
    """Return what a complete run has and this one lacks after these stages, if anything."""
    if not is_trained(parts.config, parts.progress, parts.history, parts.epoch):
        return "training is not over"
    return None if "evaluate" in stages else "stage evaluate is still to do"
