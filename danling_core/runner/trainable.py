"""Steps that make a runner trainable: modules in their places, optimizers, schedules, steppers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from danling_core.config import Config
from danling_core.config.sections import AverageConfig
from danling_core.errors import ConfigError, NonFiniteLossError
from danling_core.optim.averages import EMA, SWA, Average
from danling_core.optim.optimizers import build_optimizer, check_closure, parameter_groups
from danling_core.optim.schedulers import build_scheduler, default_interval, needs_metric
from danling_core.parallel.strategies import unwrap
from danling_core.runner import set_up
from danling_core.runner.attributes import Attributes, ModuleState
from danling_core.runner.compiling import compiler, recompute_activations
from danling_core.runner.parts import Parts
from danling_core.runner.training_state import Trained
from danling_core.train.limits import Limits
from danling_core.train.meters import LossMeter, SplitMeter
from danling_core.train.stepper import Stepper, Steppers

logger = logging.getLogger("danling")
_METRICS = ("metrics", "train_metrics", "evaluate_metrics")


def place(parts: Parts, runner: Trained) -> None:
    """Find what the runner holds, and move the modules, and what belongs to them, to the device. Collective."""
    _find_attributes(parts, runner)
    config, device = parts.config, parts.ranks.device
    parts.modules.place(device, **({"memory_format": torch.channels_last} if config.channels_last else {}))
    if config.averaging is not None:
        if runner.ema is not None:
            raise ConfigError(
                "the config has an average of the weights, and the runner sets self.ema: take out one of the two"
            )
        total_steps = parts.limits.total_steps if parts.splits.to_train() else 0
        runner.ema = average_of(config.averaging, runner.model, total_steps)
    for part in (runner.ema, *(getattr(runner, name) for name in _METRICS)):
        if hasattr(part, "to"):
            part.to(device)
    parts.setup.is_placed = True
    if parts.ranks.is_main_process:
        set_up.warn_of_emulated_bf16(config, device)


def make_trainable(parts: Parts, runner: Trained, train_splits: Sequence[str]) -> None:
    """Build optimizer and schedule where the runner has none, and wrap the modules. Collective.

    Raises:
        ConfigError: something of it cannot be trained.
    """
    config, is_main = parts.config, parts.ranks.is_main_process
    for key, attribute in (("optim", runner.optimizer), ("scheduler", runner.scheduler)):
        if getattr(config, key) is not None and attribute is not None:
            raise ConfigError(
                f"the config has a section {key!r}, and the runner sets self.{'optimizer' if key == 'optim' else key}, "
                "so that the section has no effect, and two runs that differ in it would be the same: take out one of "
                "the two"
            )
    if config.steps_per_epoch is not None and len(train_splits) > 1:
        raise ConfigError(f"steps_per_epoch goes with one split to train on, found {list(train_splits)}")
    parts.splits.trained = tuple(train_splits)
    if train_splits:
        parts.splits.check_reach(parts.limits.step_end)
    parts.modules.train()
    for sampler in [parts.splits.batch_sampler(split) for split in train_splits]:
        if is_main:
            set_up.warn_of_single_samples(runner.model, sampler, parts.ranks.world_size)
    _check_average(runner.ema)
    has_own = parts.attributes is not None and bool(parts.attributes.optimizers)
    if runner.optimizer is None and (config.optim is not None or not has_own):
        runner.optimizer = optimizer_of(config, runner.model)
    optimizers = _optimizers_of(parts, runner.optimizer)
    has_scheduler = runner.scheduler is not None
    if not has_scheduler:
        first = next(iter(optimizers.values()))
        runner.scheduler = scheduler_of(config, first, parts.limits, parts.history.score_mode)
    interval, by_epoch = runner.scheduler_interval, parts.progress.by_epoch
    by_steps = _counts_steps(runner.scheduler, interval, config, by_epoch=by_epoch)
    _check_plateau(runner.scheduler, parts.history.score_mode)
    if is_main and has_scheduler and interval is None and not needs_metric(runner.scheduler):
        logger.info(
            "self.scheduler, a %s, steps once per %s; self.scheduler_interval = 'step' or 'epoch' says so or otherwise",
            *(type(runner.scheduler).__name__, "step" if by_steps else "epoch"),
        )
    held = [p for each in optimizers.values() for group in each.param_groups for p in group["params"]]
    recompute_activations(parts.modules.own["model"], config.activation_checkpointing)
    parts.modules.wrap(held, compiler(config))
    if parts.ranks.distributed and runner.ema is not None:
        runner.ema.module.load_state_dict(parts.modules.own["model"].state_dict())
    parts.steppers = _make_steppers(parts, runner, optimizers, runner.scheduler if by_steps else None)
    _drop_left_out(parts, held)
    trained = {id(parameter) for parameter in held}
    for name, module in parts.modules.own.items():
        if name not in ("model", "criterion"):
            is_trained = any(id(parameter) in trained for parameter in module.parameters())
            parts.other_modules[name] = ModuleState(name, parts.modules, is_trained)
    if is_main:
        _warn_of_untrained(parts, trained)
        set_up.warn_of_texts(config.params)
        _say_what_is_saved(parts)


def check_unchanged(parts: Parts, runner: Trained, split: str) -> None:
    """Refuse to train what is no longer in its place: data, optimizer, scheduler or model that were replaced since.

    Raises:
        ConfigError: says which.
    """
    parts.splits.check_unchanged(split)
    first = parts.steppers.first
    if first is None:
        return
    own = {} if parts.attributes is None else parts.attributes.optimizers
    now = {
        "optimizer": runner.optimizer,
        **{name: getattr(runner, name, None) for name in own if "." not in name},
    }
    for stepper in parts.steppers:
        if stepper.name in now and now[stepper.name] is not stepper.optimizer:
            raise ConfigError(
                f"self.{stepper.name} was replaced since training began, and the one before would go on stepping: "
                "change its groups in place (group['lr'] = ..., add_param_group)"
            )
        if any(each is not runner.scheduler for each in stepper.schedulers):
            raise ConfigError(
                "self.scheduler was replaced since training began: change the one that is there"
            )
    known = {id(parameter) for parameter in parts.modules.parameters().values()}
    if not any(id(p) in known for group in first.optimizer.param_groups for p in group["params"]):
        raise ConfigError("self.model was replaced since training began, and no optimizer would train it")


def take_unfrozen(parts: Parts, runner: Trained) -> bool:
    """Wrap the modules anew where `requires_grad` has changed since they were wrapped; return whether that was so.

    Collective. What was unfrozen and is in no optimizer is said.
    """
    changed = parts.modules.what_changed()
    if not changed:
        return False
    held = [p for each in parts.steppers for group in each.optimizer.param_groups for p in group["params"]]
    parts.modules.wrap(held, compiler(parts.config))
    _drop_left_out(parts, held)
    if parts.ranks.is_main_process:
        _warn_of_untrained(parts, {id(parameter) for parameter in held})
    return True


def _drop_left_out(parts: Parts, held: Sequence[torch.Tensor]) -> None:
    """Have the first optimizer's step drop the gradients of parameters that no optimizer holds."""
    if parts.steppers.first is not None:
        ids = {id(parameter) for parameter in held}
        parameters = parts.modules.parameters().values()
        parts.steppers.first.left_out = [p for p in parameters if p.requires_grad and id(p) not in ids]


