"""Charts on the terminal, in plain characters."""

from __future__ import annotations

from collections.abc import Sequence

_WIDTH, _HEIGHT = 60, 12


def chart(values: Sequence[float], left: str, right: str, mark: int | None = None) -> str:
    """Return a curve over evenly spaced points as lines of text, its highest and lowest value at the side.

    Args:
        values: at least one; all finite.
        left, right: what stands below the first and the last of them.
        mark: the point to mark with a vertical line.
    """
    width = min(_WIDTH, len(values))
    columns = [values[round(at * (len(values) - 1) / max(width - 1, 1))] for at in range(width)]
    low, high = min(columns), max(columns)
    rows = [[" "] * width for _ in range(_HEIGHT)]
    if mark is not None:
        at = round(mark * (width - 1) / max(len(values) - 1, 1))
        for row in rows:
            row[at] = "|"
    for at, value in enumerate(columns):
        up = round((value - low) / (high - low) * (_HEIGHT - 1)) if high > low else 0
        rows[_HEIGHT - 1 - up][at] = "*"
    sides = [f"{high:.3g}", *[""] * (_HEIGHT - 2), f"{low:.3g}"]
    side = max(map(len, sides))
    lines = [f"{text:>{side}} {''.join(row)}".rstrip() for text, row in zip(sides, rows, strict=True)]
    return "\n".join([*lines, f"{'':{side}} {left}{right:>{max(width - len(left), len(right) + 1)}}"])
