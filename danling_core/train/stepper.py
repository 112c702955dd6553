"""From a loss to new weights: backward, clipping, the optimizer's step, its schedule, and the weights' average."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from danling_core.errors import ConfigError
from danling_core.optim.averages import Average
from danling_core.optim.precision import Precision
from danling_core.train.step import Step


class Stepper:
    """Drives one optimizer, with its schedules, gradient scaler, clipping and EMA.

    Args:
        optimizer: steps at the end of each accumulation window. Its groups may grow while it trains.
        modules: the user's modules that it steps, without wrappers, on their device.
        precision: makes the gradient scaler, where one is needed.
        name: the attribute that holds the optimizer, for messages.
        schedulers: step with the optimizer.
        ema: the average that follows a module, and that module; None for none.
        clip_value: bound on each gradient's absolute value, or None.
        clip_norm: bound on the norm of all gradients together, or None.
        backward: computes the gradients of a weighted and scaled loss.
        others: parameters of other optimizers, whose gradients a loss of this one must leave as they are.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        modules: Sequence[nn.Module],
        precision: Precision,
        *,
        name: str = "optimizer",
        schedulers: Sequence[Any] = (),
        ema: tuple[Average, nn.Module] | None = None,
        clip_value: float | None = None,
        clip_norm: float | None = None,
        backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
        others: Sequence[torch.Tensor] = (),
    ) -> None:
        self.optimizer = optimizer
        self.name = name
        self.scaler = precision.make_scaler()
        self.schedulers = schedulers
        self.grad_norm: torch.Tensor | None = None
        """Norm of all gradients together in the last step, before it was clipped; None where it is not."""
        self.is_pending = False
        """Whether there are gradients of a window that has not stepped."""
        self.rehearsed = 0
        """How often it was called only to try it."""
        self.left_out: Sequence[torch.Tensor] = ()
        """Parameters that no optimizer holds: their gradients are dropped with the others, and not summed up until one
        does."""
        self._modules = modules
        self._precision = precision
        self._ema = ema
        self._clip_value = clip_value
        self._clip_norm = clip_norm
        self._backward = backward
        self._others = others
        self._buffers_before: list[torch.Tensor] = []

    @property
    def parameters(self) -> list[torch.Tensor]:
        """Return all parameters in the optimizer's groups, as these are now."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

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
            self.rehearsed += 1
            (loss * 0.0).backward()
            return
        if self._others:
            self._advance_apart(loss, step)
        else:
            self._compute_gradients(loss, step)
        if step.ends_window:
            self.step()
        self.is_pending = not step.ends_window

    def step(self) -> None:
        """Update the weights by the gradients at hand, then their average and the schedules; drop the gradients."""
        optimizer, scaler, parameters = self.optimizer, self.scaler, self.parameters
        taken = None
        if scaler is not None:
            scaler.unscale_(optimizer)
        if self._clip_value is not None:
            nn.utils.clip_grad_value_(parameters, self._clip_value)
        if self._clip_norm is not None:
            self.grad_norm = nn.utils.clip_grad_norm_(parameters, self._clip_norm)
        if scaler is None:
            optimizer.step()
        else:
            taken = self._scaled_step(scaler, parameters[0].device)
            self._undo_skipped(taken)
        for parameter in parameters:  # zero_grad does the same with profiler hooks: 10 us a step
            parameter.grad = None
        for parameter in self.left_out:
            parameter.grad = None
        for scheduler in self.schedulers:
            scheduler.step()
        if self._ema is not None:
            average, module = self._ema
            average.update(module, taken)

    def _compute_gradients(self, loss: torch.Tensor, step: Step) -> None:
        if step.weight:
            self._backward(self._scaled(loss if step.weight == 1.0 else loss * step.weight))
        else:
            self._backward_zeros(loss)

    def _advance_apart(self, loss: torch.Tensor, step: Step) -> None:
        """Compute gradients while those of other optimizers' parameters are put aside: they are not of this loss."""
        gradients = [parameter.grad for parameter in self._others]
        for parameter in self._others:
            parameter.grad = None
        try:
            self._compute_gradients(loss, step)
        finally:
            for parameter, gradient in zip(self._others, gradients, strict=True):
                parameter.grad = gradient

    def _scaled(self, loss: torch.Tensor) -> torch.Tensor:
        return loss if self.scaler is None else self.scaler.scale(loss)

    def _scaled_step(self, scaler: torch.amp.GradScaler, device: torch.device) -> torch.Tensor:
        """Step unless a gradient is not finite. Returns 1 or 0 on the device.

        Gradients are reduced by now, so all ranks see the same.
        """
        found = list(scaler._found_inf_per_device(self.optimizer).values())
        if not found:  # no parameter had a gradient
            return torch.ones((), device=device)
        taken = 1.0 - torch.stack([value.to(device) for value in found]).sum().clamp(max=1.0)
        scaler.step(self.optimizer)
        self._precision.update(scaler)
        return taken

    def _undo_skipped(self, taken: torch.Tensor) -> None:
        """Restore the buffers of before a step that was skipped: a NaN would stay in them."""
        for buffer, before in zip(self._buffers(), self._buffers_before, strict=True):
            buffer.copy_(torch.where(taken > 0, buffer, before))
            before.copy_(buffer)

    def _buffers(self) -> list[torch.Tensor]:
        if not self._precision.skips_non_finite:
            return []
        return [buffer for module in self._modules for buffer in module.buffers()]

    def _backward_zeros(self, loss: torch.Tensor) -> None:
        """Take part in DDP's reduction with gradients of 0, also where 0 times the loss's gradient is NaN."""
        hooks = [
            parameter.register_hook(torch.zeros_like)
            for module in self._modules
            for parameter in module.parameters()
            if parameter.requires_grad
        ]
        try:
            self._backward(self._scaled(loss * 0.0))
        finally:
            for hook in hooks:
                hook.remove()


