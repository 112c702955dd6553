"""Learning-rate range test: the loss while the rate grows from step to step (Smith, arXiv 1506.01186)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from danling_core.config import Config
from danling_core.errors import ConfigError, NonFiniteLossError
from danling_core.tools.tune.trial import config_of, runner_for_trial, steps

_REACH = 3  # points on either side that a smoothed loss is the mean of
_DIVERGED = 4.0  # times the best smoothed loss, as in fastai and Lightning
_FIRST = 0.1  # share of the steps that say nothing
_FEWEST = 10


@dataclass
class RangeTest:
    """Losses of a range test.

    Args:
        rates: learning rate of each step, of the first parameter group.
        losses: their losses.
        key: the key of the config that is this rate, or None where the runner makes it itself.
        has_diverged: the loss left all bounds before the highest rate.
    """

    rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    key: str | None = None
    has_diverged: bool = False

    @property
    def proposed(self) -> float | None:
        """Return the rate at which the loss falls fastest before it is lowest; None where it does not fall."""
        smoothed = self.smoothed
        lowest = min(range(len(smoothed)), key=lambda index: smoothed[index], default=0)
        slopes = {  # the rates are evenly spaced in their logarithm
            index: smoothed[index + 1] - smoothed[index - 1]
            for index in range(max(int(len(smoothed) * _FIRST), 1), lowest)
        }
        if not slopes:
            return None
        best = min(slopes, key=lambda index: slopes[index])
        return self.rates[best] if slopes[best] < 0 else None

    @property
    def smoothed(self) -> list[float]:
        """Return the means of the losses around each step."""
        around = [self.losses[max(at - _REACH, 0) : at + _REACH + 1] for at in range(len(self.losses))]
        return [sum(losses) / len(losses) for losses in around]


def range_test(
    file: str,
    overrides: Sequence[str] = (),
    *,
    lowest: float = 1e-7,
    highest: float = 1.0,
    count: int = 100,
    watch: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> RangeTest:
    """Train for `count` steps while the rate grows from `lowest` to `highest` in equal ratios; in this process.

    Rates of other groups and optimizers keep their ratio to the first one's. A schedule is left out. Ends early once
    the loss is not finite, or four times its best.

    Args:
        watch: given the steps, returns them, to show a progress bar.

    Raises:
        ConfigError: the bounds are not in order, or the config cannot be trained.
    """
    if not 0 < lowest < highest or count < _FEWEST:
        raise ConfigError(
            f"a range test goes from a rate above 0 to a higher one in at least {_FEWEST} steps: found {lowest:g} to "
            f"{highest:g} in {count}"
        )
    config = config_of(file, overrides)
    found = RangeTest()
    rates = [lowest * (highest / lowest) ** (index / (count - 1)) for index in range(count)]
    with tempfile.TemporaryDirectory(prefix="danling-") as folder:
        runner = runner_for_trial(config, folder, non_finite="raise")
        groups: list[tuple[Any, float]] = []

        def begin(index: int) -> None:
            if not groups:
                found.key = _key(config, runner)
                groups.extend(_groups(runner))
            for group, ratio in groups:
                group["lr"] = rates[index] * ratio

        with closing(steps(runner, count, begin)) as losses:
            for rate, loss in zip(rates, _until_not_finite(watch(losses), found), strict=False):
                found.rates.append(rate)
                found.losses.append(loss)
                recent, least = found.losses[-_REACH:], min(found.smoothed)
                # a loss that may be negative has no such bound
                is_out = 0 < least * _DIVERGED < sum(recent) / len(recent)
                if is_out and len(found.rates) > _FEWEST:
                    found.has_diverged = True
                    break
    return found


def _key(config: Config, runner: Any) -> str | None:
    if config.optim is not None:
        return "optim.lr"
    rate = getattr(runner.params, "lr", None)
    group = runner._parts.steppers.first.optimizer.param_groups[0]
    return "params.lr" if rate == group.get("initial_lr", group["lr"]) else None


def _groups(runner: Any) -> list[tuple[Any, float]]:
    """Return each parameter group, and its rate over that of the first."""
    optimizers = [stepper.optimizer for stepper in runner._parts.steppers]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = [float(group.get("initial_lr", group["lr"])) for group in groups]
    return [(group, rate / rates[0] if rates[0] else 1.0) for group, rate in zip(groups, rates, strict=True)]


def _until_not_finite(losses: Iterable[float], found: RangeTest) -> Iterator[float]:
    try:
        yield from losses
    except NonFiniteLossError:
        found.has_diverged = True
