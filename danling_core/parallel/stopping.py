"""Agreement of all ranks, without a collective per step, on the step before which they stop."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

from danling_core.errors import RunInterrupted
from danling_core.parallel import distributed
from danling_core.parallel.control import Control

_MEETING_STEPS = 16


@dataclass(frozen=True)
class Shared:
    """Memory that the ranks of one node share.

    Args:
        control: their block of shared memory.
        folder: local and private, with the block's file; for the one rank whose `is_owner` is true to remove.
        nodes: how many nodes the ranks are on. Shared memory reaches no other node.
    """

    control: Control
    folder: str
    is_owner: bool
    nodes: int = 1


def share(node: str | None = None) -> Shared:
    """Return a block for ranks that no launcher gave one. Collective.

    Args:
        node: names the machine and, where torchrun started several groups of ranks there, the group.
    """
    node = f"{socket.gethostname()}/{os.environ.get('GROUP_RANK', '0')}" if node is None else node
    nodes = distributed.all_gather_objects(node)
    first = nodes.index(node)
    folder = None
    if is_owner := first == distributed.rank():
        folder = tempfile.mkdtemp(prefix="danling-")
        Control.create(os.path.join(folder, "control"), nodes.count(node)).close()
    folder = distributed.all_gather_objects(folder)[first]
    control = Control.open(os.path.join(folder, "control"))
    distributed.all_gather_objects(None)  # all have it open
    return Shared(control, folder, is_owner, len(set(nodes)))


class NeverStopping:
    """Stand-in before the ranks share a control block: no stop can be requested."""

    reason = ""
    requested = False

    def wish(self, reason: str) -> None: ...

    def check(self, step: int) -> None: ...


class Stopping:
    """The agreement to stop.

    On a CPU, rank 0 looks for a request when it begins step s, and writes `stop_at_step = s + 1`. A rank begins
    a step only after it took part in the reduction of the one before, which rank 0 joined after it wrote. So
    every rank sees the word in time, and all stop before the same step.

    On CUDA a host runs ahead of its device, and a reduction that it queued proves nothing. So at each boundary
    (a step that is a multiple of `stride`) it waits until its device has done all that was queued at the boundary
    before, and then reads the word. Rank 0, about to begin step s, writes the boundary
    B = (s // stride + 2) * stride. A rank that comes to B waits for the steps before B - stride. Step s is one of
    them, since s < (s // stride + 1) * stride = B - stride, and its reduction is done only if rank 0 queued its
    share, which it did after it wrote. So every rank that comes to B reads the word there, none can have passed
    B without, and all stop before B: the device never idles, and a stop takes `stride + 1` to `2 * stride` steps.

    On several nodes all meet in a small reduction on the CPU at every 16th step, and stop there if any was asked.

    Args:
        control: shared by the ranks of this node.
        is_main: whether this is rank 0.
        nodes: how many nodes the ranks are on.
        stride: steps between two boundaries; used with `mark` only.
        mark: marks the point that this rank's device queue has come to, and returns what waits for it; None on
            a CPU.
        max_seconds: stop of one's own accord after so long, or None.
    """

    def __init__(
        self,
        control: Control,
        *,
        is_main: bool,
        nodes: int = 1,
        stride: int = 8,
        mark: Callable[[], Callable[[], None]] | None = None,
        max_seconds: float | None = None,
    ) -> None:
        self._control = control
        self._is_main = is_main
        self._nodes = nodes
        self._stride = 1 if mark is None else stride
        self._mark = mark
        self._marked_at: int | None = None
        self._wait_for_mark: Callable[[], None] | None = None
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self.reason = "asked to stop"
        self._wish: str | None = None

    def wish(self, reason: str) -> None:
        """Stop of one's own accord, as if the time were over. Any rank, any thread; rank 0's reason is told."""
        self._wish = self._wish or reason
        if not self._is_main:
            self._control.request_stop()

    def check(self, step: int) -> None:
        """Stop here, if this is the agreed step. Every rank calls it before `step` (the count of completed ones).

        Raises:
            RunInterrupted: this is the agreed step.
        """
        if self._nodes > 1:
            is_agreed = (
                step % _MEETING_STEPS == 0 and distributed.reduce_floats([float(self.requested)])[0] > 0
            )
        else:
            is_agreed = self._is_agreed(step)
        if is_agreed:
            raise RunInterrupted(f"{self.reason}: stopped before step {step}, which a resume begins with")

    def _is_agreed(self, step: int) -> bool:
        control, stride = self._control, self._stride
        is_boundary = step % stride == 0
        if is_boundary and self._mark is not None and step != self._marked_at:
            if self._wait_for_mark is not None:
                self._wait_for_mark()
            self._wait_for_mark, self._marked_at = self._mark(), step
        if self._is_main and control.stop_at_step is None and self.requested:
            control.stop_at_step = step + 1 if self._mark is None else (step // stride + 2) * stride
        agreed = control.stop_at_step
        return is_boundary and agreed is not None and step >= agreed

    @property
    def requested(self) -> bool:
        """Return whether a stop was asked for; outside training steps ranks agree on it in their next reduction."""
        return self._control.stop_requested or (self._is_main and self._own_accord())

    def _own_accord(self) -> bool:
        if self._wish is not None:
            self.reason = self._wish
            return True
        if self._deadline is None or time.monotonic() < self._deadline:
            return False
        self.reason = "max_seconds is over"
        return True
