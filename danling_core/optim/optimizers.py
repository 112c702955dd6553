"""Optimizers and schedulers by name: torch's own classes, with their own arguments."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from danling_core.errors import ConfigError

SHAPES = ("constant", "linear", "cosine")


def find_class(module: Any, base: type, name: str, what: str) -> type:
    """The class of `module` called `name`, whatever its case.

    Raises:
        ConfigError: there is none; the nearest are named.
    """
    found = [(n, c) for n, c in vars(module).items() if inspect.isclass(c) and issubclass(c, base)]
    classes = {n.lower(): c for n, c in found if c is not base}
    if name.lower() not in classes:
        near = difflib.get_close_matches(name.lower(), classes, n=3)
        known = [classes[n].__name__ for n in near] or sorted(c.__name__ for c in classes.values())
        raise ConfigError(f"{what}.name is {name!r}, which torch does not have; known: {', '.join(known)}")
    return classes[name.lower()]


def check_arguments(cls: type, arguments: Mapping[str, Any], what: str) -> None:
    """Refuse arguments that `cls` does not take, before anything starts."""
    known = [p for p in inspect.signature(cls).parameters if p not in ("self", "params", "optimizer")]
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f": did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise ConfigError(f"unknown key '{what}.{name}' for {cls.__name__}{hint}")


def optimizer_class(name: str, arguments: Mapping[str, Any]) -> type[torch.optim.Optimizer]:
    """The optimizer class called `name`, its arguments checked."""
    cls = find_class(torch.optim, torch.optim.Optimizer, name, "optim")
    check_arguments(cls, arguments, "optim")
    step: Any = vars(cls).get("step", torch.optim.Optimizer.step)
    closure = inspect.signature(step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"optim.name is {name!r}, which evaluates the loss several times a step by a closure, and the runner calls "
            "step() without one: choose another, or use it in a train_step of your own"
        )
    return cls


def build_optimizer(
    name: str, parameters: Iterable[Any], *, lr: float | None = None, **arguments: Any
) -> torch.optim.Optimizer:
    """An optimizer by name; fused where its class and the parameters allow it (3 times faster on CPU too)."""
    if lr is not None:
        arguments["lr"] = lr
    cls: Any = optimizer_class(name, arguments)
    has_fused = "fused" in inspect.signature(cls).parameters
    parameters = list(parameters)
    for group in parameters:
        if isinstance(group, Mapping):  # torch would keep an unknown key and never look at it
            check_arguments(cls, {key: group[key] for key in group if key != "params"}, "optim.groups")
    if has_fused and not {"fused", "foreach", "differentiable"} & set(arguments):
        # a dtype or device may have no fused kernel; an argument that is wrong fails again below
        with contextlib.suppress(RuntimeError, ValueError, TypeError):
            return cls(parameters, fused=True, **arguments)
    try:
        return cls(parameters, **arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optim: {name} refuses its arguments: {error}") from error


def parameter_groups(
    named_parameters: Iterable[tuple[str, torch.Tensor]], groups: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Parameters sorted into groups by name, for a model's `named_parameters()`.

    Args:
        groups: `{match: "bias|norm", weight_decay: 0.0}`: a regular expression that is searched for in a
            parameter's name, and the arguments that differ. The first match counts; what matches none has the
            general arguments.

    Raises:
        ConfigError: a group without `match`, or one that matches no parameter.
    """
    for index, group in enumerate(groups):
        if not isinstance(group.get("match"), str):
            raise ConfigError(
                f"optim.groups[{index}] needs `match`, a regular expression for parameters' names"
            )
    sorted_parameters: list[list[torch.Tensor]] = [[] for _ in range(len(groups) + 1)]
    for name, parameter in named_parameters:
        hits = (index for index, group in enumerate(groups) if re.search(group["match"], name))
        sorted_parameters[next(hits, len(groups))].append(parameter)
    for index, group in enumerate(groups):
        if not sorted_parameters[index]:
            raise ConfigError(f"optim.groups[{index}]: no parameter's name matches {group['match']!r}")
    own = [{key: value for key, value in group.items() if key != "match"} for group in groups]
    filled = zip(sorted_parameters, [*own, {}], strict=True)
    return [{"params": parameters, **options} for parameters, options in filled if parameters]


def lr_factor(
    shape: str, step: int, *, total_steps: int | None, warmup_steps: int, floor: float = 0.0
) -> float:
    """Factor on the learning rate at `step` (0-based): linear warm-up, then constant, linear or cosine decay.

    Cosine decay follows SGDR (arXiv 1608.03983) without restarts; `floor` is the factor at the end.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if shape == "constant" or total_steps is None:
        return 1.0
    share = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    decay = 1.0 - share if shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * share))
    return floor + (1.0 - floor) * decay


def check_scheduler(name: str, arguments: Mapping[str, Any]) -> None:
    """Refuse an unknown scheduler or argument, before anything starts."""
    if name in SHAPES:
        for key in arguments:
            if key not in ("floor", "total_steps"):
                known = "warmup_steps, floor, total_steps, interval"
                raise ConfigError(f"unknown key 'scheduler.{key}' for {name!r}; known: {known}")
        return
    cls = find_class(torch.optim.lr_scheduler, LRScheduler, name, "scheduler")
    check_arguments(cls, arguments, "scheduler")


def build_scheduler(
    name: str,
    optimizer: torch.optim.Optimizer,
    *,
    total_steps: int | None,
    warmup_steps: int = 0,
    **arguments: Any,
) -> LRScheduler:
    """A scheduler by name: constant, linear, cosine (with warm-up, in optimizer steps), or any class of
    torch.

    Raises:
        ConfigError: a decay is asked for and the number of steps is not known (unsized data without an end in
            steps).
    """
    check_scheduler(name, arguments)
    if name not in SHAPES:
        cls: Callable[..., LRScheduler] = find_class(torch.optim.lr_scheduler, LRScheduler, name, "scheduler")
        if warmup_steps:
            raise ConfigError(f"scheduler.warmup_steps goes with {', '.join(SHAPES)}, not with {name!r}")
        if "total_steps" in inspect.signature(cls).parameters and "epochs" not in arguments:
            arguments.setdefault("total_steps", total_steps)
        try:
            return cls(optimizer, **arguments)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"scheduler: {name} refuses its arguments: {error}") from error
    total = arguments.get("total_steps", total_steps)
    if name != "constant" and total is None:
        raise ConfigError(
            f"scheduler {name!r} needs the number of steps, and the data is unsized: set step_end, steps_per_epoch "
            "or scheduler.total_steps"
        )
    floor = float(arguments.get("floor", 0.0))
    return LambdaLR(
        optimizer,
        lambda step: lr_factor(name, step, total_steps=total, warmup_steps=warmup_steps, floor=floor),
    )


def needs_metric(scheduler: Any) -> bool:
    """Whether the scheduler steps on a metric, once per evaluation."""
    return isinstance(scheduler, ReduceLROnPlateau)


def default_interval(scheduler: Any, *, by_epoch: bool) -> str:
    """What a scheduler counts where nobody says: "step" or "epoch".

    `ReduceLROnPlateau` counts results. In step mode all others count steps. In epoch mode torch's classes
    count epochs, but `OneCycleLR`, `CyclicLR` and `LambdaLR` (so warm-up with constant, linear and cosine
    decay) count steps.
    """
    if needs_metric(scheduler):
        return "epoch"
    return "step" if not by_epoch or isinstance(scheduler, (LambdaLR, OneCycleLR, CyclicLR)) else "epoch"
