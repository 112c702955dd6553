"""Exact evaluation and inference: each sample once, one reduction, at any world size."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from danling_core.data import batch_size_of, to_device
from danling_core.data.dealt import DealtBatches
from danling_core.errors import RunInterrupted
from danling_core.metrics import Additive
from danling_core.parallel import distributed
from danling_core.train.meters import LossMeter

if TYPE_CHECKING:
    from danling_core.runner.torch_runner import TorchRunner


def evaluate_split(runner: TorchRunner, loader: Any) -> dict[str, Any]:
    """The split's loss and metrics over all ranks. Collective.

    Raises:
        RunInterrupted: a stop was asked for; every rank raises, since they agree in the reduction.
    """
    runner.meters = LossMeter()
    metrics = runner._metrics_in_use()
    if metrics is not None:
        metrics.reset()
    runner._left_early = False
    size_of = runner.size_of or batch_size_of
    for batch in loader:
        runner._beat(runner.steps)
        if runner._stopping.requested:
            runner._left_early = True
            break
        count = size_of(batch)
        _, loss = runner.evaluate_step(to_device(batch, runner.device, non_blocking=True))
        if loss is not None:
            runner.meters.add(loss.detach(), count)
    return runner.get_epoch_result()


def reduced_result(runner: TorchRunner, metrics: Any) -> dict[str, Any]:
    """Loss and metrics over all ranks, in one reduction; what this rank counted stays as it is. Collective.

    Raises:
        RunInterrupted: some rank left the evaluation early.
    """
    meter = runner.meters
    meter.flush()
    additive = metrics if isinstance(metrics, Additive) else None
    left, runner._left_early = runner._left_early, False
    sums = torch.tensor([float(left), meter.total, float(meter.count)], dtype=torch.float64)
    own = additive.state() if additive is not None else sums.new_zeros(0)
    joined = distributed.all_reduce_sum(torch.cat([sums, own.cpu()]))
    stops, total, count = joined[:3].tolist()
    if stops:
        raise RunInterrupted("asked to stop: the evaluation was left, and is done again by a resume")
    result: dict[str, Any] = {"loss": total / count} if count else {}
    if additive is not None:
        additive.load_state(joined[3:])
    result.update(computed(metrics))
    if additive is not None:
        additive.load_state(own)
    return result or {"loss": math.nan}


def computed(metrics: Any) -> dict[str, Any]:
    """What metrics compute, as plain numbers by name; a single value is named after its class."""
    if metrics is None:
        return {}
    value = metrics.compute()
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(metrics).__name__).lower()
    return {name: _plain(value)}


def _plain(value: Any) -> Any:
    """A number, or a mapping of them; a vector (a value for each class) becomes one, by position."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return {str(index): _plain(item) for index, item in enumerate(value)}
    return float(value)


def infer_split(runner: TorchRunner, loader: Any) -> Any:
    """All outputs in data set order, concatenated where they are tensors. Collective."""
    outputs = []
    for batch in loader:
        runner._beat(runner.steps)
        outputs.append(_to_cpu(runner.infer_step(to_device(batch, runner.device, non_blocking=True))))
    parts = distributed.all_gather_objects(outputs)
    if _interleaves(loader):
        rounds = max(len(part) for part in parts)
        ordered = [part[i] for i in range(rounds) for part in parts if i < len(part)]
    else:
        ordered = [output for part in parts for output in part]
    return _concatenated(ordered)


def _concatenated(outputs: list[Any]) -> Any:
    """Outputs of batches as one: tensors concatenated, also inside mappings and tuples; else the list of
    them."""
    if not outputs:
        return outputs
    first = outputs[0]
    if all(isinstance(output, torch.Tensor) and output.dim() for output in outputs):
        return torch.cat(outputs)
    if isinstance(first, dict):
        return {key: _concatenated([output[key] for output in outputs]) for key in first}
    if isinstance(first, tuple):
        return tuple(_concatenated(list(parts)) for parts in zip(*outputs, strict=True))
    return outputs


def _interleaves(loader: Any) -> bool:
    """Iterable data and users' loaders are dealt out batch by batch, sized data in contiguous parts."""
    return isinstance(loader, DealtBatches) or isinstance(
        getattr(loader, "dataset", None), torch.utils.data.IterableDataset
    )


def _to_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _to_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_cpu(item) for item in value)
    return value


def share_buffers(runner: TorchRunner) -> list[torch.Tensor]:
    """Rank 0's buffers (BatchNorm statistics) on every rank, so that all evaluate the same model. Collective.

    Returns:
        this rank's own, where ranks keep their own, for `restore_buffers`.
    """
    buffers = _buffers(runner)
    own = [] if runner.config.broadcast_buffers else [buffer.clone() for buffer in buffers]
    for buffer in buffers:
        dist.broadcast(buffer, src=0)
    return own


def restore_buffers(runner: TorchRunner, own: list[torch.Tensor]) -> None:
    """Give this rank its own buffers back."""
    if own:
        with torch.no_grad():
            for buffer, before in zip(_buffers(runner), own, strict=True):
                buffer.copy_(before)


def _buffers(runner: TorchRunner) -> list[torch.Tensor]:
    if not runner.distributed:
        return []
    modules = [runner.unwrap(runner.model)] + ([runner.ema.module] if runner.ema is not None else [])
    return [buffer for module in modules for buffer in module.buffers()]
