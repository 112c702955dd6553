"""What happens once when work begins: device, optimizer, EMA, DDP, resume, writers."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from danling_core.data import GlobalBatchSampler
from danling_core.errors import ConfigError
from danling_core.metrics import states as metric_states
from danling_core.optim.ema import EMA
from danling_core.optim.optimizers import (
    build_optimizer,
    build_scheduler,
    default_interval,
    needs_metric,
    parameter_groups,
)
from danling_core.optim.precision import Precision, is_bf16_native
from danling_core.parallel import distributed, seeding
from danling_core.parallel.control import collective_timeout
from danling_core.parallel.stopping import Stopping, share
from danling_core.runner import checkpointing, writing
from danling_core.runner.torch_data import TorchData
from danling_core.runner.warm_up import rebuild_buckets
from danling_core.train.timing import Timings


class TorchSetUp(TorchData):
    """Places, builds and wraps what the user set; takes up the run's newest checkpoint."""

    def init_distributed(self) -> None:
        self.device = distributed.resolve_device(self.config.device)
        timeout, context = self.config.hang_timeout_seconds, self._context
        if context is not None and context.is_launched:
            timeout = collective_timeout(timeout)
        self._joined = distributed.init_process_group(self.device, timeout)
        self._init_data()
        self._is_placed = self._is_trainable = self._is_announced = self._has_weights = False
        self._resume_is_due = True
        self._resumed: dict[str, Any] | None = None
        self._resumed_bitwise = True
        self._split_state: dict[str, Any] | None = None
        self._weight, self._count, self._last_iter = 1.0, 0, True
        self._epoch_is_over, self._inside_split, self._dry, self._left_early = True, False, False, False
        self._rng_before_evaluation: dict[str, Any] | None = None
        self._buffers_before: list[torch.Tensor] = []
        self._iters_at_split = self._steps_at_split = self._samples_logged = 0
        self._logged_at, self._told_at = 0.0, float("-inf")
        self._timings = Timings()

    def _take_config(self, config: Any) -> None:
        super()._take_config(config)
        device = distributed.resolve_device(self.config.device)
        self._precision = Precision(
            self.config.precision, device.type, skip_non_finite=self.config.non_finite == "skip"
        )

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
        seed = self.config.seed if seed is None else seed
        offset = self.rank if bias is None or bias is True else int(bias)
        return seeding.seed_everything(seed + offset)

    def set_deterministic(self) -> None:
        seeding.set_deterministic()

    def unwrap(self, model: Any) -> Any:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        return getattr(model, "_orig_mod", model)

    def _broadcast(self, value: Any) -> Any:
        return distributed.broadcast_object(value)

    def _leave_together(self) -> None:
        if self._joined:  # else whoever made the group ends it
            distributed.destroy_at_exit()

    # set-up -------------------------------------------------------------------------------------------------
    def _set_up(
        self, train_splits: Sequence[str], evaluate_splits: Sequence[str] = (), *, resume: bool = True
    ) -> None:
        if self.model is None:
            raise ConfigError(f"{type(self).__name__} sets no model: assign self.model in __init__")
        if not self._is_placed:
            self._place()
        self._check_metrics(is_trained=bool(train_splits))
        if train_splits and not self._is_trainable:
            self._make_trainable(train_splits)
        for split in evaluate_splits:
            self._evaluate_loader(split)
        if resume and (self._resume_is_due if train_splits else not self._has_weights):
            self._resumed = checkpointing.resume(self)
            self._resume_is_due = self._resume_is_due and not train_splits
        self._has_weights = True
        if self._is_open and not self._is_announced:
            self._announce()

    def _place(self) -> None:
        memory = {"memory_format": torch.channels_last} if self.config.channels_last else {}
        self.model = self.model.to(self.device, **memory)
        if self.ema is None and self.config.ema_decay is not None:
            self.ema = EMA(self.model, self.config.ema_decay)
        for part in (self.criterion, self.ema, self.metrics, self.train_metrics, self.evaluate_metrics):
            if hasattr(part, "to"):
                part.to(self.device)
        self._is_placed = True
        emulates = self.config.precision == "bf16" and self.device.type == "cpu" and not is_bf16_native()
        if emulates and self.is_main_process:
            self.logger.warning(
                "bf16 is emulated on this CPU, several times slower than fp32: precision=fp32"
            )

    def _check_metrics(self, is_trained: bool) -> None:
        for name in ("metrics", "train_metrics", "evaluate_metrics"):
            metric = getattr(self, name)
            if metric is None:
                continue
            if self.distributed:
                metric_states.check_reducible(metric, name)
            used = "metrics" if self.train_metrics is None else "train_metrics"
            if is_trained and name == used:
                metric_states.saved(metric, name)  # refuses what a stop inside an epoch could not save

    def _check_criterion(self) -> None:
        criterion = self.criterion
        if not isinstance(criterion, torch.nn.Module) or isinstance(criterion, DistributedDataParallel):
            return
        if any(parameter.requires_grad for parameter in criterion.parameters()):
            raise ConfigError(
                f"the criterion {type(criterion).__name__} has parameters to train, whose gradients nobody reduces "
                "over the ranks: make it a part of the model, and have the model's forward use it"
            )

    def _warn_of_single_samples(self, split: str) -> None:
        """Some BatchNorm may fail at the end of the pass: one over (batch, channels) needs two samples."""
        sampler = getattr(self._stream(split).loader, "global_batches", None)
        if not isinstance(sampler, GlobalBatchSampler) or sampler.smallest_share > 1:
            return
        self.model.train()
        norms = [m for m in self.model.modules() if isinstance(m, torch.nn.BatchNorm1d) and m.training]
        if norms and self.is_main_process:
            self.logger.warning(
                "%d samples in batches of %d on %d rank(s) leave some rank one sample, and BatchNorm1d needs more than "
                "one value per channel",
                *(sampler.length, sampler.batch_size, self.world_size),
            )

    @contextlib.contextmanager
    def _explaining_batch_norm(self, split: str) -> Iterator[None]:
        """Raises ConfigError for torch's word that a batch is too small to be normalized."""
        try:
            yield
        except ValueError as error:
            if "Expected more than 1 value per channel" not in str(error):
                raise
            raise ConfigError(
                f"a batch of {self._count or 1} on rank {self.rank} is too small for a BatchNorm ({error}): set "
                f"dataloader.{split}.drop_last=true if it is the last of a pass, or another batch_size, or normalize "
                "over all ranks (torch.nn.SyncBatchNorm)"
            ) from error

    def _make_trainable(self, train_splits: Sequence[str]) -> None:
        if self.config.steps_per_epoch is not None and len(train_splits) > 1:
            raise ConfigError(f"steps_per_epoch goes with one split to train on, found {list(train_splits)}")
        self._train_splits = tuple(train_splits)
        for split in train_splits:
            self._warn_of_single_samples(split)
        if self.distributed:
            self._check_criterion()
        self._build_optimisation()
        self._wrap_model()
        if self.world_size > 2 and not self.config.find_unused_parameters:
            with self._explaining_batch_norm(train_splits[0]):
                rebuild_buckets(self, train_splits[0])
        self._is_trainable = True

    def _announce(self) -> None:
        """Begin to listen for a stop, and to write. Collective."""
        given = self._context.control if self._context is not None else None
        control, nodes = given, self._context.nodes if self._context is not None else 1
        if control is None:
            shared = share()
            control, nodes = shared.control, shared.nodes
            if shared.is_owner:
                shutil.rmtree(shared.folder)
        self._stopping = Stopping(
            control,
            is_main=self.is_main_process,
            nodes=nodes,
            mark=_mark_queue if self.device.type == "cuda" else None,
            max_seconds=self.config.max_seconds,
        )
        self._beat = given.ranks[self.local_rank].beat if given is not None else _no_beat
        if self._files is not None and not self._resumed_bitwise:  # stays so: a status is built on the last
            self._files.write_status(bitwise=False)
        self._timings.begin(self.steps)
        self._steps_at_start = self.steps
        self.init_tensorboard()
        self._is_announced = True
        if self._files is None or self._files.status.is_complete:
            return
        self.emit(
            "run_started",
            world_size=self.world_size,
            device=str(self.device),
            resumed=self._resumed,
            epochs=self.epochs,
            steps=self.steps,
            iters=self.iters,
        )

    def _stop_because(self, reason: str) -> None:
        if self._is_announced:
            self._stopping.wish(reason)

    def _stop_reason(self) -> str | None:
        return self._stopping.reason if self._is_announced and self._stopping.requested else None

    def _keep_beating(self) -> None:
        control = self._context.control if self._context is not None else None
        if control is not None:
            control.ranks[self.local_rank].beat(self.steps)

    def _build_optimisation(self) -> None:
        config, stated = self.config, self.config.scheduler
        if self.optimizer is None:
            if config.optim is None:
                raise ConfigError(
                    "no optimizer: set self.optimizer in the runner, or `optim: {name: adamw, lr: ...}`"
                )
            groups = parameter_groups(self.model.named_parameters(), config.optim.groups)
            self.optimizer = build_optimizer(config.optim.name, groups, **config.optim.arguments())
        if self.scheduler is None and stated is not None:
            arguments = stated.arguments()
            if stated.name.lower() == "reducelronplateau":
                arguments.setdefault("mode", self._results.score_mode)
            self.scheduler = build_scheduler(
                stated.name,
                self.optimizer,
                # the length of the schedule, in what it counts
                total_steps=self.total_epochs if stated.interval == "epoch" else self.total_steps,
                warmup_steps=stated.warmup_steps,
                **arguments,
            )
        self._schedules_steps = self.scheduler is not None and self._scheduler_interval() == "step"
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._clip_value, self._clip_norm = config.clip_grad_value, config.clip_grad_norm

    def _scheduler_interval(self) -> str:
        stated = self.scheduler_interval or (self.config.scheduler and self.config.scheduler.interval)
        if stated not in (None, "step", "epoch"):
            raise ConfigError(f"scheduler_interval is {stated!r}, wanted 'step', 'epoch' or None")
        if stated is not None and not needs_metric(self.scheduler):
            return stated
        return default_interval(self.scheduler, by_epoch=self._progress.unit == "epoch")

    def _wrap_model(self) -> None:
        if self.config.compile:
            self.model = torch.compile(self.model)
        if not self.distributed or not any(p.requires_grad for p in self.model.parameters()):
            return
        # naming the default warns
        buffers: Any = {} if self.config.broadcast_buffers else {"broadcast_buffers": False}
        self.model = DistributedDataParallel(
            self.model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            find_unused_parameters=self.config.find_unused_parameters,
            gradient_as_bucket_view=True,
            **buffers,
        )
        if self.ema is not None:  # DDP has just made the weights equal; the average starts from those
            self.ema.module.load_state_dict(self.unwrap(self.model).state_dict())

    def init_logging(self) -> None:
        self._log = writing.open_text_log(self)
        self._log.process = self._speaker
        if self.is_main_process:  # before the run's lease is released
            self._closing.callback(writing.store_text_log, self)

    def init_tensorboard(self) -> None:
        if self._files is not None:
            self._files.add_writers(writing.make_writers(self))

    def close(self) -> None:
        super().close()
        self._evaluate_loaders.clear()
        self._is_announced, self._inside_split, self._resume_is_due = False, False, True
        self._rng_before_evaluation = None
        for loader, _ in self._made.values():  # their processes, where a loader keeps some
            loader._iterator = None


def _mark_queue() -> Callable[[], None]:
    """Mark what is queued on this rank's GPU now; returns what waits until that is done."""
    event = torch.cuda.Event(blocking=True)
    event.record()
    return event.synchronize


def _no_beat(step: int) -> None:
    """Without a launcher nobody listens."""
