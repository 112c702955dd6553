"""Rank how runs ended: rows, sorted by the mode of their score."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from flows.outcome import RunOutcome


def leaderboard(outcomes: Iterable[RunOutcome]) -> list[dict[str, Any]]:
    """Return rows `rank, name, id, score, behind, epochs, seconds, {split}/{metric}..., status, folder`, in order.

    Runs without a score, or with NaN, come last and have no rank; ties are in the order of names, since runs
    end in any order. Scores of another mode than the first run's are compared among themselves, after it, and `behind`
    is the difference to the best of them.
    """
    outcomes = sorted(outcomes, key=lambda outcome: (outcome.name, outcome.id))
    modes = list(dict.fromkeys(outcome.score_mode for outcome in outcomes if _is_ranked(outcome)))
    ranked = sorted(
        (o for o in outcomes if _is_ranked(o)), key=lambda o: (modes.index(o.score_mode), _loss(o))
    )
    unranked = [outcome for outcome in outcomes if not _is_ranked(outcome)]
    best: dict[str | None, float] = {}
    rows = []
    for rank, outcome in enumerate(ranked, start=1):
        row = _row(outcome, rank)
        row["behind"] = abs(
            float(outcome.score or 0.0) - best.setdefault(outcome.score_mode, float(outcome.score or 0.0))
        )
        rows.append(row)
    return rows + [_row(outcome, None) for outcome in unranked]


def columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Every column that some row has: the fixed ones, then metrics, with the folder last."""
    names = dict.fromkeys(name for row in rows for name in row if name not in _LAST)
    return [*names, *(name for name in _LAST if any(name in row for row in rows))]


def flat_metrics(evaluation: Any) -> dict[str, float]:
    """Return `{split: {metric: value}}` as `{"split/metric": value}`."""
    flat: dict[str, float] = {}
    for split, metrics in (evaluation or {}).items():
        if isinstance(metrics, dict):
            flat.update({f"{split}/{name}": value for name, value in metrics.items() if _is_number(value)})
    return flat


def cell(value: Any) -> str:
    """Return a value of a row as short text."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.3e}"
    return str(value)


def markdown(rows: Sequence[dict[str, Any]], title: str) -> str:
    """Return the rows, the first `_MOST_ROWS` of them, as a Markdown table under a heading."""
    names = columns(rows)
    more = f"\n{len(rows) - _MOST_ROWS} more rows are in the table.\n" if len(rows) > _MOST_ROWS else ""
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    lines += [
        "| " + " | ".join(cell(row.get(name)).replace("|", "\\|") for name in names) + " |"
        for row in rows[:_MOST_ROWS]
    ]
    return f"# {title}\n\n" + "\n".join(lines) + "\n" + more


_LAST = ("status", "folder")
_MOST_ROWS = 200


def _row(outcome: RunOutcome, rank: int | None) -> dict[str, Any]:
    return {
        "rank": rank,
        "name": outcome.name,
        "id": outcome.id,
        "score": outcome.score,
        "behind": None,
        "epochs": outcome.epochs,
        "seconds": round(outcome.seconds, 3),
        **flat_metrics(outcome.evaluation),
        "status": outcome.status,
        "folder": outcome.folder,
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_ranked(outcome: RunOutcome) -> bool:
    return _is_number(outcome.score) and not math.isnan(float(outcome.score or 0.0))


def _loss(outcome: RunOutcome) -> float:
    score = float(outcome.score or 0.0)
    return -score if outcome.score_mode == "max" else score
