"""Contents of a torch runner's checkpoint: the parts that a bitwise resume needs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from danling_core.data.batches import to_cpu
from danling_core.data.generators import generator_state, restore_generator
from danling_core.errors import CheckpointError, ConfigError
from danling_core.metrics import states as metric_states
from danling_core.parallel import seeding
from danling_core.parallel.environment import environment
from danling_core.parallel.modules import Slot
from danling_core.runner import bitwise
from danling_core.runner.data_trial import take_up_data
from danling_core.runner.parts import Parts
from danling_core.train import logged
from danling_core.train.meters import SplitMeter
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
    scheduler_interval: str | None
    meters: Any

    def backward(self, loss: torch.Tensor) -> None: ...

    def set_seed(self, seed: int | None = None, bias: int | bool | None = None) -> int: ...


def register_parts(parts: Parts, trained: Trained, metrics_in_use: Callable[[], Any]) -> None:
    """Register everything that the runner's own checkpoints hold in `parts.state`."""
    state = parts.state
    modules = parts.modules
    modules.add("model", Slot(lambda: trained.model, lambda module: setattr(trained, "model", module)))
    modules.add(
        "criterion", Slot(lambda: trained.criterion, lambda module: setattr(trained, "criterion", module))
    )
    state.register("mode", modules, shared=True)
    state.add("model", lambda: _model(parts).state_dict(), lambda s: _load_model(parts, s), Order.weights)
    state.add(
        "ema",
        lambda: None if trained.ema is None else trained.ema.module.state_dict(),
        lambda s: _load_average(parts, trained, s),
        Order.weights,
    )
    state.add(
        "average",
        lambda: _beside_module(trained.ema),
        lambda s: trained.ema.load_state_dict(s, strict=False) if s and trained.ema is not None else None,
        Order.weights,
    )
    state.add(
        "criterion",
        lambda: _state_of(modules.own.get("criterion", trained.criterion)),
        lambda s: _load_into(modules.own.get("criterion", trained.criterion), s),
        Order.weights,
    )
    state.add(
        "modules",
        lambda: _states_of(parts.other_modules),
        lambda s: _load_all(parts.other_modules, s),
        Order.weights,
    )
    state.add(
        "groups", lambda: _groups(parts, trained), lambda s: _take_groups(parts, trained, s), Order.weights
    )
    state.add(
        "optimizer",
        lambda: _state_of(trained.optimizer),
        lambda s: _load_into(trained.optimizer, s),
        Order.optimizers,
    )
    state.add(
        "scheduler",
        lambda: _state_of(trained.scheduler),
        lambda s: _load_into(trained.scheduler, s),
        Order.optimizers,
    )
    state.add(
        "optimizers",
        lambda: _states_of(_optimizers(parts)),
        lambda s: _load_all(_optimizers(parts), s),
        Order.optimizers,
    )
    state.add(
        "scalers",
        lambda: _states_of(_scalers(parts)),
        lambda s: _load_all(_scalers(parts), s),
        Order.optimizers,
    )
    state.register("progress", parts.progress, shared=True, order=Order.counters)
    state.register("results", parts.history, shared=True, order=Order.counters)
    state.register("epoch", parts.epoch, shared=True, order=Order.counters)
    state.register("streams", parts.splits, shared=True, order=Order.positions)
    state.add("config", parts.config.canonical)
    state.add("device", lambda: parts.ranks.device.type, lambda s: bitwise.compare_device(parts, s))
    state.add(
        "environment",
        lambda: environment(parts.ranks.device),
        lambda s: bitwise.compare_environment(parts, s),
    )
    state.add("data", parts.splits.given.facts, lambda s: bitwise.compare_data(parts, s))
    state.add("world_size", lambda: parts.ranks.world_size)
    _register_per_rank(parts, trained, metrics_in_use)


def _state_of(value: Any) -> Any:
    return value.state_dict() if hasattr(value, "state_dict") else None


