"""Reports how far training is, at most a few times a second: a report costs as much as several short steps."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from danling_core.train.limits import Limits
from danling_core.train.meters import LossMeter
from danling_core.train.progress import Progress
from danling_core.train.timing import Timings

_PAUSE_SECONDS = 0.2


class ProgressReport:
    """Emits `progress` events.

    Args:
        emit: reports an event.
        progress, limits, timings: what is reported.
        world_size: ranks that train at the same rate.
        device: whose memory is reported.
    """

    def __init__(
        self,
        emit: Callable[..., None],
        progress: Progress,
        limits: Limits,
        timings: Timings,
        *,
        world_size: int,
        device: torch.device,
    ) -> None:
        self._emit = emit
        self._progress = progress
        self._limits = limits
        self._timings = timings
        self._world_size = world_size
        self._device = device
        self._reported_at = float("-inf")
        self._samples = 0
        self._since = 0.0

    def begin(self) -> None:
        """Count samples from here: a split begins."""
        self._samples, self._since = 0, time.monotonic()

    def report(self, meter: LossMeter) -> None:
        """Report the latest loss and the samples per second, unless the last report was a moment ago."""
        now = time.monotonic()
        if now - self._reported_at < _PAUSE_SECONDS:
            return
        samples, since = meter.count - self._samples, self._since
        self._reported_at, self._samples, self._since = now, meter.count, now
        progress = self._progress
        self._emit(
            "progress",
            epoch=progress.epochs,
            step=progress.steps,
            iter=progress.iters,
            progress=self._limits.fraction,
            loss=meter.latest,
            samples_per_second=samples * self._world_size / (now - since) if since and now > since else None,
            timings=self._timings.of_log(self._device, progress.steps),
        )
