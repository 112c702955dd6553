"""Seconds of a run: waiting for data, stepping, evaluating, copying checkpoints; and its memory."""

from __future__ import annotations

import resource
import sys
import time

import torch

from danling_core.parallel import accelerators

Fields = dict[str, float | int | None]
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


class Timings:
    """Sums of seconds, which the loop adds to and events report as `timings`. They never enter results.

    On CUDA steps are queued, so that the time of a step is the host's share of it.
    """

    __slots__ = ("_epoch", "_log", "checkpoint_stall_seconds", "data_wait_seconds", "evaluate_seconds")

    def __init__(self) -> None:
        self.data_wait_seconds = self.evaluate_seconds = self.checkpoint_stall_seconds = 0.0
        self._log = self._epoch = self._now(0)

    def begin(self, steps: int) -> None:
        """Begin to measure a run, which begins or goes on after so many steps."""
        self._log = self._epoch = self._now(steps)

    def of_log(self, device: torch.device, steps: int) -> Fields:
        """Since the last log point; `steps` is the count of completed ones."""
        before, self._log = self._log, self._now(steps)
        return _between(before, self._log, device)

    def of_epoch(self, device: torch.device, steps: int) -> Fields:
        """Since the end of the last epoch, or segment."""
        before, self._epoch = self._epoch, self._now(steps)
        self._log = self._epoch
        return _between(before, self._epoch, device)

    def _now(self, steps: int) -> tuple[float, float, float, float, int]:
        sums = self.data_wait_seconds, self.evaluate_seconds, self.checkpoint_stall_seconds
        return time.perf_counter(), *sums, steps


def _between(
    before: tuple[float, float, float, float, int],
    after: tuple[float, float, float, float, int],
    device: torch.device,
) -> Fields:
    seconds, waited, evaluated, stalled, steps = (b - a for a, b in zip(before, after, strict=True))
    return {
        "seconds": round(seconds, 6),
        "data_wait_seconds": round(waited, 6),
        "step_seconds": round((seconds - waited - evaluated - stalled) / steps, 6) if steps else None,
        "evaluate_seconds": round(evaluated, 6),
        "checkpoint_stall_seconds": round(stalled, 6),
        "memory_bytes": memory_bytes(device),
    }


def memory_curves(device: torch.device) -> dict[str, float]:
    """Return memory in bytes: on a GPU allocated, reserved and the most allocated so far; else the most resident."""
    if device.type == "cpu":
        return {"memory_peak_bytes": memory_bytes(device)}
    return {f"memory_{name}_bytes": size for name, size in accelerators.memory(device).items()}


def memory_bytes(device: torch.device) -> int:
    """Return the most memory so far: allocated on the GPU, where that tells, or resident in this process."""
    if device.type != "cpu" and (peak := accelerators.memory(device).get("peak")) is not None:
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT
