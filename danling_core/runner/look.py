"""A look before the leap: a few batches through a copy of the runner, before the first step; nothing is left of it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from danling_core.data.batches import to_device
from danling_core.data.generators import KINDS, generator_state, restore_generator
from danling_core.data.round_robin import RoundRobinBatches
from danling_core.data.user_loader import putting_back
from danling_core.errors import ConfigError, DanLingError, RunInterrupted
from danling_core.metrics.states import is_of_torchmetrics
from danling_core.parallel import seeding
from danling_core.parallel.modules import Modules, Slot
from danling_core.parallel.strategies import SingleRank
from danling_core.results.values import flatten
from danling_core.runner import aside
from danling_core.runner.base import RunnerMode
from danling_core.runner.parts import CurrentStep, Parts, SetUp
from danling_core.session.files import NoFiles
from danling_core.train.epoch import EpochState
from danling_core.train.evaluator import Evaluator, computed, joined_values
from danling_core.train.meters import LossMeter, SplitMeter
from danling_core.train.step import REHEARSAL
from danling_core.train.stepper import Stepper, Steppers

logger = logging.getLogger("danling")

_LIMIT_SECONDS = 60.0
_LARGEST_COPY_BYTES = 2 << 30
_MOST_BYTES = 512 << 20  # of an attribute, beside the modules
_MOST_OBJECTS = 100_000


def look(parts: Parts, runner: Any, train_splits: Sequence[str], evaluate_splits: Sequence[str]) -> None:
    """Pass a batch of each trained split, and `sanity_batches` of each evaluation split, through the runner's steps.

    On each rank by itself: no collective, no file, nothing counted. On CPUs in a fork, so that nothing is left of it.
    With a GPU on copies of modules and attributes, and random generators are put back.

    Raises:
        ConfigError: what would have failed later, after minutes of training.
    """
    splits = train_splits, evaluate_splits
    if aside.can_fork(parts.ranks.device) and not torch.cuda.is_initialized():
        aside.in_a_fork(
            lambda: _try_steps(parts, _as_it_is(parts, runner), *splits),
            parts.session.beat,
            _LIMIT_SECONDS,
            "the look before the first step",
        )
        return
    size = sum(
        t.numel() * t.element_size() for m in parts.modules.own.values() for t in m.state_dict().values()
    )
    if size > _LARGEST_COPY_BYTES:
        logger.info(
            "no look before the first step: a copy of the modules would take %.1f GiB", size / (1 << 30)
        )
        return
    with _generators_put_back(parts):
        _try_steps(parts, _copy_of(parts, runner), *splits)


def _try_steps(parts: Parts, probe: Any, train_splits: Sequence[str], evaluate_splits: Sequence[str]) -> None:
    for split in train_splits:
        with _explained("train_step", split):
            _train(probe, split)
    for split in evaluate_splits:
        with _explained("evaluate_step", split):
            _evaluate(probe, split, parts.config.sanity_batches)


def _evaluate(probe: Any, split: str, count: int) -> None:
    parts: Parts = probe._parts
    loader = parts.splits.evaluate_loader(split)
    given = loader.loader if isinstance(loader, RoundRobinBatches) else loader
    if hasattr(type(given), "__next__"):
        return  # an iterator of the user's own, which can be read once
    probe.split, probe.mode, probe.meters = split, RunnerMode.evaluate, SplitMeter()
    metrics = probe.evaluate_metrics if probe.evaluate_metrics is not None else probe.metrics
    evaluator = Evaluator(parts.ranks.device, is_stop_requested=lambda: False, beat=lambda: None)
    with parts.modules.evaluating(None), putting_back(given):
        count = min(count, parts.splits.most(split) or count)
        if not evaluator.evaluate(loader, probe.evaluate_step, probe.meters, probe.size_of, most=count):
            return  # fewer samples than ranks
    losses = {"loss": probe.meters.mean} if probe.meters.count else {}
    values = joined_values(joined_values(losses, probe.meters.logged.values()), computed(metrics))
    if not values:
        raise ConfigError(
            "it reports nothing: let it return (prediction, loss), set self.criterion, or give self.metrics"
        )
    history = parts.history
    names = flatten(values)
    if history.score_split == split and history.score_name not in names:
        raise ConfigError(
            f"score_name is {history.score_name!r}, but split {split!r} reports {sorted(names)}: choose one of these"
        )


def _train(probe: Any, split: str) -> None:
    parts: Parts = probe._parts
    stream = parts.splits.stream(split)
    if hasattr(type(stream.loader), "__next__"):
        return
    probe.split, probe.mode, probe.meters = split, RunnerMode.train, SplitMeter(count=lambda: 0)
    parts.losses = {stepper.name: LossMeter() for stepper in parts.steppers}
    parts.modules.train()
    batch = stream.first_batch()
    if batch is None:
        raise ConfigError("its data is empty")
    metrics = probe.train_metrics if probe.train_metrics is not None else probe.metrics
    with probe.in_step(REHEARSAL):
        stand_ins = probe.metrics, probe.train_metrics
        probe.train_step(to_device(batch, parts.ranks.device))
    if not any(stepper.rehearsed for stepper in parts.steppers):
        raise ConfigError("it never called self.advance(loss): nothing would be trained")
    is_updated = any(getattr(each, "was_updated", True) for each in stand_ins)
    if metrics is not None and not is_updated and parts.ranks.is_main_process:
        logger.warning(
            "train_step of split %r never updates the metrics, which will have counted nothing in training: call "
            "self.update_metrics(pred, target) in it, or set self.evaluate_metrics in place of self.metrics",
            split,
        )
    losses = ["loss", *(f"loss_{stepper.name}" for stepper in list(parts.steppers)[1:])]
    known = joined_values(dict.fromkeys(losses), dict.fromkeys(probe.meters.logged.names))
    if hasattr(metrics, "keys"):
        joined_values(known, dict.fromkeys(metrics.keys()))


def _copy_of(parts: Parts, runner: Any) -> Any:
    """Return a runner with copies of the user's attributes, which has no run, no wrappers and no schedule."""
    probe = copy.copy(runner)
    wrapped, own = parts.modules.wrapped, parts.modules.own
    memo: dict[int, Any] = {id(runner): probe, id(parts): None, id(runner.params): runner.params}
    for name, module in own.items():
        memo[id(wrapped[name])] = copy.deepcopy(module, memo)
    for name, value in vars(runner).items():
        if name != "_parts" and (shared := _shared(value, memo)) is not None:
            with contextlib.suppress(Exception):  # what cannot be copied is used as it is
                vars(probe)[name] = copy.deepcopy(value, shared)
    _set_apart(probe, parts, {name: memo[id(wrapped[name])] for name in own}, memo)
    return probe