def _load_into(value: Any, state: Any) -> None:
    if hasattr(value, "load_state_dict") and state:
        value.load_state_dict(state)


def _beside_module(average: Any) -> dict[str, Any] | None:
    """Return what an average knows besides its weights, such as how often it was updated."""
    if not isinstance(average, nn.Module):
        return None
    return {n: value for n, value in average.state_dict().items() if not n.startswith("module.")} or None


def _states_of(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.state_dict() for name, value in values.items()}


def _load_all(values: Mapping[str, Any], states: Mapping[str, Any] | None) -> None:
    for name, value in values.items():
        if states is not None and name in states:
            value.load_state_dict(states[name])


def _optimizers(parts: Parts) -> dict[str, Any]:
    """Return the optimizers and schedulers in attributes of the user's own."""
    found = parts.attributes
    return {} if found is None else {**found.optimizers, **found.schedulers}


def _scalers(parts: Parts) -> dict[str, Any]:
    return {stepper.name: stepper.scaler for stepper in parts.steppers if stepper.scaler is not None}


def _groups(parts: Parts, trained: Trained) -> dict[str, list[list[str]]]:
    """Return the names of the parameters in each group of each optimizer."""
    names = {id(parameter): name for name, parameter in parts.modules.parameters().items()}
    optimizers = {
        "optimizer": trained.optimizer,
        **({} if parts.attributes is None else parts.attributes.optimizers),
    }
    return {
        name: [[names.get(id(p), "") for p in group["params"]] for group in optimizer.param_groups]
        for name, optimizer in optimizers.items()
        if isinstance(optimizer, torch.optim.Optimizer)
    }


def _take_groups(parts: Parts, trained: Trained, state: Mapping[str, list[list[str]]] | None) -> None:
    """Add the groups that an optimizer had got while it trained, before its state is loaded."""
    parameters, now = parts.modules.parameters(), _groups(parts, trained)
    for name, groups in (state or {}).items():
        optimizer = (
            trained.optimizer
            if name == "optimizer"
            else getattr(parts.attributes, "optimizers", {}).get(name)
        )
        if optimizer is None or name not in now or groups[: len(now[name])] != now[name]:
            continue
        for group in groups[len(now[name]) :]:
            optimizer.add_param_group({"params": [parameters[each] for each in group]})


def _register_per_rank(parts: Parts, trained: Trained, metrics_in_use: Callable[[], Any]) -> None:
    state = parts.state

    def split_so_far() -> dict[str, Any] | None:
        epoch, metrics = parts.epoch, metrics_in_use()
        if epoch.split is None:
            return None
        return {
            "name": epoch.split,
            "meter": trained.meters.state_dict(),
            "losses": _states_of(parts.losses),
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
        lambda: own_buffers(_model(parts)) if parts.strategy.keeps_own_buffers else None,
        lambda s: _load_buffers(_model(parts), s),
        Order.weights,
    )
    state.add_per_rank(  # which no wrapper makes equal
        "other_buffers",
        lambda: {n: own_buffers(m) for n, m in _others(parts).items()} if parts.ranks.distributed else None,
        lambda s: _load_other_buffers(parts, s),
        Order.weights,
    )
    state.add_per_rank(
        "attributes",
        lambda: None if parts.attributes is None else parts.attributes.state_dict(),
        lambda s: bitwise.load_attributes(parts, s),
        Order.weights,
        lambda states: bitwise.load_attributes(parts, states[0] if states else None),
    )
    state.add_per_rank(
        "callbacks",
        lambda: to_cpu(parts.callbacks.state_dict()) or None,
        parts.callbacks.load_state_dict,
        Order.weights,
        lambda states: parts.callbacks.load_state_dict(states[0] if states else None),
    )
    state.add_per_rank(
        "sources",
        parts.splits.source_states,
        lambda s: take_up_data(parts, s or {}),
        Order.positions,
        lambda states: take_up_data(parts, {}),
    )
    state.add_per_rank(  # once the positions are there, which some of them know
        "samplers",
        lambda: bitwise.sampler_states(parts),
        lambda s: bitwise.compare_samplers(parts, s),
        Order.generators,
    )
    state.add_per_rank("split", split_so_far, keep_split, Order.positions, merge_splits)
    state.add_per_rank("rng", parts.generators.state, seeding.restore_rng, Order.generators, reseed)
    state.add_per_rank(
        "data_generators",
        lambda: (
            {path: generator_state(each) for path, each in parts.splits.given.generators().items()} or None
        ),
        lambda s: _restore_generators(parts, s),
        Order.generators,
    )


