"""The PyTorch runner: the steps of training, evaluation and inference. Users subclass it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from danling_core.errors import ConfigError, NonFiniteLossError
from danling_core.optim.optimizers import needs_metric
from danling_core.parallel import seeding
from danling_core.runner import checkpointing, evaluation, loading
from danling_core.runner.base import RunnerMode
from danling_core.runner.loading import LoadedKeys
from danling_core.runner.loop import flush_losses, located, train_segment
from danling_core.runner.methods import File, Values
from danling_core.runner.torch_setup import TorchSetUp
from danling_core.train.meters import LossMeter


class TorchRunner(TorchSetUp):
    """Trains a torch model on one rank or many, CPU or CUDA.

    A subclass calls `super().__init__(config)` and sets `datasets`, `model`, `criterion`, and, unless the
    config names them, `optimizer` and `scheduler`. Moving to the device, DDP, EMA and resume happen when
    `train()` begins.
    """

    model: Any
    optimizer: Any
    collate_fn = None
    size_of = None

    # train --------------------------------------------------------------------------------------------------
    def train_epoch(self, split: str = "train") -> Values:
        self.split, self.mode = split, RunnerMode.train
        self.model.train()
        self.meters = LossMeter(
            refuse_non_finite=self.config.non_finite == "raise",
            skip_non_finite=self.config.non_finite == "skip",
        )
        metrics = self._metrics_in_use()
        if metrics is not None:
            metrics.reset()
        self._begin_split()
        self._inside_split = True
        with self._explaining_batch_norm(split):
            train_segment(self, self._stream(split))
        flush_losses(self)
        self._inside_split = False
        if self.meters.iters == 0:
            raise ConfigError(
                f"{type(self).__name__}.train_step never called self.advance(loss): nothing was trained"
            )
        return self.get_epoch_result()

    def _begin_split(self) -> None:
        """Take up the split where a checkpoint inside it left off, or begin it."""
        self._samples_logged, self._logged_at = 0, time.monotonic()
        self._iters_at_split, self._steps_at_split = self.iters, self.steps
        self._buffers_before = [buffer.clone() for buffer in self._buffers_now()]
        state, self._split_state = self._split_state, None
        if state is not None:
            checkpointing.restore_split(self, state)

    def train_step(self, data: Any) -> tuple[Any, torch.Tensor]:
        inputs, target = _input_and_target(data)
        with self.autocast():
            pred = self.model(inputs)
            loss = self.criterion(pred, target)
        metrics = self._metrics_in_use()
        if metrics is not None:
            metrics.update(pred, target)
        self.advance(loss)
        return pred, loss

    def advance(self, loss: torch.Tensor) -> None:
        if self._dry:
            (loss * 0.0).backward()
            return
        try:
            self.meters.add(loss, self._count)
        except NonFiniteLossError as error:
            raise located(self, error) from None
        if self._weight:
            self.backward(loss if self._weight == 1.0 else loss * self._weight)
        else:
            self._backward_nothing(loss)
        if self._last_iter:
            self._step()

    def _backward_nothing(self, loss: torch.Tensor) -> None:
        """Take part in DDP's reduction with gradients of 0, also where 0 times the loss's gradient is NaN."""
        parameters = [p for p in self.unwrap(self.model).parameters() if p.requires_grad]
        hooks = [parameter.register_hook(torch.zeros_like) for parameter in parameters]
        try:
            self.backward(loss * 0.0)
        finally:
            for hook in hooks:
                hook.remove()

    def backward(self, loss: torch.Tensor) -> None:
        scaler = self._precision.scaler
        (loss if scaler is None else scaler.scale(loss)).backward()

    def _step(self) -> None:
        optimizer, scaler = self.optimizer, self._precision.scaler
        taken = None
        if scaler is not None:
            scaler.unscale_(optimizer)
        if self._clip_value is not None:
            nn.utils.clip_grad_value_(self._parameters, self._clip_value)
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        if scaler is None:
            optimizer.step()
        else:
            taken = self._scaled_step(scaler)
            self._undo_skipped(taken)
        for parameter in self._parameters:  # what zero_grad does, without its profiler hooks: 10 us a step
            parameter.grad = None
        if self._schedules_steps:
            self.scheduler.step()
        if self.ema is not None:
            self.ema.update(self.unwrap(self.model), taken)

    def _scaled_step(self, scaler: torch.amp.GradScaler) -> torch.Tensor:
        """Step unless a gradient is not finite; gradients are reduced by now, so all ranks see the same."""
        found = scaler._found_inf_per_device(self.optimizer)
        taken = 1.0 - torch.stack([value.to(self.device) for value in found.values()]).sum().clamp(max=1.0)
        scaler.step(self.optimizer)
        self._precision.update_scale()
        return taken

    def _undo_skipped(self, taken: torch.Tensor) -> None:
        """Give buffers (BatchNorm statistics) the values of before a step that was skipped: a NaN would stay."""
        for buffer, before in zip(self._buffers_now(), self._buffers_before, strict=True):
            buffer.copy_(torch.where(taken > 0, buffer, before))
            before.copy_(buffer)

    def _buffers_now(self) -> list[torch.Tensor]:
        """What `non_finite=skip` has to keep from one step to the next."""
        return list(self.unwrap(self.model).buffers()) if self.config.non_finite == "skip" else []

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return self._precision.autocast()

    def _no_sync(self) -> contextlib.AbstractContextManager[Any]:
        if isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()

    def _metrics_in_use(self) -> Any:
        own = self.train_metrics if self.mode is RunnerMode.train else self.evaluate_metrics
        return self.metrics if own is None else own

    def _epoch_ended(self) -> bool:
        return self._epoch_is_over

    def _count_epoch(self) -> None:
        super()._count_epoch()
        if self.scheduler is not None and not self._schedules_steps and not needs_metric(self.scheduler):
            self.scheduler.step()

    def _after_segment(self, index: int) -> None:
        score = self.scores.get(index) if needs_metric(self.scheduler) else None
        if score is not None:
            self.scheduler.step(score)

    def scale_lr(
        self, lr: float, lr_scale_factor: float | None = None, batch_size_base: int | None = None
    ) -> float:
        if (lr_scale_factor is None) == (batch_size_base is None):
            raise ConfigError("scale_lr needs exactly one of lr_scale_factor and batch_size_base")
        if lr_scale_factor is None:
            assert batch_size_base is not None
            lr_scale_factor = self.batch_size_equivalent / batch_size_base
        return lr * lr_scale_factor

    # evaluate -----------------------------------------------------------------------------------------------
    def _evaluate_all(self, splits: Sequence[str]) -> dict[str, Values]:
        self._rng_before_evaluation = seeding.capture_rng()
        evaluated = super()._evaluate_all(splits)
        self._rng_before_evaluation = None  # where a stop passes instead, they belong to the state saved next
        return evaluated

    def evaluate_epoch(self, split: str = "val") -> dict[str, Any]:
        with self._evaluating(RunnerMode.evaluate, split):
            return evaluation.evaluate_split(self, self._evaluate_loader(split))

    def evaluate_step(self, data: Any) -> tuple[Any, torch.Tensor | None]:
        inputs, target = _input_and_target(data)
        with self.autocast():
            pred = self.model(inputs)
            loss = self.criterion(pred, target) if self.criterion is not None else None
        metrics = self._metrics_in_use()
        if metrics is not None:
            metrics.update(pred, target)
        return pred, loss

    def infer(self, split: str = "infer") -> Any:
        self._known_splits(split, ())
        with self._at_work():
            self._set_up((), (split,))
            with self._evaluating(RunnerMode.infer, split):
                return evaluation.infer_split(self, self._evaluate_loader(split))

    def infer_step(self, data: Any) -> Any:
        inputs = _input_and_target(data)[0] if isinstance(data, Mapping | Sequence) else data
        with self.autocast():
            return self.model(inputs)

    @contextlib.contextmanager
    def _evaluating(self, mode: RunnerMode, split: str) -> Iterator[None]:
        """The unwrapped (or averaged) module in `self.model`, in eval mode, without gradients; put back
        after."""
        trained, before, split_before = self.model, self.mode, self.split
        began, own_buffers = time.perf_counter(), evaluation.share_buffers(self)
        self.model = self.unwrap(trained) if self.ema is None else self.ema.module
        self.mode, self.split = mode, split
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model, self.mode, self.split = trained, before, split_before
            evaluation.restore_buffers(self, own_buffers)
            self._timings.evaluate_seconds += time.perf_counter() - began

    def get_epoch_result(self) -> Values:
        return evaluation.reduced_result(self, self._metrics_in_use())

    def get_step_result(self) -> Values:
        metrics = self._metrics_in_use()
        return {"loss": self.meters.mean, **evaluation.computed(metrics)}

    # checkpoints --------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        return checkpointing.shared_state(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        checkpointing.apply_shared(self, state)

    def save_checkpoint(
        self, name: str = "latest", epochs: int | None = None, save_best: bool = True
    ) -> None:
        began = time.perf_counter()
        checkpointing.save(self, name, epochs, save_best)
        self._timings.checkpoint_stall_seconds += time.perf_counter() - began

    def _timing_fields(self) -> Values:
        return self._timings.of_epoch(self.device, self.steps)

    def load_checkpoint(self, checkpoint: File | Mapping[str, Any]) -> None:
        loading.load(self, checkpoint)

    def load_pretrained(self, checkpoint: File | Mapping[str, Any], strict: bool = True) -> LoadedKeys:
        return loading.load_pretrained(self, checkpoint, strict)

    def _save_interrupted(self) -> None:
        checkpointing.save_interrupted(self)

    def _load_best(self) -> tuple[str | None, int | None]:
        record = checkpointing.load_best(self)
        if record is None:
            return None, None
        return record.name, record.info.get("best_index") if "best" in record.names else None


def _input_and_target(data: Any) -> tuple[Any, Any]:
    # nearly always; isinstance of an ABC costs a microsecond
    if type(data) in (tuple, list) and len(data) == 2:
        return data[0], data[1]
    if isinstance(data, Mapping) and "input" in data:
        return data["input"], data.get("target")
    if isinstance(data, Sequence) and not isinstance(data, str) and len(data) >= 2:
        return data[0], data[1]
    if isinstance(data, Sequence) and len(data) == 1:
        return data[0], None
    what = f"mapping of {sorted(map(str, data))}" if isinstance(data, Mapping) else type(data).__name__
    raise ConfigError(
        f"a batch is a {what}: return (input, target) or a mapping with 'input' and 'target' from the "
        "data set, or override train_step and evaluate_step"
    )
