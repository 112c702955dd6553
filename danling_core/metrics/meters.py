"""Meters that stay on the device: a weighted mean and an accuracy, whose updates wait for nothing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from danling_core.errors import ConfigError


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
            raise ConfigError(f"a mean takes one number at a time, got shape {tuple(value.shape)}")
        value = _summable(value)
        if isinstance(weight, Tensor):
            weight = weight.detach().to(value.device, torch.float64, non_blocking=True).reshape(())
            self.add(torch.where(weight > 0, value.detach().double() * weight, 0.0), weight)
        elif weight:
            self._total(value.device).add_(value.detach(), alpha=weight)
            self._known_weight += weight

    def add(self, total: Tensor, weight: Tensor | float) -> None:
        """Count a sum that is weighted already, such as the hits among `weight` samples; both 0-dim."""
        total = _summable(total)
        self._total(total.device).add_(total.detach())
        if isinstance(weight, Tensor):
            weight = _summable(weight).detach().to(torch.float64, copy=True)
            self._weight = weight if self._weight is None else self._weight + weight
        else:
            self._known_weight += weight

    def compute(self) -> float:
        """Return the mean; NaN where nothing was counted. Waits for the device."""
        total, weight = self.state().tolist()
        return total / weight if weight else math.nan

    def reset(self) -> None:
        """Begin anew."""
        self._sum = self._weight = None
        self._known_weight = 0.0

    def state(self) -> Tensor:
        """Return (2,) float64: the weighted sum, and the sum of weights."""
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


def _summable(value: Tensor) -> Tensor:
    """Return a number where it can be added up in float64: Apple's GPUs have none."""
    return value.cpu() if value.device.type == "mps" else value


class Accuracy:
    """The share of predictions that are right, counted on the device.

    Shapes: `pred` (batch, classes, ...) with `target` (batch, ...), or `pred` (batch, ..., classes) with
        `target`
    (batch, ...), takes the class with the largest value. `pred` of the shape of `target`, or (batch, 1) with
    (batch,), is binary, one or many labels: positive above `threshold`; integers are labels already.

    Args:
        threshold: 0 for logits (an even chance), 0.5 for probabilities. Binary only.
        ignore_index: targets of this value do not count.
        class_dim: the dimension of `pred` that has the classes; default: 1 or the last, whichever fits `target`.
    """

    def __init__(
        self, threshold: float = 0.0, ignore_index: int | None = None, class_dim: int | None = None
    ) -> None:
        self.threshold = threshold
        self.class_dim = class_dim
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
            self._mean.add(hits.sum(), target.numel())
            return
        counts = target != self.ignore_index
        self._mean.add((hits & counts).sum(), counts.sum())

    def compute(self) -> float:
        """Between 0 and 1; NaN where nothing was counted. Waits for the device."""
        return self._mean.compute()

    def reset(self) -> None:
        """Begin anew."""
        self._mean.reset()

    def state(self) -> Tensor:
        """Return (2,) float64: how many were right, and how many there were."""
        return self._mean.state()

    def load_state(self, state: Tensor) -> None:
        """Replace the state."""
        self._mean.load_state(state)

    def _labels(self, pred: Tensor, target: Tensor) -> Tensor:
        if pred.shape == target.shape:
            return (pred > self.threshold).to(target.dtype) if pred.is_floating_point() else pred
        if pred.dim() == target.dim() + 1:
            if self.class_dim is not None:
                return pred.argmax(dim=self.class_dim)
            is_second = pred.shape[:1] == target.shape[:1] and pred.shape[2:] == target.shape[1:]
            is_last = pred.shape[:-1] == target.shape
            if is_second and is_last and pred.dim() > 2:
                raise ConfigError(
                    f"accuracy got pred {tuple(pred.shape)} and target {tuple(target.shape)}: are the classes "
                    "dimension 1 or the last? Say so: Accuracy(class_dim=1) or Accuracy(class_dim=-1)"
                )
            if is_second or is_last:
                return pred.argmax(dim=1 if is_second else -1)
        raise ConfigError(
            f"accuracy wants pred (batch, classes, ...) and target (batch, ...), or equal shapes; "
            f"got {tuple(pred.shape)} and {tuple(target.shape)}"
        )
