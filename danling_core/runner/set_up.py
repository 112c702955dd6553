"""Builders and checks of what is made once before training: optimizer, schedule, metrics, stop agreement."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from danling_core.config import Config
from danling_core.data.samplers import GlobalBatchSampler
from danling_core.errors import ConfigError
from danling_core.metrics import states as metric_states
from danling_core.optim.optimizers import build_optimizer, parameter_groups
from danling_core.optim.precision import is_bf16_native
from danling_core.optim.schedulers import build_scheduler, default_interval, needs_metric
from danling_core.parallel.ranks import Ranks
from danling_core.parallel.stopping import Stopping, share
from danling_core.session.context import RunContext
from danling_core.train.limits import Limits

logger = logging.getLogger("danling")


def optimizer_of(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer that the config names. Raises ConfigError where it names none."""
    if config.optim is None:
        raise ConfigError(
            "no optimizer: set self.optimizer in the runner, or `optim: {name: adamw, lr: ...}`"
        )
    groups = parameter_groups(model.named_parameters(), config.optim.groups)
    return build_optimizer(config.optim.name, groups, **config.optim.arguments())


def scheduler_of(config: Config, optimizer: torch.optim.Optimizer, limits: Limits, score_mode: str) -> Any:
    """Build the scheduler that the config names, or return None."""
    stated = config.scheduler
    if stated is None:
        return None
    arguments = stated.arguments()
    if stated.name.lower() == "reducelronplateau":
        arguments.setdefault("mode", score_mode)
    return build_scheduler(
        stated.name,
        optimizer,
        # the length of the schedule, in what it counts
        total_steps=limits.total_epochs if stated.interval == "epoch" else limits.total_steps,
        warmup_steps=stated.warmup_steps,
        **arguments,
    )


def counts_steps(scheduler: Any, interval: str | None, config: Config, *, by_epoch: bool) -> bool:
    """Return whether the scheduler steps with the optimizer, and not with epochs or results.

    Args:
        interval: what the runner states: "step", "epoch" or None.
    """
    if scheduler is None:
        return False
    stated = interval or (config.scheduler and config.scheduler.interval)
    if stated not in (None, "step", "epoch"):
        raise ConfigError(f"scheduler_interval is {stated!r}, wanted 'step', 'epoch' or None")
    if stated is None or needs_metric(scheduler):
        stated = default_interval(scheduler, by_epoch=by_epoch)
    return stated == "step"


def check_metrics(metrics: Mapping[str, Any], *, is_distributed: bool, trained: str | None) -> None:
    """Refuse metrics that cannot be reduced over the ranks, or not be saved inside an epoch.

    Args:
        metrics: by the name of the runner's attribute; None where there is none.
        trained: the name of those that training updates; None where nothing is trained.

    Raises:
        ConfigError: names the metric.
    """
    for name, metric in metrics.items():
        if metric is None:
            continue
        if is_distributed:
            metric_states.check_reducible(metric, name)
        if name == trained:
            metric_states.saved(metric, name)


def check_criterion(criterion: Any) -> None:
    """Refuse a criterion with weights of its own on several ranks. Raises ConfigError."""
    if not isinstance(criterion, nn.Module) or isinstance(criterion, DistributedDataParallel):
        return
    if any(parameter.requires_grad for parameter in criterion.parameters()):
        raise ConfigError(
            f"the criterion {type(criterion).__name__} has parameters to train, whose gradients are not reduced "
            "over the ranks: make it a part of the model, and have the model's forward use it"
        )


def warn_of_emulated_bf16(config: Config, device: torch.device) -> None:
    """Warn where this CPU has no bf16 of its own. Rank 0."""
    if config.precision == "bf16" and device.type == "cpu" and not is_bf16_native():
        logger.warning("bf16 is emulated on this CPU, several times slower than fp32: precision=fp32")


def warn_of_single_samples(model: nn.Module, sampler: GlobalBatchSampler | None, world_size: int) -> None:
    """Warn where a BatchNorm over (batch, channels) may get one sample at the end of a pass. Rank 0."""
    if sampler is None or sampler.smallest_share > 1:
        return
    if any(isinstance(module, nn.BatchNorm1d) and module.training for module in model.modules()):
        logger.warning(
            "%d samples in batches of %d on %d rank(s) leave some rank one sample, and BatchNorm1d needs more than "
            "one value per channel",
            *(sampler.length, sampler.batch_size, world_size),
        )


@contextlib.contextmanager
def explaining_batch_norm(split: str, rank: int, samples: Callable[[], int]) -> Iterator[None]:
    """Raise ConfigError for torch's error that a batch is too small to be normalized.

    Args:
        samples: returns the size of this rank's batch under way.
    """
    try:
        yield
    except ValueError as error:
        if "Expected more than 1 value per channel" not in str(error):
            raise
        raise ConfigError(
            f"a batch of {samples() or 1} on rank {rank} is too small for a BatchNorm ({error}): set "
            f"dataloader.{split}.drop_last=true if it is the last of a pass, or another batch_size, or normalize "
            "over all ranks (torch.nn.SyncBatchNorm)"
        ) from error


def begin_stopping(context: RunContext | None, ranks: Ranks, max_seconds: float | None) -> Stopping:
    """Begin to listen for a stop: through the launcher's control block, or one that the ranks share. Collective."""
    control = context.control if context is not None else None
    nodes = context.nodes if context is not None else 1
    if control is None:
        shared = share()
        control, nodes = shared.control, shared.nodes
        if shared.is_owner:
            shutil.rmtree(shared.folder)
    return Stopping(
        control,
        is_main=ranks.is_main_process,
        nodes=nodes,
        mark=_mark_queue if ranks.device.type == "cuda" else None,
        max_seconds=max_seconds,
    )


def _mark_queue() -> Callable[[], None]:
    """Mark what is queued on this rank's GPU now; return a function that waits until that is done."""
    event = torch.cuda.Event(blocking=True)
    event.record()
    return event.synchronize