class Steppers:
    """The steppers of a run. The first is the one that `advance` means where none is named.

    Args:
        steppers: one for each optimizer.
    """

    def __init__(self, steppers: Iterable[Stepper] = ()) -> None:
        self._all = list(steppers)
        self.first = self._all[0] if self._all else None
        self._by_optimizer = {id(stepper.optimizer): stepper for stepper in self._all}

    def __iter__(self) -> Iterator[Stepper]:
        return iter(self._all)

    def of(self, optimizer: torch.optim.Optimizer) -> Stepper:
        """Return the stepper of an optimizer. Raises ConfigError for one that is not known."""
        found = self._by_optimizer.get(id(optimizer))
        if found is None:
            known = ", ".join(f"self.{stepper.name}" for stepper in self._all)
            raise ConfigError(
                f"advance was given a {type(optimizer).__name__} that was no attribute of the runner when training "
                f"began; known: {known}"
            )
        return found

    def curves(self) -> dict[str, float]:
        """Return learning rates and gradient norms as they are now: `lr` or, with several groups, `lr/0`, `lr/1`, ...

        Those of all but the first optimizer have its name: `lr_{name}`. Waits for the device.
        """
        found = {}
        for stepper in self._all:
            suffix = "" if stepper is self.first else f"_{stepper.name}"
            rates = [float(group["lr"]) for group in stepper.optimizer.param_groups if "lr" in group]
            one_rate = len(set(rates)) == 1
            for index, rate in enumerate(rates[:1] if one_rate else rates):
                found[f"lr{suffix}" if one_rate else f"lr{suffix}/{index}"] = rate
            if stepper.grad_norm is not None:
                found[f"grad_norm{suffix}"] = float(stepper.grad_norm)
        return found

    def begin_epoch(self) -> None:
        """Let each begin an epoch."""
        for stepper in self._all:
            stepper.begin_epoch()

    def check_window(self) -> None:
        """Raise ConfigError where a window has ended, and gradients of its earlier batches have made no step."""
        for stepper in self._all:
            if stepper.is_pending:
                raise ConfigError(
                    f"train_step did not call self.advance for self.{stepper.name} with the last batch of an "
                    "accumulation window, so that the gradients of the batches before made no step: call it for every "
                    "batch, or set accum_steps=1"
                )
