"""Metrics by name: updated as one, reduced over the ranks by one collective, saved and restored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from danling_core.errors import ConfigError
from danling_core.metrics import states as metric_states
from danling_core.metrics.meters import Accuracy, MeanMeter
from danling_core.results.values import as_floats

__all__ = ["Accuracy", "Additive", "MeanMeter", "Metric", "MetricGroup"]


_AVERAGE = "average"


@runtime_checkable
class Metric(Protocol):
    """Anything with these three; torchmetrics objects fit, and reduce themselves over ranks in `compute`."""

    def update(self, pred: Any, target: Any) -> Any:
        """Count one batch."""

    def compute(self) -> Any:
        """Return the value over all that was counted."""

    def reset(self) -> Any:
        """Begin anew."""


@runtime_checkable
class Additive(Protocol):
    """A metric whose state is a float64 vector that adds up over batches and ranks."""

    def state(self) -> Tensor:
        """Return the state, 1-D float64, a copy; the same length always."""

    def load_state(self, state: Tensor) -> None:
        """Replace the state, as by a sum over ranks, or by one that was saved."""


class MetricGroup(dict[str, Any]):
    """Named metrics of one split, used as one. A mapping as a value is the group of one task.

    A task's group is given `pred[name]` and `target[name]`. The metrics of torchmetrics and the like are kept as
    they are: they belong on the device of the predictions (`to`), and reduce themselves, so `compute` is then
    collective.

    Args:
        metrics, named: by their names.
        average_tasks: also report `average`: of each metric the mean over the tasks that have it, so that
            `score_name: average/accuracy` scores all of them.
    """

    def __init__(
        self, metrics: Mapping[str, Any] | None = None, *, average_tasks: bool = False, **named: Any
    ) -> None:
        super().__init__()
        self.average_tasks = average_tasks
        for name, metric in {**(metrics or {}), **named}.items():
            self[name] = metric
        if average_tasks and not any(isinstance(metric, MetricGroup) for metric in self.values()):
            raise ConfigError("average_tasks needs tasks: give a mapping of metrics for each of them")

    def __setitem__(self, name: str, metric: Any) -> None:
        if name == _AVERAGE and self.average_tasks:
            raise ConfigError(f"a task or metric is called {name!r}, which is the mean over tasks: rename it")
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
        """Return {name: float}, nested as the group is, and where a metric computes a vector.

        Collective: a metric may reduce itself over ranks here.
        """
        values = {name: as_floats(metric.compute(), name) for name, metric in self.items()}
        if self.average_tasks:
            values[_AVERAGE] = _means(
                [values[n] for n, each in self.items() if isinstance(each, MetricGroup)]
            )
        return values

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
        """Return the metrics, at any depth, that are reduced by adding their states; in a fixed order."""
        found: list[Additive] = []
        for metric in self.values():
            if isinstance(metric, MetricGroup):
                found.extend(metric.additive())
            elif isinstance(metric, Additive):
                found.append(metric)
        return found

    def state(self) -> Tensor:
        """Return 1-D float64: the states of `additive()`, one after the other; empty where there are none."""
        return joined_state(self.additive())

    def load_state(self, state: Tensor) -> None:
        """Replace the states of `additive()` by the parts of `state`."""
        load_joined_state(self.additive(), state)

    def state_dict(self) -> dict[str, Any]:
        """Return {name: state} for a checkpoint inside an epoch, of this rank, on the CPU.

        Raises:
            ConfigError: for a metric that cannot be saved.
        """
        state: dict[str, Any] = metric_states.saved(self)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; the names must be the same."""
        metric_states.restore(self, state)


def _means(tasks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean of each number over the mappings that have it."""
    found: dict[str, list[float]] = {}
    for values in tasks:
        for name, value in values.items():
            if isinstance(value, int | float):
                found.setdefault(name, []).append(float(value))
    return {name: sum(values) / len(values) for name, values in found.items()}


def joined_state(metrics: Iterable[Additive]) -> Tensor:
    """Return the states of `metrics` as one vector, on the device of the first that is not on the CPU."""
    states = [metric.state() for metric in metrics]
    if not states:
        return torch.zeros(0, dtype=torch.float64)
    device = next((state.device for state in states if state.device.type != "cpu"), states[0].device)
    return torch.cat([state.to(device) for state in states])


def load_joined_state(metrics: Iterable[Additive], state: Tensor) -> None:
    """Undo `joined_state`."""
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
