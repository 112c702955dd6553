"""How a ratio is judged; what the ratios are is for `make bench`."""

from __future__ import annotations

import pytest

from benchmarks.ratios import Ratio, table

STEADY = [1.0, 1.01, 0.99] * 10


def test_a_ratio_whose_whole_interval_is_above_the_limit_falls_short() -> None:
    assert Ratio("slow", [1.3 * t for t in STEADY], STEADY, limit=1.15).falls_short


def test_a_ratio_whose_interval_reaches_the_limit_holds() -> None:
    noisy = [1.0, 1.4] * 15
    assert Ratio("noisy", noisy, STEADY, limit=1.15).value > 1.15
    assert not Ratio("noisy", noisy, STEADY, limit=1.15).falls_short


def test_the_interval_holds_the_ratio_of_the_medians() -> None:
    ratio = Ratio("twice", [2 * t for t in STEADY], STEADY)
    lower, upper = ratio.interval()
    assert ratio.value == pytest.approx(2.0)
    assert lower <= ratio.value <= upper
    assert not ratio.falls_short


def test_the_table_names_what_falls_short() -> None:
    lines = table(
        [Ratio("slow", [2.0] * 5, [1.0] * 5, 1.15), Ratio("free", [1.0] * 5, [1.0] * 5)], "ms", 1e-3
    )
    assert "1.15 FALLS SHORT" in lines.splitlines()[1]
    assert lines.splitlines()[2].endswith("-")
