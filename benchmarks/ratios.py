"""Ratio of our time to the bare thing's, with its interval, judged against a limit and printed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np

RESAMPLES = 10_000
T = TypeVar("T")
Verdict = Literal["holds", "unclear", "falls short", "-"]


@dataclass(frozen=True)
class Ratio:
    """Median over the repetitions of `ours` over `bare`, with a 95 % interval; times are in seconds.

    Repetition i of both was taken back to back, so each pair gives a ratio of its own: what slows the machine
    for a while slows both.
    """

    name: str
    ours: Sequence[float]
    bare: Sequence[float]
    limit: float | None = None

    @property
    def value(self) -> float:
        """The median of the ratios of the pairs."""
        return float(np.median(self._pairs()))

    def interval(self) -> tuple[float, float]:
        """Lower and upper end, by bootstrap over the pairs; the same for the same times."""
        pairs = self._pairs()
        draws = np.random.default_rng(0).integers(0, len(pairs), (RESAMPLES, len(pairs)))
        lower, upper = np.percentile(np.median(pairs[draws], axis=1), (2.5, 97.5))
        return float(lower), float(upper)

    @property
    def verdict(self) -> Verdict:
        """`holds` and `falls short` need the whole interval on their side of the limit; the rest is `unclear`.

        Without a limit there is nothing to judge: `-`.
        """
        if self.limit is None:
            return "-"
        lower, upper = self.interval()
        return "holds" if upper <= self.limit else "falls short" if lower > self.limit else "unclear"

    @property
    def falls_short(self) -> bool:
        """Return whether the whole interval is above the limit: the only verdict that fails a command."""
        return self.verdict == "falls short"

    def _pairs(self) -> Any:
        return np.asarray(self.ours) / np.asarray(self.bare)


def turns(repetition: int, first: T, second: T) -> tuple[T, T]:
    """Both in the order in which this repetition takes them: it alternates, lest one always come after the other."""
    return (first, second) if repetition % 2 == 0 else (second, first)


def table(ratios: Iterable[Ratio], unit: str, per: float = 1.0) -> str:
    """Lines to print. `unit` names the times shown, which are seconds divided by `per`."""
    head = f"{'':40}{'bare ' + unit:>11}{'ours ' + unit:>11}{'ratio':>8}   {'95 % interval':16}limit"
    return "\n".join([head, *(_line(ratio, per) for ratio in ratios)])


def _line(ratio: Ratio, per: float) -> str:
    lower, upper = ratio.interval()
    bare, ours = (float(np.median(times)) / per for times in (ratio.bare, ratio.ours))
    verdict = "-"
    if ratio.limit is not None:
        told = ratio.verdict.upper() if ratio.falls_short else ratio.verdict
        verdict = f"{ratio.limit:.2f} {told}"
    return (
        f"{ratio.name:40}{bare:11.1f}{ours:11.1f}{ratio.value:8.3f}   {lower:.3f} to {upper:.3f}  {verdict}"
    )
