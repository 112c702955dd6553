"""Checks, warnings and the agreement to stop, of what is set up once before training."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from danling_core.config import Config, FreeParams
from danling_core.config.sections import read, unread
from danling_core.data.samplers import GlobalBatchSampler
from danling_core.errors import ConfigError
from danling_core.metrics import states as metric_states
from danling_core.optim.precision import is_bf16_native
from danling_core.parallel.ranks import Ranks
from danling_core.parallel.stopping import Stopping, share
from danling_core.session.context import RunContext
from danling_core.suggest import nearest
from danling_core.train.evaluator import name_of

logger = logging.getLogger("danling")
_TRUE_TEXTS = {"no", "off", "n", "yes", "on", "y"}


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
        if "loss" in (metric.keys() if hasattr(metric, "keys") else [name_of(metric)]):
            raise ConfigError(
                f"self.{name} has a metric called 'loss', which is the name of the criterion's own: give it another"
            )
        if is_distributed:
            metric_states.check_reducible(metric, name)
        if name == trained:
            metric_states.saved(metric, name)


def check_reduction(criterion: Any, default_steps: Sequence[str]) -> None:
    """Refuse a criterion that sums over a batch, where the steps are those of `TorchRunner`: losses are weighted by the
    number of samples, and a sum is no loss of one sample.

    Raises:
        ConfigError: says what to do.
    """
    if default_steps and getattr(criterion, "reduction", None) == "sum":
        raise ConfigError(
            f"the criterion is a {type(criterion).__name__} with reduction='sum', and losses are averaged over "
            f"samples: use 'mean', or override {' and '.join(default_steps)} and return a mean"
        )


def warn_of_unread(params: Any) -> None:
    """Warn of untyped hyperparameters that nobody had read when the first step was made. Rank 0."""
    if not isinstance(params, FreeParams):
        return
    known = read(params)
    for key in unread(params):
        near = nearest(key, known)
        hint = f"; did you mean {near!r}, which was read?" if near else ""
        logger.warning("params.%s was not read by the first step, so it has no effect%s", key, hint)


def warn_of_texts(values: Mapping[str, Any], path: str = "params") -> None:
    """Warn of texts that look like false and are true. Rank 0."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            warn_of_texts(value, f"{path}.{key}")
        elif isinstance(value, str) and value.lower() in _TRUE_TEXTS:
            logger.warning(
                "%s.%s is the text %r, which is true in an `if`: write true or false", path, key, value
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
        mark=partial(_mark_queue, ranks.device) if ranks.device.type in ("cuda", "xpu") else None,
        max_seconds=max_seconds,
    )


def _mark_queue(device: torch.device) -> Callable[[], None]:
    """Mark what is queued on this rank's GPU now; return a function that waits until that is done."""
    event = torch.cuda.Event(blocking=True) if device.type == "cuda" else torch.Event(device)
    event.record()
    return event.synchronize