def load_other_weights(parts: Parts, runner: Trained, state: Mapping[str, Any]) -> None:
    """Load the weights of the criterion, and of modules in the runner's attributes, from a checkpoint of a run."""
    if "progress" not in state:
        return
    if not parts.setup.is_placed:
        _find_attributes(parts, runner)
    others = {**(state.get("modules") or {}), "criterion": state.get("criterion")}
    for name, module in parts.modules.own.items():
        if name != "model" and others.get(name):
            module.load_state_dict(others[name])


def begin_meters(parts: Parts, explain: Callable[[str], NonFiniteLossError]) -> SplitMeter:
    """Begin the running loss of each optimizer; return that of the first, which also has what the steps log."""
    non_finite, names = parts.config.non_finite, [stepper.name for stepper in parts.steppers]
    parts.losses = {name: LossMeter(non_finite, explain) for name in names[1:]}
    return SplitMeter(non_finite, explain, lambda: parts.step.value.count)


def optimizer_of(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer that the config names. Raises ConfigError where it names none."""
    if config.optim is None:
        raise ConfigError(
            "no optimizer: set self.optimizer in the runner, or `optim: {name: adamw, lr: ...}`"
        )
    groups = parameter_groups(model, config.optim.groups, config.optim.no_decay)
    return build_optimizer(config.optim.name, groups, **config.optim.arguments())


def average_of(stated: AverageConfig, model: nn.Module, total_steps: int | None) -> Average:
    """Make the average that the config names. Raises ConfigError where its start is a share of unknown steps."""
    if stated.name == "ema":
        return EMA(model, stated.decay, warmup=stated.warmup, every_steps=stated.every_steps)
    start = stated.start
    if isinstance(start, float):
        if total_steps is None:
            raise ConfigError(
                f"average.start is {start}, a share of all steps, and their number is not known: give a number of steps"
            )
        start = round(start * total_steps)
    return SWA(model, start, every_steps=stated.every_steps)


def _check_average(average: Any) -> None:
    """Refuse an average that cannot follow the model. One of torch's own can, by `update_parameters`."""
    if isinstance(average, AveragedModel) or average is None:
        return
    if not callable(getattr(average, "update", None)) or not isinstance(
        getattr(average, "module", None), nn.Module
    ):
        raise ConfigError(
            f"self.ema is a {type(average).__name__}, wanted a torch.optim.swa_utils.AveragedModel, or something with "
            "update(model, taken) and the averaged model as `module`; or set `average` in the config"
        )


def _updating(average: Any) -> Any:
    """Return what `Stepper` calls to update an average."""
    if not isinstance(average, AveragedModel):
        return average

    def update(model: nn.Module, taken: torch.Tensor | None) -> None:
        if taken is None or bool(taken):  # waits for the device, where steps may be skipped
            average.update_parameters(model)

    return SimpleNamespace(update=update)


def scheduler_of(config: Config, optimizer: torch.optim.Optimizer, limits: Limits, score_mode: str) -> Any:
    """Build the scheduler that the config names, or return None."""
    stated = config.scheduler
    if stated is None:
        return None
    arguments = stated.arguments()
    if stated.name.lower() == "reducelronplateau":
        arguments.setdefault("mode", score_mode)
    length = limits.total_epochs if stated.interval == "epoch" else limits.total_steps  # in what it counts
    return build_scheduler(
        stated.name,
        optimizer,
        total_steps=arguments.pop("total_steps", None) or length,
        warmup_steps=stated.warmup_steps,
        **arguments,
    )


def _counts_steps(scheduler: Any, interval: str | None, config: Config, *, by_epoch: bool) -> bool:
    """Return whether the scheduler steps with the optimizer, and not with epochs or results.

    Args:
        interval: what the runner states: "step", "epoch" or None.
    """
    if scheduler is None:
        return False
    stated = interval or (config.scheduler and config.scheduler.interval)
    if stated not in (None, "step", "epoch"):
        raise ConfigError(f"scheduler_interval is {stated!r}, wanted 'step', 'epoch' or None")
    if stated is None or needs_metric(scheduler):
        stated = default_interval(scheduler, by_epoch=by_epoch)
    return stated == "step"


def _check_plateau(scheduler: Any, score_mode: str) -> None:
    """Refuse a ReduceLROnPlateau that takes a better score for a worse one. Raises ConfigError."""
    if needs_metric(scheduler) and scheduler.mode != score_mode:
        raise ConfigError(
            f"the scheduler is a {type(scheduler).__name__} with mode={scheduler.mode!r}, and the score's better is "
            f"{score_mode!r}: give it mode={score_mode!r}, or another score_name or score_mode"
        )


def _find_attributes(parts: Parts, runner: Trained) -> None:
    """Find the modules, optimizers and other states in the runner's own attributes, and have them saved by name."""
    kept = [
        getattr(runner, name) for name in ("model", "ema", "criterion", "optimizer", "scheduler", *_METRICS)
    ]
    taken = [unwrap(each) for each in (*kept, getattr(runner.ema, "module", None), *parts.state.objects)]
    found = Attributes(runner, parts.state.ignored, [*taken, *kept, *parts.splits.given.positioned()])
    found.check()
    for name, module in found.modules.items():
        parts.modules.add(name, module.slot)
    parts.attributes = found


def _say_what_is_saved(parts: Parts) -> None:
    """Log what every checkpoint holds, where that is more than the usual. Rank 0."""
    if parts.attributes is not None and parts.attributes.names:
        logger.info("every checkpoint also holds self.%s", ", self.".join(parts.attributes.names))


def _optimizers_of(parts: Parts, optimizer: Any) -> dict[str, torch.optim.Optimizer]:
    """Return all optimizers by their attributes, the runner's `optimizer` first.

    Raises:
        ConfigError: one cannot be stepped by `advance`, or holds parameters that no checkpoint would have.
    """
    own = {} if parts.attributes is None else parts.attributes.optimizers
    found = {**({} if optimizer is None else {"optimizer": optimizer}), **own}
    parameters = {id(parameter) for parameter in parts.modules.parameters().values()}
    for name, each in found.items():
        if not isinstance(each, torch.optim.Optimizer):
            raise ConfigError(f"self.{name} is a {type(each).__name__}, not a torch.optim.Optimizer")
        check_closure(type(each), f"self.{name}")
        held = [parameter for group in each.param_groups for parameter in group["params"]]
        strange = [parameter for parameter in held if id(parameter) not in parameters]
        if strange and len(strange) == len(held):
            raise ConfigError(
                f"self.{name} holds none of the parameters of the runner's modules: make it from the parameters of "
                "self.model, after self.model is what it stays"
            )
        if strange:
            raise ConfigError(
                f"self.{name} holds {len(strange)} parameter(s) of no module of the runner, the first of shape "
                f"{tuple(strange[0].shape)}: no checkpoint would hold them, and no rank reduce their gradients; make "
                "them a part of self.model, or of another module in an attribute"
            )
    return found


def _warn_of_untrained(parts: Parts, trained: set[int]) -> None:
    """Warn where parameters of the model or the criterion require gradients, and no optimizer holds them. Rank 0."""
    for place in ("model", "criterion"):
        module = parts.modules.own.get(place, nn.Module())
        left = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in trained]
        if left:
            logger.warning(
                "%d parameter(s) of the %s are in no optimizer and stay as they are, such as %r: requires_grad_(False) "
                "says that this is meant",
                *(len(left), place, left[0]),
            )


