"""Curves of a run as a small picture, for the page that it has in the orchestrator."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

_WIDTH, _HEIGHT, _MARGIN = 420, 200, 44
_MOST_METRICS, _MOST_POINTS = 4, 300
_COLORS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#64748b")
_GRAY = 'fill="#64748b" font-family="sans-serif" font-size="11"'

Curve = list[tuple[float, float]]


def curves_image(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the Markdown of a picture with a chart per metric and a line per split; None with fewer than two epochs.

    Args:
        rows: one mapping per epoch: `epoch`, and numbers by `split/metric`.
    """
    charts = _charts(rows)
    if not charts:
        return None
    return f"![curves](data:image/svg+xml;base64,{base64.b64encode(chart_group(charts).encode()).decode()})"


def chart_group(charts: Mapping[str, Mapping[str, Curve]]) -> str:
    """Return charts, each of some curves by name, two in a row, as SVG."""
    drawn = [
        f'<g transform="translate({(index % 2) * _WIDTH},{(index // 2) * _HEIGHT})">{_chart(title, curves)}</g>'
        for index, (title, curves) in enumerate(charts.items())
    ]
    width, height = _WIDTH * min(2, len(charts)), _HEIGHT * math.ceil(len(charts) / 2)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(drawn)}</svg>'
    )


def chart_image(
    title: str, curves: Mapping[str, Curve], label: Callable[[float], str] = "{:g}".format
) -> str:
    """Return one chart as SVG; `label` writes the ends of its horizontal axis."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}"><rect width="100%" height="100%" fill="white"/>'
        f"{_chart(title, curves, label)}</svg>"
    )


def _charts(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Curve]]:
    """Return the curve of each split by metric: the loss first, then as they come."""
    charts: dict[str, dict[str, Curve]] = {}
    every = max(1, math.ceil(len(rows) / _MOST_POINTS))
    kept = [row for index, row in enumerate(rows) if index % every == 0 or index == len(rows) - 1]
    for row in kept:
        for name, value in row.items():
            split, slash, metric = name.partition("/")
            if slash and isinstance(value, int | float) and math.isfinite(value):
                charts.setdefault(metric, {}).setdefault(split, []).append(
                    (float(row["epoch"]), float(value))
                )
    drawable = {
        metric: {split: curve for split, curve in curves.items() if len(curve) > 1}
        for metric, curves in sorted(charts.items(), key=lambda item: item[0] != "loss")
    }
    return dict([item for item in drawable.items() if item[1]][:_MOST_METRICS])


def _chart(metric: str, curves: Mapping[str, Curve], label: Callable[[float], str] = "{:g}".format) -> str:
    points = [point for curve in curves.values() for point in curve]
    (left, right), (low, high) = _span(x for x, _ in points), _span(y for _, y in points)
    plot_width, plot_height = _WIDTH - 2 * _MARGIN, _HEIGHT - 2 * _MARGIN

    def place(x: float, y: float) -> str:
        across, up = (x - left) / (right - left), (y - low) / (high - low)
        return f"{_MARGIN + across * plot_width:.1f},{_HEIGHT - _MARGIN - up * plot_height:.1f}"

    parts = [
        f'<text x="{_MARGIN}" y="20" font-weight="bold" {_GRAY}>{escape(metric)}</text>',
        f'<rect x="{_MARGIN}" y="{_MARGIN}" width="{plot_width}" height="{plot_height}" fill="none" stroke="#cbd5e1"/>',
        f'<text x="{_MARGIN - 4}" y="{_MARGIN + 8}" text-anchor="end" {_GRAY}>{high:.3g}</text>',
        f'<text x="{_MARGIN - 4}" y="{_HEIGHT - _MARGIN}" text-anchor="end" {_GRAY}>{low:.3g}</text>',
        f'<text x="{_MARGIN}" y="{_HEIGHT - _MARGIN + 14}" {_GRAY}>{label(left)}</text>',
        f'<text x="{_WIDTH - _MARGIN}" y="{_HEIGHT - _MARGIN + 14}" text-anchor="end" {_GRAY}>{label(right)}</text>',
    ]
    for index, (split, curve) in enumerate(curves.items()):
        color = _COLORS[index % len(_COLORS)]
        line = " ".join(place(x, y) for x, y in curve)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        y = 36 if len(metric) > 12 else 20  # below a long title
        legend = f'x="{_MARGIN + 70 * (index + 1)}" y="{y}" font-family="sans-serif" font-size="11"'
        parts.append(f'<text {legend} fill="{color}">{escape(split)}</text>')
    return "".join(parts)


def _span(values: Any) -> tuple[float, float]:
    known = list(values)
    low, high = min(known), max(known)
    return (low, high) if high > low else (low - 0.5, high + 0.5)
