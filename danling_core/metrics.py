"""Metrics that stay on the device: nothing grows, nothing waits, and one reduction serves them all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from danling_core.errors import ConfigError


@runtime_checkable
class Metric(Protocol):
    """Anything with these three; torchmetrics objects fit, and reduce themselves over ranks in `compute`."""

    def update(self, pred: Any, target: Any) -> Any:
        """Count one batch."""

    def compute(self) -> Any:
        """The value over all that was counted."""

    def reset(self) -> Any:
        """Begin anew."""


@runtime_checkable
class Additive(Protocol):
    """A metric whose state is a float64 vector that adds up over batches and ranks."""

    def state(self) -> Tensor:
        """The state, 1-D float64, a copy; the same length always."""

    def load_state(self, state: Tensor) -> None:
        """Replace the state, as by a sum over ranks, or by one that was saved."""


class MeanMeter:
    """A weighted mean in float64, on the device of the values. `update` never waits for the device.

    The mean of an epoch's loss is `update(batch_mean, batch_size)` for every batch.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._weight: Tensor | None = None
        self._known_weight = 0.0

    def update(self, value: Tensor | float, weight: Tensor | float = 1) -> None:
        """Count the 0-dim `value` with `weight`, such as the number of its samples.

        A weight of 0 counts nothing, even with a NaN; a weight may be a tensor, which stays on the device.
        """
        if not isinstance(value, Tensor):
            value = torch.tensor(float(value), dtype=torch.float64)
        elif value.dim() and value.numel() == 1:
            value = value.reshape(())
        elif value.dim():
            raise ConfigError(
                f"a mean takes one number at a time, got a tensor of shape {tuple(value.shape)}"
            )
        total = self._total(value.device)
        if isinstance(weight, Tensor):
            weight = (
                weight.detach().to(device=value.device, dtype=torch.float64, non_blocking=True).reshape(())
            )
            weighted = torch.where(weight > 0, value.detach().double() * weight, 0.0)
            total.add_(weighted)
            self._weight = weight.clone() if self._weight is None else self._weight.add_(weight)
        elif weight:
            total.add_(value.detach(), alpha=weight)
            self._known_weight += weight

    def compute(self) -> float:
        """The mean; NaN where nothing was counted. Waits for the device."""
        total, weight = self.state().tolist()
        return total / weight if weight else math.nan

    def reset(self) -> None:
        """Begin anew."""
        self._sum = self._weight = None
        self._known_weight = 0.0

    def state(self) -> Tensor:
        """(2,) float64: the weighted sum, and the sum of weights."""
        total = self._total(torch.device("cpu") if self._sum is None else self._sum.device)
        weight = torch.full_like(total, self._known_weight)
        return torch.stack([total, weight if self._weight is None else weight + self._weight])

    def load_state(self, state: Tensor) -> None:
        """Replace the state by one of `state`'s shape. Does not wait."""
        self._sum, self._weight = state.detach().to(torch.float64).clone().unbind()
        self._known_weight = 0.0

    def _total(self, device: torch.device) -> Tensor:
        if self._sum is None:
            self._sum = torch.zeros((), dtype=torch.float64, device=device)
        elif self._sum.device != device:
            self._sum = self._sum.to(device)
            self._weight = None if self._weight is None else self._weight.to(device)
        return self._sum


