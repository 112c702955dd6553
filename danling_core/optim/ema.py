"""Exponential moving average of a model's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


class EMA(nn.Module):
    """A copy of a model whose parameters follow it: `ema = decay * ema + (1 - decay) * model`.

    Buffers (BatchNorm statistics) are copied, not averaged. The update is one foreach call, without a host
    sync.

    Args:
        model: the unwrapped model, on its final device.
        decay: in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.module = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay
        self._pairs: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None

    def forward(self, *inputs: object, **named: object) -> object:
        return self.module(*inputs, **named)

    @torch.no_grad()
    def update(self, model: nn.Module, taken: torch.Tensor | None = None) -> None:
        """Follow `model` by one step.

        Args:
            taken: scalar on the device, 1 where the optimizer step was taken and 0 where it was skipped.
        """
        if self._pairs is None:
            self._pairs = _averaged(self.module), _averaged(model)
        weight = 1.0 - self.decay
        if taken is None:
            torch._foreach_lerp_(self._pairs[0], self._pairs[1], weight)
        else:
            for mine, theirs in zip(*self._pairs, strict=True):
                # where, not lerp with weight 0: a skipped step may have left NaN behind
                mine.copy_(torch.where(taken > 0, mine.lerp(theirs, weight), mine))
        for mine, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)


def _averaged(model: nn.Module) -> list[torch.Tensor]:
    return [
        parameter
        for parameter in model.parameters()
        if parameter.is_floating_point() or parameter.is_complex()
    ]
