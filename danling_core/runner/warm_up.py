"""Two throw-away backward passes, so that DDP's buckets are in their final order before the first step.

DDP rebuilds its buckets after the first iteration. With three ranks or more the order of a reduction changes
its bits, so a resumed run, whose first iteration is another one, would differ from one that was never
interrupted.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch.nn.parallel import DistributedDataParallel

from danling_core.data import to_device
from danling_core.parallel import seeding

if TYPE_CHECKING:
    from danling_core.runner.torch_setup import TorchSetUp


def rebuild_buckets(runner: TorchSetUp, split: str) -> None:
    """Run the passes on a batch of `split`; weights, buffers, gradients, metrics and RNG are as before.
    Collective."""
    if not isinstance(runner.model, DistributedDataParallel):
        return
    random_state = seeding.capture_rng()
    module = runner.unwrap(runner.model)
    buffers = [buffer.clone() for buffer in module.buffers()]
    metrics = runner.metrics, runner.train_metrics
    runner.metrics, runner.train_metrics = copy.deepcopy(metrics[0]), copy.deepcopy(metrics[1])
    batch = to_device(next(iter(runner._stream(split).loader)), runner.device)
    runner._dry = True
    runner.model.train()
    try:
        for _ in range(2):
            runner.train_step(batch)
    finally:
        runner._dry = False
        runner.metrics, runner.train_metrics = metrics
    for parameter in module.parameters():
        parameter.grad = None
    with torch.no_grad():
        for buffer, before in zip(module.buffers(), buffers, strict=True):
            buffer.copy_(before)
    seeding.restore_rng(random_state)