def _make_steppers(
    parts: Parts, runner: Trained, optimizers: Mapping[str, torch.optim.Optimizer], scheduler: Any
) -> Steppers:
    """Make a stepper for each optimizer. The scheduler, where it counts steps, goes with its own."""
    config, modules = parts.config, parts.modules.own
    held = {name: [p for g in each.param_groups for p in g["params"]] for name, each in optimizers.items()}
    ids = {name: {id(p) for p in parameters} for name, parameters in held.items()}
    model_ids = {id(parameter) for parameter in modules["model"].parameters()}
    scheduled = getattr(scheduler, "optimizer", None)
    steppers = []
    for number, (name, optimizer) in enumerate(optimizers.items()):
        is_scheduled = scheduled is optimizer or (
            number == 0 and not any(scheduled is o for o in optimizers.values())
        )
        others = [p for other in held if other != name for p in held[other] if id(p) not in ids[name]]
        steppers.append(
            Stepper(
                optimizer,
                [
                    module
                    for module in modules.values()
                    if any(id(p) in ids[name] for p in module.parameters())
                ],
                parts.precision,
                name=name,
                schedulers=[scheduler] if scheduler is not None and is_scheduled else [],
                ema=(_updating(runner.ema), modules["model"])
                if runner.ema is not None and ids[name] & model_ids
                else None,
                clip_value=config.clip_grad_value,
                clip_norm=config.clip_grad_norm,
                backward=lambda loss: runner.backward(loss),
                others=list({id(p): p for p in others}.values()),
            )
        )
    return Steppers(steppers)
