"""Placement of a model on the ranks: as it is on one, wrapped in DDP on several."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from danling_core.config import Config
from danling_core.parallel import seeding
from danling_core.parallel.ranks import Ranks

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_DIGEST_ITEMS, _ODD = 1 << 24, 0x9E3779B1


def strategy_for(config: Config, ranks: Ranks, device: torch.device) -> SingleRank:
    """Return the strategy for a run of this config on these ranks."""
    return DataParallel(config, ranks, device) if ranks.distributed else SingleRank()


def unwrap(model: Any) -> Any:
    """Return the user's module, without DDP and `torch.compile` around it."""
    if isinstance(model, DistributedDataParallel):
        model = model.module
    return getattr(model, "_orig_mod", model)


class SingleRank:
    """The model as it is, on the one rank that there is."""

    keeps_own_buffers = False
    """Whether buffers (BatchNorm statistics) may differ between ranks, so that each rank's are saved."""

    def wrap(self, module: nn.Module, *, is_only: bool = True) -> nn.Module:
        """Return what the training step calls. Collective.

        Args:
            is_only: no other module is trained beside it.
        """
        return module

    def no_sync(self, modules: Sequence[nn.Module]) -> contextlib.AbstractContextManager[Any]:
        """Return a context whose backward passes leave the gradients unreduced: inside an accumulation window."""
        return contextlib.nullcontext()

    def equalize(self, modules: Sequence[nn.Module]) -> None:
        """Give all ranks the weights and buffers of rank 0. Collective."""

    def first_difference(self, parameters: Mapping[str, torch.Tensor]) -> str | None:
        """Return the name of the first parameter that is not the same on all ranks. Collective: one reduction."""
        return None

    @contextlib.contextmanager
    def same_buffers(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Let all ranks have rank 0's buffers inside the block, so that all evaluate the same model. Collective."""
        yield

    def needs_rehearsal(self, modules: Sequence[nn.Module]) -> bool:
        """Return whether `rehearsing` is needed before the first step."""
        return False

    @contextlib.contextmanager
    def rehearsing(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Undo what two throw-away backward passes inside the block do to buffers, gradients and generators."""
        yield


class DataParallel(SingleRank):
    """Every rank has the whole model; DDP reduces the gradients.

    Args:
        config: with `broadcast_buffers` and `find_unused_parameters`.
        device: of this rank.
    """

    def __init__(self, config: Config, ranks: Ranks, device: torch.device) -> None:
        self.keeps_own_buffers = not config.broadcast_buffers
        self._finds_unused = config.find_unused_parameters
        self._world_size = ranks.world_size
        self._device = device

    def wrap(self, module: nn.Module, *, is_only: bool = True) -> nn.Module:
        if not any(parameter.requires_grad for parameter in module.parameters()):
            return module
        # naming the default warns
        buffers: Any = {"broadcast_buffers": False} if self.keeps_own_buffers else {}
        return DistributedDataParallel(
            module,
            device_ids=None if self._device.type == "cpu" else [self._device],
            find_unused_parameters=self._finds_unused,
            gradient_as_bucket_view=is_only,  # a backward pass of another loss would write into the buckets
            **buffers,
        )

    def no_sync(self, modules: Sequence[nn.Module]) -> contextlib.AbstractContextManager[Any]:
        stack = contextlib.ExitStack()
        for module in modules:
            if isinstance(module, DistributedDataParallel):
                stack.enter_context(module.no_sync())
        return stack

    @torch.no_grad()
    def equalize(self, modules: Sequence[nn.Module]) -> None:
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor, src=0)

    def first_difference(self, parameters: Mapping[str, torch.Tensor]) -> str | None:
        if not parameters:
            return None
        sums = torch.stack([checksum(parameter).to(self._device) for parameter in parameters.values()])
        extremes = torch.cat([sums, -sums]).cpu()
        dist.all_reduce(extremes, dist.ReduceOp.MAX)
        largest, least = extremes.chunk(2)
        return next((n for n, odd in zip(parameters, (largest != -least).tolist(), strict=True) if odd), None)

    @contextlib.contextmanager
    def same_buffers(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        buffers = [buffer for module in modules for buffer in module.buffers()]
        own = [buffer.clone() for buffer in buffers] if self.keeps_own_buffers else []
        for buffer in buffers:
            dist.broadcast(buffer, src=0)
        try:
            yield
        finally:
            if own:
                _copy(own, buffers)

    def needs_rehearsal(self, modules: Sequence[nn.Module]) -> bool:
        """DDP rebuilds its buckets after the first iteration. With three ranks or more the order of a reduction changes
        its bits, so a resumed run, whose first iteration is another one, would differ from one that was never
        interrupted. Two backward passes before the first step bring the buckets into their final order."""
        is_wrapped = any(isinstance(module, DistributedDataParallel) for module in modules)
        return is_wrapped and self._world_size > 2 and not self._finds_unused

    @contextlib.contextmanager
    def rehearsing(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        random_state = seeding.capture_rng()
        buffers = [buffer for module in modules for buffer in module.buffers()]
        before = [buffer.clone() for buffer in buffers]
        yield
        for module in modules:
            for parameter in module.parameters():
                parameter.grad = None
        _copy(before, buffers)
        seeding.restore_rng(random_state)


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Return a sum over a tensor's bits, a scalar on its device: a cheap look at whether it is the same."""
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    return flat.view(_BITS.get(flat.element_size(), torch.uint8)).sum(dtype=torch.int64)


def digest(tensor: torch.Tensor) -> int:
    """Return a hash of a tensor's bits in their order, sparse ones included. Waits for the device."""
    tensor = tensor.detach()
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        return hash((digest(tensor.indices()), digest(tensor.values())))
    flat = (tensor if tensor.layout == torch.strided else tensor.to_dense()).contiguous().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    if flat.device.type == "cpu":
        return xxhash.xxh3_64_intdigest(flat.view(torch.uint8).numpy().data) if flat.numel() else 0
    bits = flat.view(_BITS.get(flat.element_size(), torch.uint8))
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for begin in range(0, bits.numel(), _DIGEST_ITEMS):
        part = bits[begin : begin + _DIGEST_ITEMS].to(torch.int64)
        place = torch.arange(begin, begin + part.numel(), device=flat.device)
        total += (part * (place * _ODD + 1)).sum()
    return int(total)


@torch.no_grad()
def _copy(values: Sequence[torch.Tensor], into: Sequence[torch.Tensor]) -> None:
    for target, value in zip(into, values, strict=True):
        target.copy_(value)