def _restore_generators(parts: Parts, states: Mapping[str, Any] | None) -> None:
    for path, generator in parts.splits.given.generators().items() if states else ():
        if states and path in states:
            restore_generator(generator, states[path])


def begin_split(parts: Parts, meter: SplitMeter, metrics: Any) -> None:
    """Take up the split that training is about to begin where a checkpoint inside it left off."""
    epoch, progress = parts.epoch, parts.progress
    epoch.iters_before, epoch.steps_before = progress.iters, progress.steps
    state, parts.split_state = parts.split_state, None
    if state is None or state["name"] != epoch.split:
        return
    meter.load_state_dict(state["meter"])
    _load_all(parts.losses, state["losses"])
    epoch.iters_before, epoch.steps_before = state["iters_before"], state["steps_before"]
    if metrics is not None:
        metric_states.restore(metrics, state["metrics"], parts.ranks.device)


def _model(parts: Parts) -> nn.Module:
    """Return the user's model as it is trained, also while an evaluation has the averaged one in its place."""
    model = parts.modules.own.get("model")
    if model is None:
        raise ConfigError("the runner has no model yet: assign self.model in __init__")
    return model


def _others(parts: Parts) -> dict[str, nn.Module]:
    return {name: module for name, module in parts.modules.own.items() if name != "model"}


def _load_model(parts: Parts, state: Any) -> None:
    if state is None:
        raise CheckpointError("the state has no 'model': it is no state of a whole training")
    _model(parts).load_state_dict(state)


def _load_average(parts: Parts, trained: Trained, state: Any) -> None:
    """Load the averaged weights; a state without them starts the average from its model, which is loaded by now."""
    if trained.ema is not None:
        trained.ema.module.load_state_dict(_model(parts).state_dict() if state is None else state)


def _load_other_buffers(parts: Parts, saved: Mapping[str, Any] | None) -> None:
    for name, module in _others(parts).items():
        _load_buffers(module, (saved or {}).get(name))


def _load_buffers(module: Any, saved: Mapping[str, Any] | None) -> None:
    for name, buffer in module.named_buffers() if saved else ():
        if saved and name in saved:
            buffer.copy_(saved[name])


def _merged_split(states: list[dict[str, Any]], metrics: Any, *, is_first: bool) -> dict[str, Any] | None:
    """Add up what all former ranks had counted, for rank 0; the others count from nothing."""
    if not states:
        return None
    counted = None
    if metrics is not None and all(state["metrics"] is not None for state in states):
        counted = metric_states.merged(metrics, [state["metrics"] for state in states], is_first=is_first)
    share = 1 if is_first else 0
    return {
        **{name: states[0][name] for name in ("name", "iters_before", "steps_before")},
        "meter": _sum([state["meter"] for state in states], share),
        "losses": {
            name: _sum([state["losses"][name] for state in states], share) for name in states[0]["losses"]
        },
        "metrics": counted,
    }


def _sum(meters: list[dict[str, Any]], share: int) -> dict[str, Any]:
    """Return the states of one meter on all former ranks as one, times 1 or 0."""
    total, count = (share * sum(meter[name] for meter in meters) for name in ("total", "count"))
    logged_values = logged.merged([meter.get("logged", {}) for meter in meters]) if share else {}
    return {"total": total, "count": count, "iters": meters[0]["iters"], "logged": logged_values}
