"""How all ranks agree, without a collective per step, on the step before which they stop."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from typing import Protocol

from danling_core import distributed
from danling_core.control import Control
from danling_core.errors import RunInterrupted


class StopBlock(Protocol):
    """Shared memory of one node's ranks (see control.py)."""

    @property
    def stop_requested(self) -> bool:
        """Whether somebody asked."""

    @property
    def stop_at_step(self) -> int | None:
        """The step before which all stop, once rank 0 has chosen one."""

    @stop_at_step.setter
    def stop_at_step(self, step: int) -> None: ...


class LocalBlock:
    """The same for a runner without a launcher: nothing is shared, since there is one rank."""

    def __init__(self) -> None:
        self.stop_requested = False
        self.stop_at_step: int | None = None


def shared_block(local_rank: int | None) -> StopBlock:
    """A block for ranks that no launcher gave one. Collective.

    Args:
        local_rank: None for a single rank.
    """
    if local_rank is None:
        return LocalBlock()
    path = os.path.join(tempfile.mkdtemp(prefix="danling-"), "control") if local_rank == 0 else ""
    if path:
        Control.create(path, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))).close()
    paths = distributed.all_gather_objects((socket.gethostname(), path))
    mine = next(path for host, path in paths if host == socket.gethostname() and path)
    block = Control.open(mine)
    distributed.all_gather_objects(None)  # all have it open
    if path:
        shutil.rmtree(os.path.dirname(path))
    return block


class Stopping:
    """The agreement to stop.

    Rank 0 looks for a request when it begins step s, and writes `stop_at_step = s + stride`. A rank begins a
    step only after it took part in the reduction of the one before (on CUDA: after the host sync at every
    `stride` steps), which rank 0 joined after it wrote. So every rank sees the word in time, and all stop
    before the same step.

    Args:
        block: shared by the ranks of this node.
        is_main: whether this is rank 0.
        stride: steps between two points at which the host waits for the device; 1 on a CPU.
        max_seconds: stop of one's own accord after so long, or None.
    """

    def __init__(
        self, block: StopBlock, *, is_main: bool, stride: int = 1, max_seconds: float | None = None
    ) -> None:
        self._block = block
        self._is_main = is_main
        self._stride = stride
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self.reason = "asked to stop"
        self._wish: str | None = None

    def wish(self, reason: str) -> None:
        """Stop of one's own accord, as if the time were over. Rank 0 only, any thread."""
        self._wish = self._wish or reason

    def check(self, step: int) -> None:
        """Called by every rank when it is about to begin `step` (the count of completed ones).

        Raises:
            RunInterrupted: this is the agreed step.
        """
        block = self._block
        if self._is_main and (block.stop_requested or self._own_accord()) and block.stop_at_step is None:
            block.stop_at_step = (step // self._stride + 1) * self._stride
        agreed = block.stop_at_step
        if agreed is not None and step >= agreed and step % self._stride == 0:
            raise RunInterrupted(f"{self.reason}: stopped before step {step}, which a resume begins with")

    @property
    def requested(self) -> bool:
        """Whether a stop was asked for; outside training steps ranks agree on it in their next reduction."""
        return bool(self._block.stop_requested) or (self._is_main and self._own_accord())

    def _own_accord(self) -> bool:
        if self._wish is not None:
            self.reason = self._wish
            return True
        if self._deadline is None or time.monotonic() < self._deadline:
            return False
        self.reason = "max_seconds is over"
        return True
