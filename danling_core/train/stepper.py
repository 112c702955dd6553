"""From a loss to new weights: backward, clipping, the optimizer's step, its schedule, and the weights' average."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from danling_core.optim.ema import EMA
from danling_core.optim.precision import Precision
from danling_core.train.step import Step


class Stepper:
    """Drives one optimizer, with its schedule, gradient scaler, clipping and EMA.

    Args:
        optimizer: steps at the end of each accumulation window.
        model: the user's module, without wrappers, on its device.
        precision: with the gradient scaler, where one is needed.
        scheduler: steps with the optimizer; None where it counts something else.
        ema: follows `model` after each step.
        clip_value: bound on each gradient's absolute value, or None.
        clip_norm: bound on the norm of all gradients together, or None.
        backward: computes the gradients of a weighted loss.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        precision: Precision,
        *,
        scheduler: Any = None,
        ema: EMA | None = None,
        clip_value: float | None = None,
        clip_norm: float | None = None,
        backward: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.parameters: list[torch.Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        self._model = model
        self._precision = precision
        self.drives_schedule = scheduler is not None
        self._scheduler = scheduler
        self._ema = ema
        self._clip_value = clip_value
        self._clip_norm = clip_norm
        self._backward = self.backward if backward is None else backward
        self._buffers_before: list[torch.Tensor] = []

    def begin_epoch(self) -> None:
        """Remember the buffers (BatchNorm statistics), where a skipped step has to put them back."""
        self._buffers_before = [buffer.clone() for buffer in self._buffers()]

    def advance(self, loss: torch.Tensor, step: Step) -> None:
        """Compute the gradients of a batch's mean loss and, at the end of a window, step.

        Args:
            loss: scalar.
            step: its weight, and whether it ends the window.
        """
        if step.is_rehearsal:
            (loss * 0.0).backward()
            return
        if step.weight:
            self._backward(loss if step.weight == 1.0 else loss * step.weight)
        else:
            self._backward_zeros(loss)
        if step.ends_window:
            self.step()

    def backward(self, loss: torch.Tensor) -> None:
        """Compute gradients, scaled where fp16 needs it."""
        self._precision.scaled(loss).backward()

    def step(self) -> None:
        """Update the weights by the gradients at hand, then their average and the schedule; drop the gradients."""
        optimizer, scaler = self.optimizer, self._precision.scaler
        taken = None
        if scaler is not None:
            scaler.unscale_(optimizer)
        if self._clip_value is not None:
            nn.utils.clip_grad_value_(self.parameters, self._clip_value)
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self._clip_norm)
        if scaler is None:
            optimizer.step()
        else:
            taken = self._scaled_step(scaler)
            self._undo_skipped(taken)
        for parameter in self.parameters:  # zero_grad does the same with profiler hooks: 10 us a step
            parameter.grad = None
        if self._scheduler is not None:
            self._scheduler.step()
        if self._ema is not None:
            self._ema.update(self._model, taken)

    def _scaled_step(self, scaler: torch.amp.GradScaler) -> torch.Tensor:
        """Step unless a gradient is not finite. Returns 1 or 0 on the device.

        Gradients are reduced by now, so all ranks see the same.
        """
        found = list(scaler._found_inf_per_device(self.optimizer).values())
        device = self.parameters[0].device
        taken = 1.0 - torch.stack([value.to(device) for value in found]).sum().clamp(max=1.0)
        scaler.step(self.optimizer)
        self._precision.update_scale()
        return taken

    def _undo_skipped(self, taken: torch.Tensor) -> None:
        """Restore the buffers of before a step that was skipped: a NaN would stay in them."""
        for buffer, before in zip(self._buffers(), self._buffers_before, strict=True):
            buffer.copy_(torch.where(taken > 0, buffer, before))
            before.copy_(buffer)

    def _buffers(self) -> list[torch.Tensor]:
        return list(self._model.buffers()) if self._precision.skips_non_finite else []

    def _backward_zeros(self, loss: torch.Tensor) -> None:
        """Take part in DDP's reduction with gradients of 0, also where 0 times the loss's gradient is NaN."""
        parameters = [p for p in self._model.parameters() if p.requires_grad]
        hooks = [parameter.register_hook(torch.zeros_like) for parameter in parameters]
        try:
            self._backward(loss * 0.0)
        finally:
            for hook in hooks:
                hook.remove()
