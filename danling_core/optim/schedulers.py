"""Learning-rate schedules by name: torch's own classes, and warm-up with constant, linear or cosine decay."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from danling_core.errors import ConfigError
from danling_core.optim.by_name import check_arguments, find_class

SHAPES = ("constant", "linear", "cosine")


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
    """Return a scheduler by name: constant, linear, cosine (with warm-up, in optimizer steps), or any class of
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
    """Return whether the scheduler steps on a metric, once per evaluation."""
    return isinstance(scheduler, ReduceLROnPlateau)


def default_interval(scheduler: Any, *, by_epoch: bool) -> str:
    """Return what a scheduler counts by default: "step" or "epoch".

    `ReduceLROnPlateau` counts results. In step mode all others count steps. In epoch mode torch's classes
    count epochs, but `OneCycleLR`, `CyclicLR` and `LambdaLR` (so warm-up with constant, linear and cosine
    decay) count steps.
    """
    if needs_metric(scheduler):
        return "epoch"
    return "step" if not by_epoch or isinstance(scheduler, (LambdaLR, OneCycleLR, CyclicLR)) else "epoch"
