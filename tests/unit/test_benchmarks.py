"""How a ratio is judged; what the ratios are is for `make bench`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import benchmarks
from benchmarks.checkpoint_stall import measure
from benchmarks.flow_runner import EpochRunner
from benchmarks.ratios import Ratio, table, turns
from tests.small_runner import config

STEADY = [1.0, 1.01, 0.99] * 10


def test_a_ratio_whose_whole_interval_is_above_the_limit_falls_short() -> None:
    assert Ratio("slow", [1.3 * t for t in STEADY], STEADY, limit=1.15).falls_short


def test_a_ratio_whose_whole_interval_is_within_the_limit_holds() -> None:
    assert Ratio("fast", [1.1 * t for t in STEADY], STEADY, limit=1.15).verdict == "holds"


def test_a_ratio_whose_interval_has_the_limit_inside_is_unclear_and_fails_nothing() -> None:
    noisy = Ratio("noisy", [1.0, 1.4] * 15, STEADY, limit=1.15)
    assert noisy.verdict == "unclear" and not noisy.falls_short
    assert "1.15 unclear" in table([noisy], "ms")


def test_what_slows_the_machine_for_a_while_slows_both_of_a_pair() -> None:
    speeds = [1.0, 1.0, 1.0, 5.0, 5.0, 1.0, 5.0] * 5
    ratio = Ratio("pairs", [1.1 * speed for speed in speeds], speeds, limit=1.15)
    assert ratio.interval() == pytest.approx((1.1, 1.1)) and ratio.verdict == "holds"


def test_a_single_pair_far_off_does_not_decide() -> None:
    assert Ratio("once", [1.0] * 10 + [9.0], [1.0] * 11).value == 1.0


def test_the_two_take_turns_in_going_first() -> None:
    assert [turns(repetition, "bare", "ours")[0] for repetition in range(3)] == ["bare", "ours", "bare"]


def test_an_epoch_that_takes_longer_does_not_eat_up_its_own_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, float]] = []
    monkeypatch.setattr("benchmarks.flow_runner.sleep", lambda seconds: done.append(("wait", seconds)))
    monkeypatch.setattr("benchmarks.flow_runner.multiply", lambda products: done.append(("work", products)))
    params = {"wait_seconds": 0.25, "products": 7}
    EpochRunner(config(tmp_path, epoch_end=2, params=params)).train("train", [])
    assert done == [("work", 7), ("wait", 0.25)] * 2


def test_the_stall_is_that_of_the_runner_s_own_save(tmp_path: Path) -> None:
    found = measure(megabytes=1, repeats=2, folder=str(tmp_path))
    assert {name: len(times) for name, times in found.items()} == dict.fromkeys(found, 3)
    assert all(commit > stall > 0 for stall, commit in zip(found["stall"], found["commit"], strict=True))
    [latest] = tmp_path.glob("*/*/checkpoints/latest.json")
    assert json.loads(latest.read_text())


def test_make_bench_runs_every_benchmark() -> None:
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    [named] = re.findall(r"for each in ([a-z_ ]+); do", makefile)
    measuring = {path.stem for path in Path(benchmarks.__file__).parent.glob("*.py")} - {
        "__init__",
        "ratios",
        "s3",
        "flow_runner",
        "step_runner",
    }
    assert set(named.split()) == measuring


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