def _as_it_is(parts: Parts, runner: Any) -> Any:
    """Return the runner itself, without wrappers, run and schedule: for a fork, which it belongs to."""
    own = parts.modules.own
    for name, module in own.items():
        if module is not parts.modules.wrapped[name]:
            parts.modules.put(name, module)
    _set_apart(runner, parts, own, {})
    return runner


def _set_apart(probe: Any, parts: Parts, own: Mapping[str, Any], memo: Mapping[int, Any]) -> None:
    """Give a runner parts that have nothing to do with other ranks, and write nothing."""
    modules = Modules(SingleRank())
    for name, module in own.items():
        modules.add(name, Slot(lambda m=module: m, lambda new: None))  # type: ignore[misc]
    session = copy.copy(parts.session)
    session.files, session.is_open, session.services = NoFiles(), True, ()
    session.writer = _Silent() if parts.config.tensorboard else None
    steppers = [
        Stepper(memo.get(id(each.optimizer), each.optimizer), [], parts.precision, name=each.name)
        for each in parts.steppers
    ]
    probe._parts = dataclasses.replace(
        parts,
        modules=modules,
        session=session,
        steppers=Steppers(steppers),
        progress=copy.copy(parts.progress),
        epoch=EpochState(),
        setup=SetUp(is_placed=True, is_trainable=True, is_announced=True, is_resume_due=False),
        step=CurrentStep(),
        saves_due=[],
    )
    for metrics in (probe.metrics, probe.train_metrics, probe.evaluate_metrics):
        _keep_to_this_rank(metrics)


def _shared(value: Any, memo: dict[int, Any]) -> dict[int, Any] | None:
    """Return the memo for a copy of an attribute that shares its data: data sets, loaders and what is too large.

    None where the attribute has too many parts for a copy.
    """
    seen, waiting, left = {id(value)}, [value], _MOST_BYTES
    while waiting:
        found = waiting.pop()
        if id(found) in memo:
            continue
        size = _size(found)
        if isinstance(found, Dataset | DataLoader) or size > left:
            memo[id(found)] = found
            continue
        left -= size
        inner = list(found.values()) if isinstance(found, Mapping) else []
        inner += found if isinstance(found, list | tuple | set | frozenset | deque) else []
        inner += getattr(found, "__dict__", {}).values() if not isinstance(found, type | ModuleType) else []
        new = {id(each): each for each in inner if id(each) not in seen}
        seen |= new.keys()
        waiting += new.values()
        if len(seen) > _MOST_OBJECTS:
            return None
    return memo


def _size(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    size = getattr(value, "nbytes", 0)
    return max(size if isinstance(size, int) else 0, sys.getsizeof(value, 0))


def _keep_to_this_rank(metrics: Any) -> None:
    """Have metrics of torchmetrics compute without the other ranks."""
    if isinstance(metrics, Mapping):
        for metric in metrics.values():
            _keep_to_this_rank(metric)
    elif is_of_torchmetrics(metrics):
        metrics.sync_on_compute = False
        metrics._to_sync = False


@contextlib.contextmanager
def _generators_put_back(parts: Parts) -> Iterator[None]:
    others = {} if parts.attributes is None else parts.attributes.others
    own = {
        **parts.splits.given.generators(),
        **{f"self.{n}": g for n, g in others.items() if isinstance(g, KINDS)},
    }
    before = seeding.capture_rng()
    states = {path: generator_state(generator) for path, generator in own.items()}
    try:
        yield
    finally:
        for path, generator in own.items():
            restore_generator(generator, states[path])
        seeding.restore_rng(before)


@contextlib.contextmanager
def _explained(step: str, split: str) -> Iterator[None]:
    """Raise what goes wrong as a ConfigError that says where, and that nothing was trained."""
    try:
        yield
    except RunInterrupted:
        raise
    except torch.cuda.OutOfMemoryError:  # the copy was too much: whether training is, it says itself
        logger.info("%s of split %r is not tried before the first step: no memory for a copy", step, split)
    except DanLingError as error:
        raise type(error)(f"{step} of split {split!r}, tried before the first step: {error}") from error
    except Exception as error:
        raise ConfigError(
            f"{step} of split {split!r} failed when it was tried before the first step: {type(error).__name__}: "
            f"{error} (sanity_batches=0 leaves this look out)"
        ) from error


class _Silent:
    """Stand-in for a writer: takes everything, and writes nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *values, **named: None
