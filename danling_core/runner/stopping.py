"""How all ranks agree, without a collective per step, on the step before which they stop."""

from __future__ import annotations

import time
from typing import Protocol

from danling_core.errors import RunInterrupted


class StopBlock(Protocol):
    """Shared memory of one node's ranks (see control.py)."""

    @property
    def stop_requested(self) -> bool:
        """Whether somebody asked."""

    stop_at_step: int | None


class LocalBlock:
    """The same for a runner without a launcher: nothing is shared, since there is one rank."""

    def __init__(self) -> None:
        self.stop_requested = False
        self.stop_at_step: int | None = None


class Stopping:
    """The agreement to stop.

    Rank 0 looks for a request when it begins step s, and writes `stop_at_step = s + stride`. A rank begins a step only
    after it took part in the reduction of the one before (on CUDA: after the host sync at every `stride` steps), which
    rank 0 joined after it wrote. So every rank sees the word in time, and all stop before the same step.

    Args:
        block: shared by the ranks of this node.
        is_main: whether this is rank 0.
        stride: steps between two points at which the host waits for the device; 1 on a CPU.
        max_seconds: stop of one's own accord after so long, or None.
    """

    def __init__(self, block: StopBlock, *, is_main: bool, stride: int = 1, max_seconds: float | None = None) -> None:
        self._block = block
        self._is_main = is_main
        self._stride = stride
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self.reason = "asked to stop"

    def check(self, step: int) -> None:
        """Called by every rank when it is about to begin `step` (the count of completed ones).

        Raises:
            RunInterrupted: this is the agreed step.
        """
        block = self._block
        if self._is_main and (block.stop_requested or self._out_of_time()) and block.stop_at_step is None:
            block.stop_at_step = (step // self._stride + 1) * self._stride
        agreed = block.stop_at_step
        if agreed is not None and step >= agreed and step % self._stride == 0:
            raise RunInterrupted(f"{self.reason}: stopped before step {step}, which a resume begins with")

    @property
    def requested(self) -> bool:
        """Whether a stop was asked for; outside training steps ranks agree on it in their next reduction."""
        return bool(self._block.stop_requested) or (self._is_main and self._out_of_time())

    def _out_of_time(self) -> bool:
        if self._deadline is None or time.monotonic() < self._deadline:
            return False
        self.reason = "max_seconds is over"
        return True
