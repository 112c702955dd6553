"""This process among the ranks of its run."""

from __future__ import annotations

from typing import Any

import torch

from danling_core.parallel import distributed


class Ranks:
    """Place of this process, as the launcher wrote it into the environment, and what ranks do together.

    Args:
        device: auto, cpu, or a kind of accelerator.

    Raises:
        ConfigError: the device is not there.
    """

    def __init__(self, device: str) -> None:
        self.device: torch.device = distributed.resolve_device(device)
        self._made_group = False

    @property
    def world_size(self) -> int:
        return distributed.world_size()

    @property
    def rank(self) -> int:
        return distributed.rank()

    @property
    def local_rank(self) -> int:
        return distributed.local_rank()

    @property
    def distributed(self) -> bool:
        return self.world_size > 1

    @property
    def is_main_process(self) -> bool:
        return self.rank == 0

    @property
    def is_local_main_process(self) -> bool:
        return self.local_rank == 0

    def join(self, timeout_seconds: float) -> None:
        """Join the process group where there are several ranks, unless it is there already. Collective."""
        self._made_group = distributed.init_process_group(self.device, timeout_seconds) or self._made_group

    def adopt(self, other: Ranks) -> None:
        """Take over the responsibility for the process group that `other` made."""
        self._made_group = other._made_group

    def leave(self) -> None:
        """Wait for the other ranks at the end of good work, and leave the group when this process ends. Collective.

        A group that somebody else made is left to them.
        """
        if self._made_group:
            distributed.destroy_at_exit()

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value, on every rank. Collective."""
        return distributed.broadcast_object(value)

    def gather(self, value: Any) -> list[Any] | None:
        """Return the values of all ranks, in rank order, on rank 0; None elsewhere. Collective."""
        return distributed.gather_objects(value)