class Accuracy:
    """The share of predictions that are right, counted on the device.

    Shapes: `pred` (batch, classes, ...) with `target` (batch, ...), or `pred` (batch, ..., classes) with
        `target`
    (batch, ...), takes the class with the largest value. `pred` of the shape of `target`, or (batch, 1) with
    (batch,), is binary, one or many labels: positive above `threshold`; integers are labels already.

    Args:
        threshold: 0 for logits (an even chance), 0.5 for probabilities. Binary only.
        ignore_index: targets of this value do not count.
    """

    def __init__(self, threshold: float = 0.0, ignore_index: int | None = None) -> None:
        self.threshold = threshold
        self.ignore_index = ignore_index
        self._mean = MeanMeter()

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Count one batch; does not wait for the device."""
        if target.numel() == 0:
            return
        pred = pred.detach()
        if pred.dim() == target.dim() + 1 and pred.shape[-1] == 1 and pred.shape[:-1] == target.shape:
            pred = pred.squeeze(-1)
        hits = self._labels(pred, target) == target
        if self.ignore_index is None:
            self._mean.update(hits.mean(dtype=torch.float64), target.numel())
            return
        counts = target != self.ignore_index
        weight = counts.sum(dtype=torch.float64)
        self._mean.update((hits & counts).sum(dtype=torch.float64) / weight.clamp(min=1), weight)

    def compute(self) -> float:
        """Between 0 and 1; NaN where nothing was counted. Waits for the device."""
        return self._mean.compute()

    def reset(self) -> None:
        """Begin anew."""
        self._mean.reset()

    def state(self) -> Tensor:
        """(2,) float64: how many were right, and how many there were."""
        return self._mean.state()

    def load_state(self, state: Tensor) -> None:
        """Replace the state."""
        self._mean.load_state(state)

    def _labels(self, pred: Tensor, target: Tensor) -> Tensor:
        if pred.shape == target.shape:
            return (pred > self.threshold).to(target.dtype) if pred.is_floating_point() else pred
        if pred.dim() == target.dim() + 1:
            if pred.shape[:1] == target.shape[:1] and pred.shape[2:] == target.shape[1:]:
                return pred.argmax(dim=1)
            if pred.shape[:-1] == target.shape:
                return pred.argmax(dim=-1)
        raise ConfigError(
            f"accuracy wants pred (batch, classes, ...) and target (batch, ...), or equal shapes; "
            f"got {tuple(pred.shape)} and {tuple(target.shape)}"
        )


class MetricGroup(dict[str, Any]):
    """Named metrics of one split, used as one. A mapping as a value is the group of one task.

    A task's group is given `pred[name]` and `target[name]`. The metrics of torchmetrics and the like are kept
    as they
    are: they belong on the device of the predictions (`to`), and reduce themselves, so `compute` is then
        collective.
    """

    def __init__(self, metrics: Mapping[str, Any] | None = None, **named: Any) -> None:
        super().__init__()
        for name, metric in {**(metrics or {}), **named}.items():
            self[name] = metric

    def __setitem__(self, name: str, metric: Any) -> None:
        if isinstance(metric, Mapping) and not isinstance(metric, (Metric, MetricGroup)):
            metric = MetricGroup(metric)
        if not isinstance(metric, Metric):
            raise ConfigError(
                f"metric {name!r} needs update, compute and reset; a {type(metric).__name__} lacks some"
            )
        super().__setitem__(name, metric)

    def update(self, pred: Any, target: Any) -> None:  # type: ignore[override]
        """Count one batch in every metric."""
        for name, metric in self.items():
            if isinstance(metric, MetricGroup):
                metric.update(_of_task(pred, name, "pred"), _of_task(target, name, "target"))
            else:
                metric.update(pred, target)

    def compute(self) -> dict[str, Any]:
        """{name: float}, nested as the group is. Collective: a metric may reduce itself over ranks here."""
        return {name: _as_floats(metric.compute(), name) for name, metric in self.items()}

    def reset(self) -> None:
        """Begin anew."""
        for metric in self.values():
            metric.reset()

    def to(self, device: torch.device | str) -> MetricGroup:
        """Move what has a `to` of its own (torchmetrics); ours follow their values. Returns self."""
        for metric in self.values():
            if hasattr(metric, "to"):
                metric.to(device)
        return self

    def additive(self) -> list[Additive]:
        """The metrics, at any depth, that are reduced by adding their states; in a fixed order."""
        found: list[Additive] = []
        for metric in self.values():
            if isinstance(metric, MetricGroup):
                found.extend(metric.additive())
            elif isinstance(metric, Additive):
                found.append(metric)
        return found

    def state(self) -> Tensor:
        """1-D float64: the states of `additive()`, one after the other; empty where there are none."""
        return joined_state(self.additive())

    def load_state(self, state: Tensor) -> None:
        """Replace the states of `additive()` by the parts of `state`."""
        load_joined_state(self.additive(), state)

    def state_dict(self) -> dict[str, Any]:
        """{name: state} for a checkpoint inside an epoch, of this rank.

        Raises:
            ConfigError: for a metric that has neither `state` nor `state_dict`.
        """
        return {name: _saved(metric, name) for name, metric in self.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; the names must be the same."""
        if set(state) != set(self):
            raise ConfigError(
                f"the checkpoint has the metrics {sorted(state)}, but this run has {sorted(self)}"
            )
        for name, metric in self.items():
            if isinstance(metric, Additive) and not isinstance(metric, MetricGroup):
                metric.load_state(state[name])
            else:
                metric.load_state_dict(state[name])


