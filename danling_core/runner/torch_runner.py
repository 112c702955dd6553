"""The PyTorch runner: devices, DDP, mixed precision, loaders, steps. Users subclass it."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from danling_core import distributed, seeding
from danling_core.data import TrainStream, build_evaluate_loader, build_train_loader
from danling_core.ema import EMA
from danling_core.errors import ConfigError
from danling_core.optim import build_optimizer, build_scheduler, needs_metric
from danling_core.precision import Precision
from danling_core.runner import checkpointing, evaluation, writing
from danling_core.runner.base import RunnerMode
from danling_core.runner.base_runner import BaseRunner
from danling_core.runner.loop import flush_losses, train_segment
from danling_core.runner.meter import LossMeter
from danling_core.runner.stopping import LocalBlock, Stopping
from danling_core.runner.warm_up import rebuild_buckets

_SYNC_STRIDE = 16


class TorchRunner(BaseRunner):
    """Trains a torch model on one rank or many, CPU or CUDA.

    A subclass calls `super().__init__(config)` and sets `datasets`, `model`, `criterion`, and, unless the config names
    them, `optimizer` and `scheduler`. Moving to the device, DDP, EMA and resume happen when `train()` begins.
    """

    model: Any
    optimizer: Any

    def init_distributed(self) -> None:
        """Pick this rank's device and join the process group, if a launcher says that there are several. Collective."""
        self.device = distributed.resolve_device(self.config.device)
        distributed.init_process_group(self.device, self.config.hang_timeout_seconds)
        self._precision = Precision(
            self.config.precision, self.device.type, skip_non_finite=self.config.non_finite == "skip"
        )
        self._is_set_up = False
        self._streams: dict[str, TrainStream] = {}
        self._evaluate_loaders: dict[str, Any] = {}
        self._resumed: dict[str, Any] | None = None
        self._resumed_bitwise = True
        self._split_state: dict[str, Any] | None = None
        self._weight, self._count, self._last_iter = 1.0, 0, True
        self._epoch_is_over, self._inside_split, self._dry = True, False, False
        self._rng_before_evaluation: dict[str, Any] | None = None
        self._iters_at_split = self._samples_logged = 0
        self._logged_at = 0.0

    @property
    def world_size(self) -> int:
        return distributed.world_size()

    @property
    def rank(self) -> int:
        return distributed.rank()

    @property
    def local_rank(self) -> int:
        return distributed.local_rank()

    def set_seed(self, seed: int | None = None, bias: int | bool | None = None) -> int:
        """Seed Python, NumPy, torch and CUDA of this rank with `seed + bias`; returns that sum.

        Args:
            seed: default: the config's. 0 is a seed.
            bias: default: the rank, so that ranks differ in augmentation and dropout; False for none.
        """
        seed = self.config.seed if seed is None else seed
        offset = self.rank if bias is None or bias is True else int(bias)
        return seeding.seed_everything(seed + offset)

    def set_deterministic(self) -> None:
        """Ask torch for deterministic algorithms; one that has none raises when it is used."""
        seeding.set_deterministic()

    def unwrap(self, model: Any) -> Any:
        """The user's module, without DDP and `torch.compile` around it."""
        if isinstance(model, DistributedDataParallel):
            model = model.module
        return getattr(model, "_orig_mod", model)

    # data --------------------------------------------------------------------------------------------------------
    @property
    def batch_size(self) -> int:
        return self.config.dataloader.for_split("train", training=True).batch_size

    @property
    def batch_size_equivalent(self) -> int:
        return self.batch_size * self.world_size * self.accum_steps

    @functools.cached_property
    def steps_per_epoch(self) -> int | None:  # type: ignore[override]
        """Optimizer steps in one epoch; None for unsized data without `steps_per_epoch` in the config."""
        if self.config.steps_per_epoch is not None:
            return self.config.steps_per_epoch
        lengths = [self._stream(split).windows_per_pass for split in self._default_train_splits()]
        return None if None in lengths or not lengths else sum(n for n in lengths if n is not None)

    def _stream(self, split: str) -> TrainStream:
        if split not in self._streams:
            if split not in self.dataloaders:
                self.dataloaders[split] = build_train_loader(
                    self.datasets[split],
                    self.config.dataloader.for_split(split, training=True),
                    **self._loader_arguments(split),
                )
                self.datasamplers.setdefault(split, getattr(self.dataloaders[split], "batch_sampler", None))
            self._streams[split] = TrainStream(
                self.dataloaders[split],
                accum_steps=self.accum_steps,
                world_size=self.world_size,
                rank=self.rank,
                reduce=distributed.reduce_floats if self.distributed else None,
                seed=self.seed,
            )
        return self._streams[split]

    def _evaluate_loader(self, split: str) -> Any:
        if split in self._evaluate_loaders:
            return self._evaluate_loaders[split]
        if split in self.datasets:
            loader = build_evaluate_loader(
                self.datasets[split],
                self.config.dataloader.for_split(split, training=False, trained=split in self._streams),
                **self._loader_arguments(split),
            )
            if split not in self._streams:
                self.dataloaders[split] = loader
        else:
            loader = self.dataloaders[split]
        self._evaluate_loaders[split] = loader
        return loader

    def _loader_arguments(self, split: str) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "world_size": self.world_size,
            "seed": self.seed,
            "collate_fn": getattr(self, "collate_fn", None),
            "sampler": self.datasamplers.get(split),
            "device_type": self.device.type,
        }

    # set-up ------------------------------------------------------------------------------------------------------
    def _set_up(self, train_splits: Sequence[str]) -> None:
        if self._is_set_up:
            return
        if self.model is None:
            raise ConfigError(f"{type(self).__name__} sets no model: assign self.model in __init__")
        self._is_set_up = True
        control = self._context.control if self._context is not None else None
        stride = 1 if self.device.type == "cpu" else _SYNC_STRIDE
        self._stopping = Stopping(
            control if control is not None else LocalBlock(),
            is_main=self.is_main_process,
            stride=stride,
            max_seconds=self.config.max_seconds,
        )
        self._beat = control.ranks[self.local_rank].beat if control is not None else _no_beat
        self._place_model()
        for split in train_splits:
            self._stream(split)
        if train_splits:
            self._build_optimisation()
            self._wrap_model()
            if self.distributed and self.world_size > 2 and not self.config.find_unused_parameters:
                rebuild_buckets(self, train_splits[0])
        self._resumed = checkpointing.resume(self)
        if self._files is not None and not self._resumed_bitwise:  # and so it stays, since a status is built on the last
            self._files.write_status(bitwise=False)
        self.init_tensorboard()
        self.emit(
            "run_started",
            world_size=self.world_size,
            device=str(self.device),
            resumed=self._resumed,
            epochs=self.epochs,
            steps=self.steps,
            iters=self.iters,
        )

    def _place_model(self) -> None:
        memory = {"memory_format": torch.channels_last} if self.config.channels_last else {}
        self.model = self.model.to(self.device, **memory)
        if isinstance(self.criterion, nn.Module):
            self.criterion = self.criterion.to(self.device)
        for metrics in (self.metrics, self.train_metrics, self.evaluate_metrics):
            if hasattr(metrics, "to"):
                metrics.to(self.device)

    def _build_optimisation(self) -> None:
        config = self.config
        if self.optimizer is None:
            if config.optim is None:
                raise ConfigError("no optimizer: set self.optimizer in the runner, or `optim: {name: adamw, lr: ...}`")
            self.optimizer = build_optimizer(config.optim.name, self.model.parameters(), **config.optim.arguments())
        if self.scheduler is None and config.scheduler is not None:
            self.scheduler = build_scheduler(
                config.scheduler.name,
                self.optimizer,
                total_steps=self.total_steps,
                warmup_steps=config.scheduler.warmup_steps,
                **config.scheduler.arguments(),
            )
        self._schedules_steps = self.scheduler is not None and self._scheduler_interval() == "step"
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.ema is None and config.ema_decay is not None:
            self.ema = EMA(self.model, config.ema_decay)

    def _scheduler_interval(self) -> str:
        stated = self.config.scheduler
        if needs_metric(self.scheduler):
            return "epoch"
        if stated is not None and stated.interval is not None:
            return stated.interval
        own = stated is None or stated.name in ("constant", "linear", "cosine")
        return "step" if own else "epoch"

    def _wrap_model(self) -> None:
        if self.config.compile:
            self.model = torch.compile(self.model)
        if self.distributed and any(p.requires_grad for p in self.model.parameters()):
            self.model = DistributedDataParallel(
                self.model,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                find_unused_parameters=self.config.find_unused_parameters,
                gradient_as_bucket_view=True,
                **({} if self.config.broadcast_buffers else {"broadcast_buffers": False}),
            )
            if self.ema is not None:  # DDP has just made the weights equal; the average starts from those
                self.ema.module.load_state_dict(self.unwrap(self.model).state_dict())

    # train -------------------------------------------------------------------------------------------------------
    def train_epoch(self, split: str = "train") -> dict[str, Any]:
        """Train on a split until the epoch (in step mode: the segment) ends; returns its result. Collective."""
        self.split, self.mode = split, RunnerMode.train
        self.model.train()
        self.meters = LossMeter(
            refuse_non_finite=self.config.non_finite == "raise", skip_non_finite=self.config.non_finite == "skip"
        )
        metrics = self._metrics_in_use()
        if metrics is not None:
            metrics.reset()
        self._begin_split()
        self._inside_split = True
        train_segment(self, self._stream(split))
        flush_losses(self)
        self._inside_split = False
        return evaluation.reduced_result(self, metrics)

    def _begin_split(self) -> None:
        """Take up the split where a checkpoint inside it left off, or begin it."""
        self._samples_logged, self._logged_at, self._iters_at_split = 0, 0.0, self.iters
        state, self._split_state = self._split_state, None
        if state is not None:
            checkpointing.restore_split(self, state)

    def train_step(self, data: Any) -> tuple[Any, torch.Tensor]:
        """One iter: forward, loss, metrics, `advance`. Override it for other shapes of data or several losses.

        Args:
            data: one batch on the device: `(input, target)`, or a mapping with `input` and `target`.

        Returns:
            the prediction, and the mean loss over the batch (a scalar).
        """
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
        """Backward, and, at the end of an accumulation window, the optimizer's step. Call it once per `train_step`.

        Args:
            loss: mean over this rank's batch, a scalar; weighted here so that the window's gradient is that of the mean
                over all its samples on all ranks.
        """
        if self._dry:
            (loss * 0.0).backward()
            return
        self.meters.add(loss.detach(), self._count)
        self.backward(loss if self._weight == 1.0 else loss * self._weight)
        if self._last_iter:
            self._step()

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of `loss`, scaled where fp16 needs it."""
        scaler = self._precision.scaler
        (loss if scaler is None else scaler.scale(loss)).backward()

    def _step(self) -> None:
        optimizer, scaler, config = self.optimizer, self._precision.scaler, self.config
        taken = None
        if scaler is not None:
            scaler.unscale_(optimizer)
        if config.clip_grad_value is not None:
            nn.utils.clip_grad_value_(self._parameters, config.clip_grad_value)
        if config.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, config.clip_grad_norm)
        if scaler is None:
            optimizer.step()
        else:
            taken = self._scaled_step(scaler)
        optimizer.zero_grad(set_to_none=True)
        if self._schedules_steps:
            self.scheduler.step()
        if self.ema is not None:
            self.ema.update(self.unwrap(self.model), taken)

    def _scaled_step(self, scaler: torch.amp.GradScaler) -> torch.Tensor:
        """Step unless a gradient is not finite; gradients are reduced by now, so all ranks see the same."""
        found = scaler._found_inf_per_device(self.optimizer)
        taken = 1.0 - torch.stack([value.to(self.device) for value in found.values()]).sum().clamp(max=1.0)
        scaler.step(self.optimizer)
        scaler.update()
        return taken

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Context of the forward pass, after `precision`."""
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

    def scale_lr(self, lr: float, lr_scale_factor: float | None = None, batch_size_base: int | None = None) -> float:
        """The learning rate after the linear scaling rule (arXiv 1706.02677): `lr` times `batch_size_equivalent` over
        `batch_size_base`, or times a stated factor.

        Raises:
            ConfigError: neither the factor nor the base is given, or both.
        """
        if (lr_scale_factor is None) == (batch_size_base is None):
            raise ConfigError("scale_lr needs exactly one of lr_scale_factor and batch_size_base")
        if lr_scale_factor is None:
            assert batch_size_base is not None
            lr_scale_factor = self.batch_size_equivalent / batch_size_base
        return lr * lr_scale_factor

    # evaluate ----------------------------------------------------------------------------------------------------
    def evaluate_epoch(self, split: str = "val") -> dict[str, Any]:
        """Evaluate a split: every sample counted once at any world size, EMA weights where there are any. Collective."""
        with self._evaluating(RunnerMode.evaluate, split):
            return evaluation.evaluate_split(self, self._evaluate_loader(split))

    def evaluate_step(self, data: Any) -> tuple[Any, torch.Tensor | None]:
        """One batch, without gradients: forward, loss, metrics. Returns the prediction and the mean loss."""
        inputs, target = _input_and_target(data)
        with self.autocast():
            pred = self.model(inputs)
            loss = self.criterion(pred, target) if self.criterion is not None else None
        metrics = self._metrics_in_use()
        if metrics is not None:
            metrics.update(pred, target)
        return pred, loss

    def infer(self, split: str = "infer") -> Any:
        """The model's outputs for a split, in data set order, on every rank, on the CPU. Collective."""
        with self._at_work():
            self._set_up(())
            with self._evaluating(RunnerMode.infer, split):
                return evaluation.infer_split(self, self._evaluate_loader(split))

    def infer_step(self, data: Any) -> Any:
        """The outputs for one batch: `(batch, ...)`."""
        inputs = _input_and_target(data)[0] if isinstance(data, Mapping | Sequence) else data
        with self.autocast():
            return self.model(inputs)

    @contextlib.contextmanager
    def _evaluating(self, mode: RunnerMode, split: str) -> Iterator[None]:
        """The unwrapped (or averaged) module in `self.model`, in eval mode, without gradients; put back after."""
        trained, before, split_before = self.model, self.mode, self.split
        evaluation.share_buffers(self)
        self._rng_before_evaluation = seeding.capture_rng()
        self.model = self.unwrap(trained) if self.ema is None else self.ema.module
        self.mode, self.split = mode, split
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model, self.mode, self.split = trained, before, split_before
            if not self._stopping.requested:  # else they are part of the state that is saved next
                self._rng_before_evaluation = None

    def get_step_result(self) -> Mapping[str, Any]:
        """The running loss and metrics of the split being trained or evaluated, on this rank. Waits for the device."""
        metrics = self._metrics_in_use()
        return {"loss": self.meters.mean, **(metrics.compute() if metrics is not None else {})}

    # checkpoints -------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Everything a bitwise resume needs that is equal on all ranks; per-rank state is gathered beside it."""
        return checkpointing.shared_state(self)

    def save_checkpoint(self, name: str = "latest", epochs: int | None = None, save_best: bool = True) -> None:
        """Save the run's whole state in the background; the loop pays for a copy of it. Collective.

        Args:
            name: the pointer to move.
            epochs: number of the epoch that just ended: kept as `epoch-N` every `save_interval` epochs.
            save_best: also move `best`, where the latest result is the best.

        Raises:
            CheckpointError: an earlier save failed for good.
        """
        checkpointing.save(self, name, epochs, save_best)

    def load_checkpoint(self, checkpoint: str | os.PathLike[str] | Mapping[str, Any]) -> None:
        """Take over the whole state of a checkpoint: a folder of checkpoints or of a run (any URL), or a state."""
        checkpointing.load(self, checkpoint)

    def load_pretrained(self, checkpoint: str | os.PathLike[str] | Mapping[str, Any], strict: bool = True) -> list[str]:
        """Take over weights only, the averaged ones where the checkpoint has them; returns the names left out.

        Raises:
            CheckpointError: with `strict`, weights are missing or unexpected; the message lists them.
        """
        return checkpointing.load_pretrained(self, checkpoint, strict)

    def _save_interrupted(self) -> None:
        checkpointing.save_interrupted(self)

    def _load_best(self) -> str | None:
        return checkpointing.load_best(self)

    def _broadcast(self, value: Any) -> Any:
        return distributed.broadcast_object(value)

    def init_logging(self) -> None:
        """Open the logger named `danling` for this rank, with the run's text log on rank 0; root is left alone."""
        self._log = writing.open_text_log(self)

    def init_tensorboard(self) -> None:
        """Open the curves (and the progress bar), from where a resume stands. Rank 0; others return."""
        if self._files is not None:
            self._files.add_writers(writing.make_writers(self))

    def close(self) -> None:
        """Close files and logs, drop loaders' processes. The process group stays: who made the ranks ends it."""
        super().close()
        self._evaluate_loaders.clear()


def _no_beat(step: int) -> None:
    """Without a launcher nobody listens."""


def _input_and_target(data: Any) -> tuple[Any, Any]:
    if isinstance(data, Mapping):
        return data["input"], data.get("target")
    if isinstance(data, Sequence) and not isinstance(data, str) and len(data) >= 2:
        return data[0], data[1]
    if isinstance(data, Sequence) and len(data) == 1:
        return data[0], None
    raise ConfigError(
        f"a batch is a {type(data).__name__}: return (input, target) or a mapping with 'input' and 'target' from the "
        "data set, or override train_step and evaluate_step"
    )

