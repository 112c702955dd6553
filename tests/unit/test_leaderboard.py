"""Runs are ranked by their score, in its mode."""

from __future__ import annotations

import math
from typing import Any

import pytest

from flows.leaderboard import columns, leaderboard, markdown
from flows.outcome import RunOutcome, summarise


def _outcome(name: str, score: float | None, mode: str = "max", **more: Any) -> RunOutcome:
    return RunOutcome(
        **{"status": "complete", "name": name, "id": "0" * 16, "score": score, "score_mode": mode, **more}
    )


@pytest.mark.parametrize(("mode", "names"), [("max", ["b", "c", "a"]), ("min", ["a", "c", "b"])])
def test_the_best_score_is_first(mode: str, names: list[str]) -> None:
    rows = leaderboard([_outcome("a", 0.1, mode), _outcome("b", 0.9, mode), _outcome("c", 0.5, mode)])
    assert [row["name"] for row in rows] == names
    assert [row["rank"] for row in rows] == [1, 2, 3]


def test_nan_and_missing_scores_come_last_without_a_rank() -> None:
    rows = leaderboard([_outcome("nan", math.nan), _outcome("none", None), _outcome("good", 0.1)])
    assert [(row["name"], row["rank"]) for row in rows] == [("good", 1), ("nan", None), ("none", None)]


def test_ties_do_not_depend_on_the_order_in_which_runs_ended() -> None:
    one, two = _outcome("one", 0.5), _outcome("two", 0.5)
    assert leaderboard([one, two]) == leaderboard([two, one])


def test_a_score_of_zero_is_a_score() -> None:
    assert leaderboard([_outcome("zero", 0.0, "min"), _outcome("one", 1.0, "min")])[0]["name"] == "zero"


def test_metrics_of_the_evaluation_are_columns() -> None:
    rows = leaderboard(
        [_outcome("a", 0.5, evaluation={"test": {"accuracy": 0.25}}, folder="/x"), _outcome("b", 0.4)]
    )
    assert rows[0]["test/accuracy"] == 0.25
    assert columns(rows)[-3:] == ["test/accuracy", "status", "folder"]
    assert "| 1 | a |" in markdown(rows, "T")


def test_the_difference_to_the_best_is_a_column() -> None:
    rows = leaderboard([_outcome("a", 0.5, "max"), _outcome("b", 0.75, "max"), _outcome("c", None)])
    assert [row["behind"] for row in rows] == [0.0, 0.25, None]


def test_a_page_of_thousands_is_cut_and_says_so() -> None:
    page = markdown(leaderboard([_outcome(f"run-{index}", index / 1000) for index in range(1000)]), "T")
    assert page.count("\n| ") == 2 + 200 and "800 more rows are in the table" in page


def test_a_summary_of_thousands_names_the_first() -> None:
    bad = [_outcome(f"run-{index}", None) for index in range(1000)]
    said = summarise(bad, 1000)
    assert said.startswith("1000 of 1000 runs failed: run-0-") and said.endswith("; and 990 more")
