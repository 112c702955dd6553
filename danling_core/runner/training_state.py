"""Contents of a torch runner's checkpoint: the parts that a bitwise resume needs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import nn

from danling_core.errors import CheckpointError
from danling_core.metrics import states as metric_states
from danling_core.parallel import seeding
from danling_core.parallel.strategies import unwrap
from danling_core.runner.parts import Parts
from danling_core.train.meters import LossMeter
from danling_core.train.state import Order

logger = logging.getLogger("danling")
_OTHER_WORLD_SEED = 1_000_003


class Trained(Protocol):
    """Attributes that a user sets and training changes; the runner itself."""

    model: Any
    ema: Any
    criterion: Any
    optimizer: Any
    scheduler: Any
    meters: Any

    def set_seed(self, seed: int | None = None, bias: int | bool | None = None) -> int: ...


def register_parts(parts: Parts, trained: Trained, metrics_in_use: Callable[[], Any]) -> None:
    """Register everything that the runner's own checkpoints hold in `parts.state`."""
    state = parts.state
    state.add(
        "model", lambda: unwrap(trained.model).state_dict(), lambda s: _load_model(trained, s), Order.weights
    )
    state.add(
        "ema",
        lambda: None if trained.ema is None else trained.ema.module.state_dict(),
        lambda s: _load_average(trained, s),
        Order.weights,
    )
    for name, order in (
        ("criterion", Order.weights),
        ("optimizer", Order.optimizers),
        ("scheduler", Order.optimizers),
    ):
        _add_attribute(parts, trained, name, order)
    state.add(
        "scaler",
        lambda: None if parts.precision.scaler is None else parts.precision.scaler.state_dict(),
        lambda s: parts.precision.scaler.load_state_dict(s) if parts.precision.scaler and s else None,
        Order.optimizers,
    )
    state.register("progress", parts.progress, shared=True, order=Order.counters)
    state.register("results", parts.history, shared=True, order=Order.counters)
    state.register("epoch", parts.epoch, shared=True, order=Order.counters)
    state.register("streams", parts.splits, shared=True, order=Order.positions)
    state.add("config", parts.config.canonical)
    state.add("device", lambda: parts.ranks.device.type, lambda s: _compare_device(parts, s))
    state.add("world_size", lambda: parts.ranks.world_size)
    _register_per_rank(parts, trained, metrics_in_use)


def _add_attribute(parts: Parts, trained: Trained, name: str, order: Order) -> None:
    """Register an attribute of the runner, as it is when a checkpoint is made: None, or anything with a state."""

    def save() -> Any:
        value = getattr(trained, name)
        return value.state_dict() if hasattr(value, "state_dict") else None

    def load(state: Any) -> None:
        value = getattr(trained, name)
        if hasattr(value, "load_state_dict") and state:
            value.load_state_dict(state)

    parts.state.add(name, save, load, order)


def _register_per_rank(parts: Parts, trained: Trained, metrics_in_use: Callable[[], Any]) -> None:
    state = parts.state

    def split_so_far() -> dict[str, Any] | None:
        epoch, metrics = parts.epoch, metrics_in_use()
        if epoch.split is None:
            return None
        return {
            "name": epoch.split,
            "meter": trained.meters.state_dict(),
            "metrics": metric_states.saved(metrics) if metrics is not None else None,
            "iters_before": epoch.iters_before,
            "steps_before": epoch.steps_before,
        }

    def keep_split(saved: Any) -> None:
        parts.split_state = saved

    def merge_splits(saved: list[Any]) -> None:
        parts.split_state = _merged_split(saved, metrics_in_use(), is_first=parts.ranks.is_main_process)

    def reseed(saved: list[Any]) -> None:
        trained.set_seed(parts.config.seed + _OTHER_WORLD_SEED * (parts.progress.steps + 1))

    def own_buffers(module: Any) -> Any:
        if not isinstance(module, nn.Module):
            return None
        return {name: buffer.cpu().clone() for name, buffer in module.named_buffers()}

    state.add_per_rank(
        "buffers",
        lambda: own_buffers(unwrap(trained.model)) if parts.strategy.keeps_own_buffers else None,
        lambda s: _load_buffers(unwrap(trained.model), s),
        Order.weights,
    )
    state.add_per_rank(  # DDP does not know the criterion
        "criterion",
        lambda: own_buffers(trained.criterion) if parts.ranks.distributed else None,
        lambda s: _load_buffers(trained.criterion, s),
        Order.weights,
    )
    state.add_per_rank("split", split_so_far, keep_split, Order.positions, merge_splits)
    state.add_per_rank("rng", parts.generators.state, seeding.restore_rng, Order.generators, reseed)


def begin_split(parts: Parts, meter: LossMeter, metrics: Any) -> None:
    """Take up the split that training is about to begin where a checkpoint inside it left off."""
    epoch, progress = parts.epoch, parts.progress
    epoch.iters_before, epoch.steps_before = progress.iters, progress.steps
    state, parts.split_state = parts.split_state, None
    if state is None or state["name"] != epoch.split:
        return
    meter.load_state_dict(state["meter"])
    epoch.iters_before, epoch.steps_before = state["iters_before"], state["steps_before"]
    if metrics is not None:
        metric_states.restore(metrics, state["metrics"], parts.ranks.device)


def _load_model(trained: Trained, state: Any) -> None:
    if state is None:
        raise CheckpointError("the state has no 'model': it is no state of a whole training")
    unwrap(trained.model).load_state_dict(state)


def _load_average(trained: Trained, state: Any) -> None:
    """Load the averaged weights; a state without them starts the average from its model, which is loaded by now."""
    if trained.ema is not None:
        trained.ema.module.load_state_dict(unwrap(trained.model).state_dict() if state is None else state)


def _load_buffers(module: Any, saved: Mapping[str, Any] | None) -> None:
    for name, buffer in module.named_buffers() if saved else ():
        if saved and name in saved:
            buffer.copy_(saved[name])


def _compare_device(parts: Parts, device: str | None) -> None:
    here = parts.ranks.device.type
    if device not in (None, here):
        parts.setup.is_bitwise = False
        logger.warning("the run was on %s and goes on with %s: it will not be bitwise equal", device, here)


def _merged_split(states: list[dict[str, Any]], metrics: Any, *, is_first: bool) -> dict[str, Any] | None:
    """Add up what all former ranks had counted, for rank 0; the others count from nothing."""
    if not states:
        return None
    counted = None
    if metrics is not None and all(state["metrics"] is not None for state in states):
        counted = metric_states.merged(metrics, [state["metrics"] for state in states], is_first=is_first)
    meters = [state["meter"] for state in states]
    share = 1 if is_first else 0
    return {
        **{name: states[0][name] for name in ("name", "iters_before", "steps_before")},
        "meter": {
            "total": share * sum(meter["total"] for meter in meters),
            "count": share * sum(meter["count"] for meter in meters),
            "iters": meters[0]["iters"],
        },
        "metrics": counted,
    }
