"""Results as lines."""

from __future__ import annotations

import math

import pytest

from danling_core.results.formatting import (
    format_duration,
    format_epoch_result,
    format_result,
    format_step_result,
    format_value,
)
from danling_core.results.history import Results


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0, "0.0000"), (0.123, "0.1230"), (0.99999, "1.0000"), (-0.5, "-0.5000"), (12.3456, "12.346")),
        *(
            (1234.5, "1234.5"),
            (1.234e-5, "1.23e-05"),
            (1e9, "1.00e+09"),
            (math.nan, "   nan"),
            ("NaN", "   nan"),
        ),
    ],
)
def test_a_value_takes_about_four_digits(value: float, text: str) -> None:
    assert format_value(value) == text


def test_an_epoch_is_one_aligned_line_with_a_star_when_best() -> None:
    result = {"train": {"loss": 0.123}, "val": {"loss": 0.2, "accuracy": 0.97}}
    line = format_epoch_result(result, 3, 30, is_best=True)
    assert line == "epoch  3/30 | train loss 0.1230 | val loss 0.2000 accuracy 0.9700 *"
    assert len(format_epoch_result(result, 29, 30)) == len(line) - 2


def test_index_zero_and_the_index_of_a_latest_result_are_shown() -> None:
    assert format_epoch_result({"val": {"loss": 1}}, 0, 5) == "epoch 0/5 | val loss 1.0000"
    assert format_epoch_result({"index": 7, "val": {"loss": 1}}, label="step") == "step 7 | val loss 1.0000"
    assert format_epoch_result({"val": {"loss": 1}}, label="") == "val loss 1.0000"


def test_a_log_point_names_split_position_and_nested_metrics() -> None:
    assert format_step_result({"loss": 0.5, "a": {"f1": 1}}, "train", 5, 200) == (
        "train   5/200 | loss 0.5000 a/f1 1.0000"
    )


def test_a_result_is_a_table_with_gaps() -> None:
    text = format_result({"index": 2, "train": {"loss": 0.1}, "val": {"loss": 0.2, "accuracy": 0.97}})
    assert text.splitlines() == [
        "index 2",
        "         loss  accuracy",
        "train  0.1000         -",
        "val    0.2000    0.9700",
    ]


def test_all_results_show_latest_and_best() -> None:
    results = Results("val")
    assert format_result(results) == "no results yet"
    for index, loss in enumerate([0.1, 0.2]):
        results.append({"val": {"loss": loss}}, index)
    lines = format_result(results).splitlines()
    assert lines[0] == "latest: index 1" and lines[3] == "best: index 0"


def test_durations() -> None:
    assert [format_duration(seconds) for seconds in (7.4, 754, 3723)] == ["0:07", "12:34", "1:02:03"]
