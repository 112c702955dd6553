"""Exact evaluation and inference: each sample once, one reduction, at any world size."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from danling_core import distributed
from danling_core.data import batch_size_of, to_device
from danling_core.errors import RunInterrupted
from danling_core.metrics import Additive
from danling_core.runner.meter import LossMeter

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
    stopped = False
    for batch in loader:
        runner._beat(runner.steps)
        if runner._stopping.requested:
            stopped = True
            break
        count = batch_size_of(batch)
        _, loss = runner.evaluate_step(to_device(batch, runner.device, non_blocking=True))
        if loss is not None:
            runner.meters.add(loss.detach(), count)
    return reduced_result(runner, metrics, stopped)


def reduced_result(runner: TorchRunner, metrics: Any, stopped: bool = False) -> dict[str, Any]:
    """Loss and metrics over all ranks, in one reduction. Collective."""
    meter = runner.meters
    meter.flush()
    additive = metrics if isinstance(metrics, Additive) else None
    sums = torch.tensor([float(stopped), meter.total, float(meter.count)], dtype=torch.float64)
    state = additive.state().cpu() if additive is not None else sums.new_zeros(0)
    joined = distributed.all_reduce_sum(torch.cat([sums, state]))
    stops, total, count = joined[:3].tolist()
    if stops:
        raise RunInterrupted("asked to stop: the evaluation was left, and is done again by a resume")
    if additive is not None:
        additive.load_state(joined[3:])
    result: dict[str, Any] = {"loss": total / count} if count else {}
    if metrics is not None:
        result.update(_floats(metrics.compute()))
    return result or {"loss": math.nan}


def _floats(value: Any) -> Any:
    """Numbers out of what `compute` gives: a mapping, or one value, then called `metric`."""
    if not isinstance(value, dict):
        return {"metric": float(value)}
    return {name: _floats(item) if isinstance(item, dict) else float(item) for name, item in value.items()}


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
    if ordered and all(isinstance(output, torch.Tensor) for output in ordered):
        return torch.cat(ordered)
    return ordered


def _interleaves(loader: Any) -> bool:
    """Iterable data is dealt out in chunks, sized data in contiguous parts."""
    return isinstance(getattr(loader, "dataset", None), torch.utils.data.IterableDataset)


def _to_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _to_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_cpu(item) for item in value)
    return value


def share_buffers(runner: TorchRunner) -> None:
    """Rank 0's buffers (BatchNorm statistics) on every rank, so that all evaluate the same model. Collective."""
    if not runner.distributed:
        return
    modules = [runner.unwrap(runner.model)] + ([runner.ema.module] if runner.ema is not None else [])
    for module in modules:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)
