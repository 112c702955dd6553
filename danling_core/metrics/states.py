"""States of metrics in the middle of an epoch: saved on each rank, restored, merged for another world size."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from danling_core.errors import ConfigError

logger = logging.getLogger("danling")

_VALUES = (type(None), bool, int, float, complex, str, bytes)


class NoMetrics:
    """Stand-in for a metric that is to count nothing; it knows whether it was asked to."""

    def __init__(self) -> None:
        self.was_updated = False

    def update(self, *values: Any, **named: Any) -> None:
        self.was_updated = True

    def compute(self) -> dict[str, Any]:
        return {}

    def reset(self) -> None: ...


def saved(metric: Any, name: str = "metrics") -> Any:
    """Return the state of this rank's metric, on the CPU, in tensors and plain values.

    A group is {name: state}; `Additive` metrics give their vector, torchmetrics and others their `state_dict`, and
    an object without one its attributes.

    Raises:
        ConfigError: none of these; the message says what the metric needs.
    """
    if isinstance(metric, dict):
        return {key: saved(each, f"{name}.{key}") for key, each in metric.items()}
    if is_additive(metric):
        return metric.state().cpu()
    if is_of_torchmetrics(metric):
        metric.persistent(True)
        if hasattr(metric, "values"):  # a collection: what its members share comes to each
            list(metric.values())
    if hasattr(metric, "state_dict") and hasattr(metric, "load_state_dict"):
        return _on(dict(metric.state_dict()), "cpu")
    if not hasattr(metric, "__dict__") or not _is_plain(vars(metric)):
        raise ConfigError(
            f"{name}: a {type(metric).__name__} holds more than tensors and plain values, so a run that is stopped "
            "inside an epoch could not go on with it: give it state_dict and load_state_dict"
        )
    return _on(vars(metric), "cpu")


def restore(metric: Any, state: Any, device: torch.device | str = "cpu", name: str = "metrics") -> None:
    """Put back what `saved` returned, on `device`; a state of None leaves the metric as it is.

    Raises:
        ConfigError: the names of a group are others.
    """
    if state is None:
        return
    if isinstance(metric, dict):
        if set(state) != set(metric):
            raise ConfigError(
                f"the checkpoint has the {name} {sorted(state)}, but this run has {sorted(metric)}"
            )
        for key, each in metric.items():
            restore(each, state[key], device, f"{name}.{key}")
    elif is_additive(metric):
        metric.load_state(state.to(device))
    elif hasattr(metric, "load_state_dict"):
        metric.load_state_dict(state)
        if hasattr(metric, "to"):
            metric.to(device)
    else:
        vars(metric).update(_on(state, device))


def merged(metric: Any, states: Sequence[Any], *, is_first: bool) -> Any:
    """Return the ranks' states as one for the first rank, and empty ones for the others; None where they do not add."""
    if isinstance(metric, dict):
        return {
            key: merged(each, [s[key] for s in states], is_first=is_first) for key, each in metric.items()
        }
    if not is_additive(metric):
        if is_first:
            logger.warning(
                "what a %s has counted of this epoch does not add over ranks: its value is of the rest of the epoch",
                type(metric).__name__,
            )
        return None
    total = torch.stack(list(states)).sum(0)
    return total if is_first else torch.zeros_like(total)


def check_reducible(metric: Any, name: str) -> None:
    """Refuse, where there are several ranks, a metric of which only rank 0's part would be reported.

    Raises:
        ConfigError: it neither adds up, nor is of torchmetrics, nor says that it reduces itself.
    """
    if isinstance(metric, dict):
        for key, each in metric.items():
            check_reducible(each, f"{name}.{key}")
    elif not (is_additive(metric) or is_of_torchmetrics(metric) or getattr(metric, "reduces_itself", False)):
        raise ConfigError(
            f"{name}: how does a {type(metric).__name__} reduce over ranks? Known are metrics with `state` and "
            "`load_state` (danling_core.metrics.Additive) and those of torchmetrics; one whose compute() reduces "
            "by itself says so with an attribute reduces_itself = True"
        )


def has_list_state(metric: Any) -> bool:
    """Return whether a metric of torchmetrics keeps lists of samples: reducing those aborts where a rank has none."""
    if isinstance(metric, Mapping):
        return any(has_list_state(each) for each in metric.values())
    if hasattr(metric, "values") and hasattr(metric, "persistent"):
        return any(has_list_state(each) for each in metric.values())
    return any(isinstance(state, list) for state in getattr(metric, "_defaults", {}).values())


def is_additive(metric: Any) -> bool:
    """Return whether it has the state of an `Additive`."""
    return hasattr(metric, "state") and hasattr(metric, "load_state")


def is_of_torchmetrics(metric: Any) -> bool:
    """Return whether it is a metric of torchmetrics, or a collection of them."""
    return hasattr(metric, "persistent")


def _is_plain(value: Any) -> bool:
    if type(value) is dict:
        return all(_is_plain(key) and _is_plain(item) for key, item in value.items())
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    return type(value) in (*_VALUES, Tensor)


def _on(value: Any, device: torch.device | str) -> Any:
    """Return a copy with its tensors on `device`."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, Mapping):
        return {key: _on(item, device) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_on(item, device) for item in value)
    return value
