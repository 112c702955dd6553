"""Learning-rate schedules by name: torch's own classes, and warm-up with constant, linear, cosine or late decay."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from danling_core.errors import ConfigError
from danling_core.optim.by_name import check_arguments, find_class
from danling_core.suggest import unknown_key

logger = logging.getLogger("danling")

SHAPES = ("constant", "linear", "cosine", "wsd")
COOLDOWNS = ("linear", "cosine", "sqrt")
_KEYS = {
    "constant": ("floor", "total_steps"),
    "linear": ("hold_steps", "floor", "total_steps"),
    "cosine": ("hold_steps", "floor", "total_steps"),
    "wsd": ("cooldown_steps", "cooldown", "floor", "total_steps"),
}
"""Keys of each shape beside `warmup_steps` and `interval`."""
_LIKE_TORCH = {"one_cycle": "OneCycleLR", "onecycle": "OneCycleLR"}


@dataclass(frozen=True)
class Shape:
    """A learning-rate schedule as a factor on the rate: warm-up, a stretch at the full rate, and a decay.

    Args:
        name: of `SHAPES`. `constant` has no decay; `linear` and `cosine` decay to the end (cosine is SGDR's,
            arXiv 1608.03983, without restarts); `wsd` (warm-up, stable, decay: arXiv 2404.06395) decays at the end.
        total_steps: length of the schedule; None where that is not known.
        warmup_steps: of linear warm-up.
        hold_steps: at the full rate between warm-up and decay; `linear` and `cosine` only.
        cooldown_steps: length of the decay; `wsd` only.
        cooldown: how `wsd` decays: linear, cosine, or sqrt, which is `1 - sqrt(share)` (arXiv 2405.18392).
        floor: the factor at the end.
    """

    name: str
    total_steps: int | None = None
    warmup_steps: int = 0
    hold_steps: int = 0
    cooldown_steps: int = 0
    cooldown: str = "linear"
    floor: float = 0.0

    def factor(self, step: int) -> float:
        """Return the factor on the learning rate at `step`, 0-based."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.name == "constant" or self.total_steps is None:
            return 1.0
        is_wsd = self.name == "wsd"
        begin = self.total_steps - self.cooldown_steps if is_wsd else self.warmup_steps + self.hold_steps
        if step < begin:
            return 1.0
        share = min((step - begin) / max(self.total_steps - begin, 1), 1.0)
        how = self.cooldown if is_wsd else self.name
        decay = {"linear": 1.0 - share, "sqrt": 1.0 - math.sqrt(share)}.get(
            how, 0.5 * (1.0 + math.cos(math.pi * share))
        )
        return self.floor + (1.0 - self.floor) * decay


def check_scheduler(name: str, arguments: Mapping[str, Any]) -> None:
    """Refuse an unknown scheduler or argument, before anything starts."""
    if name in SHAPES:
        known = ("warmup_steps", *_KEYS[name], "interval")
        for key, value in arguments.items():
            if key not in known:
                raise ConfigError(unknown_key(f"scheduler.{key}", [f"scheduler.{each}" for each in known]))
            _check_value(key, value)
        return
    cls = find_class(torch.optim.lr_scheduler, LRScheduler, _LIKE_TORCH.get(name.lower(), name), "scheduler")
    check_arguments(cls, arguments, "scheduler")


def _check_value(key: str, value: Any) -> None:
    if key == "cooldown":
        if value not in COOLDOWNS:
            raise ConfigError(f"scheduler.cooldown is {value!r}, wanted one of {', '.join(COOLDOWNS)}")
        return
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if key == "floor":
        if not is_number or not 0 <= value <= 1:
            raise ConfigError(f"scheduler.floor is {value!r}, wanted a factor in [0, 1]")
    elif key == "total_steps":
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ConfigError(f"scheduler.total_steps is {value!r}, wanted a number of steps >= 1")
    elif not is_number or value < 0 or (isinstance(value, float) and value >= 1):
        raise ConfigError(
            f"scheduler.{key} is {value!r}, wanted a number of steps, or a fraction of all in [0, 1)"
        )


def build_scheduler(
    name: str,
    optimizer: torch.optim.Optimizer,
    *,
    total_steps: int | None,
    warmup_steps: float = 0,
    **arguments: Any,
) -> LRScheduler:
    """Return a scheduler by name: one of `SHAPES`, or any class of torch.

    Args:
        total_steps: length of the training, in what the scheduler counts.
        warmup_steps: of linear warm-up; a fraction is one of all steps.

    Raises:
        ConfigError: a decay is asked for and the number of steps is not known (unsized data without an end in
            steps).
    """
    check_scheduler(name, arguments)
    if name not in SHAPES:
        return _of_torch(name, optimizer, total_steps, warmup_steps, arguments)
    total = total_steps
    lengths = {"warmup_steps": warmup_steps, **({"cooldown_steps": 0.1} if name == "wsd" else {})}
    lengths |= {key: arguments.pop(key) for key in ("hold_steps", "cooldown_steps") if key in arguments}
    if total is None and (name != "constant" or any(isinstance(each, float) for each in lengths.values())):
        raise ConfigError(
            f"scheduler {name!r} needs the number of steps, and the data is unsized: set step_end, steps_per_epoch "
            "or scheduler.total_steps"
        )
    steps = {
        key: round(each * total) if isinstance(each, float) and total is not None else int(each)
        for key, each in lengths.items()
    }
    if name != "constant" and total is not None and sum(steps.values()) > total:
        parts = ", ".join(f"{key} {count}" for key, count in steps.items() if count)
        logger.warning("scheduler %r: %s are more than the %d steps that there are", name, parts, total)
    shape = Shape(name, total, **{**steps, **arguments})
    return LambdaLR(optimizer, lambda step: shape.factor(step))


def _of_torch(
    name: str, optimizer: torch.optim.Optimizer, total: int | None, warmup: float, arguments: dict[str, Any]
) -> LRScheduler:
    cls: Callable[..., LRScheduler] = find_class(
        torch.optim.lr_scheduler, LRScheduler, _LIKE_TORCH.get(name.lower(), name), "scheduler"
    )
    if warmup:
        raise ConfigError(f"scheduler.warmup_steps goes with {', '.join(SHAPES)}, not with {name!r}")
    if "total_steps" in inspect.signature(cls).parameters and "epochs" not in arguments:
        arguments.setdefault("total_steps", total)
    try:
        return cls(optimizer, **arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"scheduler: {name} refuses its arguments: {error}") from error


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
