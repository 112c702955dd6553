"""Averages of a model's weights that follow it while it trains."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


class Average(nn.Module):
    """A copy of a model whose weights follow it, each in its own way. Without a host sync.

    Args:
        model: the unwrapped model, on its final device.
        every_steps: optimizer steps between two updates.
    """

    averages_buffers = False
    """Whether buffers of floats (BatchNorm statistics) are averaged, too; else all buffers are copied."""

    def __init__(self, model: nn.Module, every_steps: int = 1) -> None:
        super().__init__()
        self.module = copy.deepcopy(model).requires_grad_(False).eval()
        self.every_steps = every_steps
        self.steps = 0
        """Optimizer steps that it has seen, skipped ones included."""
        self._pairs: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None

    def forward(self, *inputs: object, **named: object) -> object:
        return self.module(*inputs, **named)

    def weight(self) -> float | None:
        """Return how much of the model goes into the average in this step, in [0, 1]; None for none."""
        raise NotImplementedError

    @torch.no_grad()
    def update(self, model: nn.Module, taken: torch.Tensor | None = None) -> None:
        """Follow `model` by one step.

        Args:
            taken: scalar on the device, 1 where the optimizer step was taken and 0 where it was skipped.
        """
        self.steps += 1
        weight = self.weight()
        if weight is None:
            return
        if self._pairs is None:
            self._pairs = self._averaged(self.module), self._averaged(model)
        if taken is None:
            torch._foreach_lerp_(self._pairs[0], self._pairs[1], weight)
        else:
            for mine, theirs in zip(*self._pairs, strict=True):
                # where, not lerp with weight 0: a skipped step may have left NaN behind
                mine.copy_(torch.where(taken > 0, mine.lerp(theirs, weight), mine))
        averaged = {id(tensor) for tensor in self._pairs[0]}
        for mine, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            if id(mine) not in averaged:
                mine.copy_(theirs)

    def _averaged(self, model: nn.Module) -> list[torch.Tensor]:
        tensors = [*model.parameters(), *(model.buffers() if self.averages_buffers else ())]
        return [tensor for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()]

    def get_extra_state(self) -> dict[str, Any]:
        """Return what the average knows besides its weights."""
        return {"steps": self.steps}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `get_extra_state` returned."""
        self.steps = state["steps"]


class EMA(Average):
    """An exponential moving average: `ema = decay * ema + (1 - decay) * model`. Buffers are copied.

    Args:
        model, every_steps: as for `Average`.
        decay: in [0, 1).
        warmup: begin with a smaller decay: `min(decay, (1 + updates) / (10 + updates))`, as TensorFlow's
            `ExponentialMovingAverage` does with `num_updates`.
    """

    def __init__(self, model: nn.Module, decay: float, *, warmup: bool = False, every_steps: int = 1) -> None:
        super().__init__(model, every_steps)
        self.decay = decay
        self.warmup = warmup

    def weight(self) -> float | None:
        if self.steps % self.every_steps:
            return None
        if not self.warmup:
            return 1.0 - self.decay
        updates = self.steps // self.every_steps
        return 1.0 - min(self.decay, (1 + updates) / (10 + updates))


class SWA(Average):
    """The equal average of all weights since a step (stochastic weight averaging, arXiv 1803.05407).

    Until then it is the model itself. Buffers of floats are averaged as well: BatchNorm's statistics are no worse, and
    need no further pass over the data.

    Args:
        model, every_steps: as for `Average`.
        start: the optimizer step after which the average begins.
    """

    averages_buffers = True

    def __init__(self, model: nn.Module, start: int, *, every_steps: int = 1) -> None:
        super().__init__(model, every_steps)
        self.start = start

    def weight(self) -> float | None:
        since = self.steps - self.start
        if since <= 0:
            return 1.0
        if since % self.every_steps:
            return None
        return 1.0 / (since // self.every_steps)