def reduce_metrics(
    metrics: Iterable[Additive],
    all_reduce: Callable[[Tensor], Tensor | None],
    device: torch.device | str | None = None,
) -> None:
    """Sum the states of all `metrics` over the ranks, in one collective; each then holds the whole sum.

    Collective: every rank calls it with the same metrics in the same order, at the end of a pass; `reset`
        before
    counting on. Groups and single meters mix: `reduce_metrics([loss, group], all_reduce, device)`.

    Args:
        metrics: what to reduce; what reduces itself is not among their states.
        all_reduce: sums a 1-D float64 tensor over the ranks, in place or into what it returns.
        device: where the collective works: a rank that counted nothing holds its states on the CPU.
    """
    metrics = list(metrics)
    state = joined_state(metrics, device)
    if state.numel():
        reduced = all_reduce(state)
        load_joined_state(metrics, state if reduced is None else reduced)


def joined_state(metrics: Iterable[Additive], device: torch.device | str | None = None) -> Tensor:
    """The states of `metrics` as one vector, on `device`, or on that of the first that is not on the CPU."""
    states = [metric.state() for metric in metrics]
    if not states:
        return torch.zeros(0, dtype=torch.float64, device=device)
    if device is None:
        device = next((state.device for state in states if state.device.type != "cpu"), states[0].device)
    return torch.cat([state.to(device) for state in states])


def load_joined_state(metrics: Iterable[Additive], state: Tensor) -> None:
    """The reverse of `joined_state`."""
    metrics = list(metrics)
    sizes = [metric.state().numel() for metric in metrics]
    if sum(sizes) != state.numel():
        raise ConfigError(f"the metrics have a state of {sum(sizes)} numbers, but {state.numel()} were given")
    for metric, part in zip(metrics, torch.split(state, sizes), strict=True):
        metric.load_state(part)


def _of_task(values: Any, name: str, what: str) -> Any:
    if isinstance(values, Mapping) and name in values:
        return values[name]
    found = list(values) if isinstance(values, Mapping) else f"a {type(values).__name__}"
    raise ConfigError(
        f"the metrics have a task {name!r}, so {what} must be a mapping that has it; got {found}"
    )


def _as_floats(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _as_floats(item, f"{name}/{key}") for key, item in value.items()}
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"metric {name!r} must compute one number (or a mapping of them), got {value!r}"
        ) from error


def _saved(metric: Any, name: str) -> Any:
    if isinstance(metric, Additive) and not isinstance(metric, MetricGroup):
        return metric.state()
    if hasattr(metric, "persistent"):
        metric.persistent(True)
    if not hasattr(metric, "state_dict"):
        raise ConfigError(
            f"metric {name!r} cannot be saved inside an epoch: give {type(metric).__name__} a state_dict"
        )
    return dict(metric.state_dict())
