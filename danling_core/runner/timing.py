"""Where a run's time goes: waiting for data, stepping, copying checkpoints; and how much memory it takes."""

from __future__ import annotations

import resource
import sys
import time

import torch

_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


class Timings:
    """Seconds since the last report, as the hot loop adds them up. They belong in events, never in results.

    On CUDA steps are queued, so that `step_seconds` is the host's share of them.
    """

    __slots__ = ("checkpoint_stall_seconds", "data_wait_seconds", "since", "steps")

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin to count anew."""
        self.data_wait_seconds = self.checkpoint_stall_seconds = 0.0
        self.steps = 0
        self.since = time.perf_counter()

    def fields(self, device: torch.device) -> dict[str, float | int | None]:
        """What an event carries as `timings`; the count begins anew.

        `step_seconds` is the mean time of an optimizer step without data and checkpoints; `memory_bytes` the most that
        was allocated on the GPU, else the most that the process was resident.
        """
        seconds = time.perf_counter() - self.since
        stepping = seconds - self.data_wait_seconds - self.checkpoint_stall_seconds
        fields: dict[str, float | int | None] = {
            "seconds": round(seconds, 6),
            "data_wait_seconds": round(self.data_wait_seconds, 6),
            "step_seconds": round(stepping / self.steps, 6) if self.steps else None,
            "checkpoint_stall_seconds": round(self.checkpoint_stall_seconds, 6),
            "memory_bytes": memory_bytes(device),
        }
        self.restart()
        return fields


def memory_bytes(device: torch.device) -> int:
    """The most memory so far: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT
