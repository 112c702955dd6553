"""Reports inside an epoch: how far training is, and the curves over the steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from danling_core.train.limits import Limits
from danling_core.train.meters import SplitMeter
from danling_core.train.progress import Progress
from danling_core.train.throughput import peak_flops
from danling_core.train.timing import Timings, memory_curves

_PAUSE_SECONDS = 0.2
Curves = dict[str, float]


class ProgressReport:
    """Emits `progress` events: where training is, and `curves`, the values over the steps of the split.

    A report costs as much as several short steps. Where nothing draws curves, there are at most a few in a second.

    Args:
        emit: reports an event.
        progress, limits, timings: what is reported.
        steppers: returns the curves of the optimizers; see `Steppers.curves`.
        units: returns what a sample has of other units: `tokens` and `flops`, or None for either.
        world_size: ranks that train at the same rate.
        device: whose memory is reported.
        has_curves: whether a writer draws curves, so that every report counts.
    """

    def __init__(
        self,
        emit: Callable[..., None],
        progress: Progress,
        limits: Limits,
        timings: Timings,
        *,
        steppers: Callable[[], Curves],
        units: Callable[[], Mapping[str, float | None]],
        world_size: int,
        device: torch.device,
        has_curves: bool,
    ) -> None:
        self._emit = emit
        self._progress = progress
        self._limits = limits
        self._timings = timings
        self._steppers = steppers
        self._units = units
        self._world_size = world_size
        self._device = device
        self._pause_seconds = 0.0 if has_curves else _PAUSE_SECONDS
        self._reported_at = float("-inf")
        self._samples = 0
        self._since = 0.0

    def begin(self) -> None:
        """Count samples from here: a split begins."""
        self._samples, self._since = 0, time.monotonic()

    def report(self, split: str, meter: SplitMeter) -> None:
        """Report the steps since the last report, unless that was a moment ago and nothing draws curves."""
        now = time.monotonic()
        if now - self._reported_at < self._pause_seconds:
            return
        samples, since = meter.count - self._samples, self._since
        self._reported_at, self._samples, self._since = now, meter.count, now
        progress = self._progress
        rate = samples * self._world_size / (now - since) if since and now > since else None
        timings = self._timings.of_log(self._device, progress.steps)
        seconds, waited = timings["seconds"], timings["data_wait_seconds"]
        curves = {"loss": meter.latest, **meter.logged.latest(), **self._steppers(), **self._rates(rate)}
        if seconds and waited is not None:
            curves["data_wait_share"] = round(waited / seconds, 6)
        self._emit(
            "progress",
            split=split,
            epoch=progress.epochs,
            step=progress.steps,
            iter=progress.iters,
            progress=self._limits.fraction,
            loss=meter.latest,
            samples_per_second=rate,
            timings=timings,
            curves={**curves, **memory_curves(self._device)},
        )

    def _rates(self, samples_per_second: float | None) -> Curves:
        """Return samples, tokens and operations in a second; `samples_per_second` is that of all ranks."""
        if samples_per_second is None:
            return {}
        rates, units = {"samples_per_second": samples_per_second}, self._units()
        if (tokens := units["tokens"]) is not None:
            rates["tokens_per_second"] = samples_per_second * tokens
        if (flops := units["flops"]) is not None:
            of_rank = samples_per_second / self._world_size * flops
            rates["teraflops_per_second"] = of_rank / 1e12
            if (peak := peak_flops(self._device)) is not None:
                rates["flops_utilisation"] = of_rank / peak
        return rates
