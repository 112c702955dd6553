"""A ratio of two medians with its interval, judged against a limit and printed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True)
class Ratio:
    """Median of `ours` over median of `bare`, with a 95 % interval; times are in seconds.

    Repetition i of both was taken back to back, so the bootstrap draws pairs: what slows the machine for a
    while slows both.
    """

    name: str
    ours: Sequence[float]
    bare: Sequence[float]
    limit: float | None = None

    @property
    def value(self) -> float:
        """The ratio of the medians."""
        return float(np.median(self.ours) / np.median(self.bare))

    def interval(self) -> tuple[float, float]:
        """Lower and upper end, by bootstrap over the pairs; the same for the same times."""
        draws = np.random.default_rng(0).integers(0, len(self.ours), (RESAMPLES, len(self.ours)))
        ratios = np.median(np.asarray(self.ours)[draws], axis=1) / np.median(
            np.asarray(self.bare)[draws], axis=1
        )
        lower, upper = np.percentile(ratios, (2.5, 97.5))
        return float(lower), float(upper)

    @property
    def falls_short(self) -> bool:
        """Whether the whole interval is above the limit."""
        return self.limit is not None and self.interval()[0] > self.limit


def table(ratios: Iterable[Ratio], unit: str, per: float = 1.0) -> str:
    """Lines to print. `unit` names the times shown, which are seconds divided by `per`."""
    head = f"{'':40}{'bare ' + unit:>11}{'ours ' + unit:>11}{'ratio':>8}   {'95 % interval':16}limit"
    return "\n".join([head, *(_line(ratio, per) for ratio in ratios)])


def _line(ratio: Ratio, per: float) -> str:
    lower, upper = ratio.interval()
    bare, ours = (float(np.median(times)) / per for times in (ratio.bare, ratio.ours))
    verdict = "-"
    if ratio.limit is not None:
        verdict = f"{ratio.limit:.2f} {'FALLS SHORT' if ratio.falls_short else 'holds'}"
    return (
        f"{ratio.name:40}{bare:11.1f}{ours:11.1f}{ratio.value:8.3f}   {lower:.3f} to {upper:.3f}  {verdict}"
    )
