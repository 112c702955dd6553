"""Results as lines that a person reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from danling_core.results.history import Results
from danling_core.results.values import flatten


def format_value(value: float) -> str:
    """About four significant digits in six columns: `0.1230`, `12.346`, `1234.6`, `1.23e-05`, `nan`."""
    number = float(value)
    size = abs(number)
    if not math.isfinite(number):
        return f"{number:>6}"
    if number != 0 and (size < 1e-3 or size >= 99999.5):
        return f"{number:.2e}"
    digits = 1 if size == 0 else max(1, int(math.floor(math.log10(size))) + 1)
    return f"{number:.{max(0, 5 - digits)}f}"


def format_metrics(metrics: Mapping[str, Any]) -> str:
    """Return `loss 0.2000 accuracy 0.9700`; nested metrics by their path."""
    return " ".join(f"{name} {format_value(value)}" for name, value in flatten(metrics).items())


def format_step_result(
    result: Mapping[str, Any], split: str = "train", steps: int | None = None, length: int | None = None
) -> str:
    """One line for a log point inside an epoch: `train 50/200 | loss 0.1230 lr 0.0010`.

    Args:
        result: {metric: value} since the last log point.
        split: the split being passed over.
        steps: how far the pass is, in the unit of `length`.
        length: the whole pass, where it is known.
    """
    return f"{split}{_position(steps, length)} | {format_metrics(result)}"


def format_epoch_result(
    result: Mapping[str, Any],
    index: int | None = None,
    total: int | None = None,
    *,
    is_best: bool = False,
    label: str = "epoch",
) -> str:
    """One aligned line for an epoch: `epoch  3/30 | train loss 0.1230 | val loss 0.2000 accuracy 0.9700 *`.

    Args:
        result: {split: {metric: value}}; an `index` in it, as in `latest_result`, is used where none is
            given.
        index: the key of the result, as in `results`.
        total: where the index ends, if known.
        is_best: marks the line with a star.
        label: what the index counts: "epoch", or "step" in step mode; empty for none.
    """
    index = result.get("index") if index is None else index
    parts = [
        f"{split} {format_metrics(metrics)}"
        for split, metrics in result.items()
        if isinstance(metrics, Mapping)
    ]
    head = f"{label}{_position(index, total)}".strip()
    line = " | ".join([head, *parts] if head else parts)
    return f"{line} *" if is_best else line


def format_result(result: Mapping[str, Any] | Results) -> str:
    """Return a small table: a row for each split, a column for each metric; the `index` on top where it is given.

    Of a whole `Results`, the tables of the latest and of the best one.
    """
    if isinstance(result, Results):
        found = (("latest", result.latest_result), ("best", result.best_result))
        return "\n".join(f"{name}: {format_result(one)}" for name, one in found if one) or "no results yet"
    rows = {split: flatten(metrics) for split, metrics in result.items() if isinstance(metrics, Mapping)}
    names = list(dict.fromkeys(name for metrics in rows.values() for name in metrics))
    table = [["", *names]]
    for split, metrics in rows.items():
        table.append([split, *(format_value(metrics[name]) if name in metrics else "-" for name in names)])
    widths = [max(len(row[column]) for row in table) for column in range(len(names) + 1)]
    lines = [_row(row, widths) for row in table]
    if result.get("index") is not None:
        lines.insert(0, f"index {result['index']}")
    return "\n".join(lines)


def format_duration(seconds: float) -> str:
    """Return `0:07`, `12:34`, `1:02:03`."""
    whole = max(0, round(seconds))
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _row(cells: list[str], widths: list[int]) -> str:
    first = cells[0].ljust(widths[0])
    return "  ".join(
        [first, *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]
    ).rstrip()


def _position(count: int | None, total: int | None) -> str:
    if count is None:
        return ""
    return f" {count}" if total is None else f" {count:>{len(str(total))}}/{total}"
