"""Values that a user's steps log: reduced over a split and over the ranks, read from the device when looked at."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch

from danling_core.errors import ConfigError

Reduction = Literal["mean", "sum", "min", "max", "last"]
"""What becomes of all values of one name in a split: their weighted mean, their sum, the least, the largest; or the
last one, in the mean over the ranks."""

_PENDING = 128


class LoggedValues:
    """All values that one split has logged so far, by name.

    Tensors on a GPU stay there until `flush`, so that logging one costs no host sync. Sums are taken in order, in
    float64, so that they do not depend on when they were flushed.
    """

    def __init__(self) -> None:
        self._series: dict[str, _Series] = {}

    def __bool__(self) -> bool:
        """Return whether anything was logged."""
        return bool(self._series)

    def add(self, name: str, value: Any, weight: Any, reduction: Reduction) -> None:
        """Count a value of `name`.

        Args:
            value: a number, or a tensor; one of several numbers is reduced to one first.
            weight: of a mean; samples, as a rule. 0 for a value that only makes the name known.

        Raises:
            ConfigError: it is neither, or `name` is reduced in another way already.
        """
        series = self._series.get(name)
        if series is None:
            series = self._series[name] = _Series(name, reduction)
        elif series.reduction != reduction:
            raise ConfigError(
                f"self.log({name!r}) has reduction={reduction!r} here, and {series.reduction!r} before in the same "
                "split: a name has one"
            )
        series.add(value, weight)

    @property
    def names(self) -> list[str]:
        """Return the names that are known, also those without a value."""
        return list(self._series)

    def flush(self) -> None:
        """Bring the pending values to the host."""
        for series in self._series.values():
            series.flush()

    def latest(self) -> dict[str, float]:
        """Return the value of each name that was logged last on this rank. Waits for the device."""
        self.flush()
        return {name: series.latest for name, series in self._series.items() if series.latest is not None}

    def values(self) -> dict[str, float]:
        """Return the reduced value of each name, of this rank alone; names without any value are left out."""
        return values_of(self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Return `{name: {reduction, total, weight}}`, in plain values."""
        self.flush()
        return {
            name: {"reduction": each.reduction, "total": each.total, "weight": each.weight}
            for name, each in self._series.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self._series = {name: _Series(name, **saved) for name, saved in state.items()}


class _Series:
    """The values of one name.

    Args:
        total: of a mean, the weighted sum; of a sum, the sum; else the value itself.
        weight: sum of the weights; of `last`, that of the value.
    """

    __slots__ = ("_pending", "latest", "name", "reduction", "total", "weight")

    def __init__(self, name: str, reduction: Reduction, total: float = 0.0, weight: float = 0.0) -> None:
        if not isinstance(name, str) or not name:
            raise ConfigError(f"self.log({name!r}): wanted a name, a text")
        if reduction not in get_args(Reduction):
            raise ConfigError(
                f"self.log({name!r}): reduction is {reduction!r}, wanted one of {', '.join(get_args(Reduction))}"
            )
        self.name = name
        self.reduction = reduction
        self.total = total
        self.weight = weight
        self.latest: float | None = None
        self._pending: list[tuple[torch.Tensor, Any]] = []

    def add(self, value: Any, weight: Any) -> None:
        if isinstance(value, torch.Tensor):
            if value.numel() != 1:
                value = self._one(value)
            if not value.is_cpu:
                self._pending.append((value.detach(), weight))
                if len(self._pending) >= _PENDING:
                    self.flush()
                return
            value = value.item()
        if type(value) is not float:
            value = self._plain(value)
        if self._pending:
            self.flush()
        self._take(value, float(weight))

    def flush(self) -> None:
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        device = pending[0][0].device
        if device.type == "mps":  # which has no float64
            pending, device = [(value.cpu(), weight) for value, weight in pending], torch.device("cpu")
        values = torch.stack([value.reshape(()).double() for value, _ in pending])
        weights = torch.stack(
            [torch.as_tensor(w, dtype=torch.float64, device=device).reshape(()) for _, w in pending]
        )
        for value, weight in torch.stack([values, weights]).T.tolist():
            self._take(value, weight)

    def _take(self, value: float, weight: float) -> None:
        if not weight:
            return
        self.latest = value
        if self.reduction == "mean":
            self.total += value * weight
            self.weight += weight
            return
        is_first = not self.weight
        if self.reduction == "sum":
            self.total += value
        elif self.reduction == "last":
            self.total = value
        else:
            self.total = value if is_first else _extreme(self.reduction, [self.total, value])
        self.weight = weight

    def _one(self, value: torch.Tensor) -> torch.Tensor:
        """Return a tensor of any other length as one number, reduced as the name is."""
        if value.numel() == 0 or self.reduction == "last":
            raise ConfigError(
                f"self.log({self.name!r}) was given a tensor of shape {tuple(value.shape)}: wanted numbers, and one "
                "of them where reduction='last'"
            )
        value = value.detach()
        if self.reduction == "mean":
            return (value.cpu() if value.device.type == "mps" else value).double().mean()
        if self.reduction == "sum":
            return value.sum()
        return value.amin() if self.reduction == "min" else value.amax()

    def _plain(self, value: Any) -> float:
        try:
            if isinstance(value, str):
                raise TypeError
            return float(value.item() if hasattr(value, "item") else value)
        except (TypeError, ValueError):
            raise ConfigError(
                f"self.log({self.name!r}) was given a {type(value).__name__}, wanted a number or a tensor"
            ) from None


def values_of(state: Mapping[str, Any]) -> dict[str, float]:
    """Return the values in what `LoggedValues.state_dict` or `merged` returned."""
    return {name: _value(**saved) for name, saved in state.items() if saved["weight"]}


def merged(states: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the states of several ranks as one, in rank order. Ranks may have logged different names.

    Raises:
        ConfigError: a name is reduced in different ways.
    """
    by_name: dict[str, list[Any]] = {}
    for state in states:
        for name, saved in state.items():
            by_name.setdefault(name, []).append(saved)
    return {name: _merged(name, all_of_them) for name, all_of_them in by_name.items()}


def _extreme(reduction: str, values: Sequence[float]) -> float:
    """Return the least or the largest value; NaN where one is."""
    if any(math.isnan(value) for value in values):
        return math.nan
    return min(values) if reduction == "min" else max(values)


def _value(reduction: Reduction, total: float, weight: float) -> float:
    return total / weight if reduction == "mean" else total


def _merged(name: str, states: Sequence[Any]) -> dict[str, Any]:
    reductions = {saved["reduction"] for saved in states}
    if len(reductions) > 1:
        raise ConfigError(
            f"self.log({name!r}) has different reductions on different ranks: {', '.join(sorted(reductions))}"
        )
    reduction = states[0]["reduction"]
    counted = [saved for saved in states if saved["weight"]]
    totals, weight = [saved["total"] for saved in counted], math.fsum(saved["weight"] for saved in counted)
    if not counted:
        total = 0.0
    elif reduction == "last":  # the mean of the ranks' last values
        total = sum(saved["total"] * saved["weight"] for saved in counted) / weight
    elif reduction in ("mean", "sum"):
        total = sum(totals)
    else:
        total = _extreme(reduction, totals)
    return {"reduction": reduction, "total": total, "weight": weight}
