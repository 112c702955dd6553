"""Meters of a split: its running loss, summed in float64 over all batches, and the values that its steps log."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from danling_core.errors import ConfigError, NonFiniteLossError
from danling_core.train.logged import LoggedValues, Reduction

_PENDING = 128


class LossMeter:
    """Sample-weighted mean of the losses of one split.

    Losses stay on the device until `flush`, so that adding one costs no host sync; the sum is taken in order, in
    float64, so that it does not depend on when it was flushed.

    Args:
        non_finite: "raise" at the first NaN or infinite loss that is read, "skip" such losses in the mean, or
            "count" them like any other.
        explain: given the message of that error, returns the error to raise.
    """

    def __init__(
        self,
        non_finite: str = "count",
        explain: Callable[[str], NonFiniteLossError] = NonFiniteLossError,
    ) -> None:
        self.total = 0.0
        self.count = 0
        self.iters = 0
        self.latest = math.nan
        self._non_finite = non_finite
        self._explain = explain
        self._losses: list[torch.Tensor] = []
        self._counts: list[int] = []

    def add(self, loss: torch.Tensor, count: int) -> None:
        """Take the mean loss of `count` samples: a scalar. On a CPU it is read at once, which waits for nothing.

        Raises:
            ConfigError: it is not one number.
            NonFiniteLossError: as `flush`.
        """
        if loss.numel() != 1:
            raise ConfigError(
                f"the loss has shape {tuple(loss.shape)}, wanted one number: the criterion must return the mean "
                "over the batch (reduction='mean')"
            )
        if loss.is_cpu:
            self._take(loss.item(), count)
            return
        self._losses.append(loss.detach())
        self._counts.append(count)
        if len(self._losses) >= _PENDING:
            self.flush()

    def flush(self) -> None:
        """Bring the pending losses to the host and add them up.

        Raises:
            NonFiniteLossError: for the first loss that is not finite, where these are refused.
        """
        if not self._losses:
            return
        losses, counts = self._losses, self._counts
        self._losses, self._counts = [], []
        values = torch.stack([loss.reshape(()) for loss in losses]).cpu().double().tolist()
        for value, count in zip(values, counts, strict=True):
            self._take(value, count)

    def _take(self, value: float, count: int) -> None:
        self.iters += 1
        self.latest = value
        if not math.isfinite(value) and count:
            if self._non_finite == "raise":
                raise self._explain(f"the loss is {value} at iter {self.iters} of this epoch")
            if self._non_finite == "skip":
                return
        if count:
            self.total += value * count
            self.count += count

    @property
    def mean(self) -> float:
        """Mean over this rank's samples so far; NaN before the first."""
        self.flush()
        return self.total / self.count if self.count else math.nan

    def state_dict(self) -> dict[str, Any]:
        self.flush()
        return {"total": self.total, "count": self.count, "iters": self.iters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total, self.count, self.iters = state["total"], state["count"], state["iters"]


class SplitMeter(LossMeter):
    """The running loss of a split, and the values that its steps log.

    Args:
        non_finite, explain: as for `LossMeter`.
        count: returns the samples of the batch under way; None where `batch_size` is set for each.
    """

    def __init__(
        self,
        non_finite: str = "count",
        explain: Callable[[str], NonFiniteLossError] = NonFiniteLossError,
        count: Callable[[], int] | None = None,
    ) -> None:
        super().__init__(non_finite, explain)
        self.logged = LoggedValues()
        self.batch_size = 1
        self._count_of_batch = count

    def flush(self) -> None:
        super().flush()
        self.logged.flush()

    def log(self, name: str, value: Any, reduction: Reduction = "mean", weight: Any = None) -> None:
        """Count a value of the batch under way; see `TorchRunner.log`."""
        count = self.batch_size if self._count_of_batch is None else self._count_of_batch()
        self.logged.add(name, value, count if weight is None or not count else weight, reduction)

    def update(self, **values: Any) -> None:
        """Log values by name, each for its mean over the split: `meters.update(loss_d=loss)`."""
        for name, value in values.items():
            self.log(name, value)

    def state_dict(self) -> dict[str, Any]:
        logged = self.logged.state_dict()
        return {**super().state_dict(), **({"logged": logged} if logged else {})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.logged.load_state_dict(state.get("logged", {}))
