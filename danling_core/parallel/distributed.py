"""World, process group and the few collectives that the runner uses."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from danling_core.errors import ConfigError
from danling_core.parallel import accelerators

logger = logging.getLogger("danling")

MEETING_FILE = "DANLING_MEETING_FILE"
"""Variable that our launcher sets for the ranks of one node: a file in a private folder, where they find each other."""


def world_size() -> int:
    """Number of ranks, as the launcher says; 1 outside one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Number of ranks on this node, as the launcher says; all of them where it does not."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))


def resolve_device(wanted: str, ranks_here: int | None = None) -> torch.device:
    """Return the device of this rank: `cuda:{local_rank}`, or plain `cpu` (never `cpu:1`). The same kind on all ranks.

    Args:
        wanted: auto, cpu, or a kind of accelerator; auto takes the one that is here.
        ranks_here: on this node, which is the only one, where they are yet to be launched.

    Raises:
        ConfigError: an accelerator is asked for and absent, or there are fewer GPUs than ranks on this node; with
            `auto` only where there are other nodes, which cannot know of it.
    """
    here = accelerators.kind_here() if wanted != "cpu" else None
    if wanted == "cpu" or (wanted == "auto" and here is None):
        return torch.device("cpu")
    if wanted not in ("auto", here):
        found = "no GPU" if here is None else f"{here}, and no such GPU,"
        raise ConfigError(
            f"device is {wanted!r}, but torch finds {found} here: use device=auto or device=cpu"
        )
    assert here is not None
    ranks = local_world_size() if ranks_here is None else ranks_here
    gpus = accelerators.count(here)
    if ranks == 1 or (ranks <= gpus and accelerators.has_peers(here)):
        return torch.device(here, local_rank()) if accelerators.has_peers(here) else torch.device(here)
    found = f"{ranks} ranks on this node and {gpus} GPU(s)"
    if wanted == "auto" and (ranks_here is not None or ranks == world_size()):
        _warn_once(
            f"device is 'auto', with {found}: all ranks use the CPU; nproc_per_node={gpus} uses the GPU(s)"
        )
        return torch.device("cpu")
    raise ConfigError(f"device is {wanted!r}, with {found}: lower nproc_per_node, or use device=cpu")


@functools.cache
def _warn_once(message: str) -> None:
    if local_rank() == 0:
        logger.warning(message)


def init_process_group(device: torch.device, timeout_seconds: float) -> bool:
    """Join the process group of this job. Collective. Returns whether this call made it (and must destroy
    it).

    The ranks of our launcher meet in a file, and talk over the loopback interface: torch's TCP store listens on every
    address, asks nobody who they are, and unpickles.
    """
    if world_size() == 1 or dist.is_initialized():
        return False
    if device.type in ("cuda", "xpu"):
        torch.get_device_module(device.type).set_device(device)
    backend = accelerators.backend(device.type)
    options: dict[str, Any] = {"timeout": timedelta(seconds=timeout_seconds)}
    path = os.environ.get(MEETING_FILE)
    if path is not None:
        _keep_to_loopback()
        options |= {
            "store": dist.FileStore(path, world_size()),
            "rank": rank(),
            "world_size": world_size(),
        }
    dist.init_process_group(backend, **options)
    return True


def _keep_to_loopback() -> None:
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)


def destroy_process_group() -> None:
    """Leave the process group. Collective: a barrier first, since gloo aborts when a peer leaves early."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def destroy_at_exit() -> None:
    """Leave the process group when this process ends. Collective: the barrier comes now, while all are well.

    For ranks that were not started by our launcher. One that fails later still ends at once: nothing waits at
    exit.
    """
    if dist.is_initialized():
        dist.barrier()
        atexit.unregister(_destroy)
        atexit.register(_destroy)


def _destroy() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over the ranks, in place; returns the tensor. Collective."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def reduce_floats(values: list[float]) -> list[float]:
    """Sum a short list of floats over the ranks, on the CPU group. Collective."""
    return all_reduce_sum(torch.tensor(values, dtype=torch.float64)).tolist()


def gather_objects(value: Any) -> list[Any] | None:
    """Return small objects of all ranks, in rank order, on rank 0; None elsewhere. Collective."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, gathered)
    return gathered


def all_gather_objects(value: Any) -> list[Any]:
    """Return objects of all ranks, in rank order, on every rank. Collective."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: Any) -> Any:
    """Rank 0's object, on every rank. Collective."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
