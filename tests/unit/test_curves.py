"""The picture of a run's curves is drawn from its results, whatever they hold."""

from __future__ import annotations

import base64
import math
import xml.etree.ElementTree
from typing import Any

from flows.curves import curves_image

SVG = "{http://www.w3.org/2000/svg}"


def _drawn(rows: list[dict[str, Any]]) -> xml.etree.ElementTree.Element:
    image = curves_image(rows)
    assert (
        image is not None and image.startswith("![curves](data:image/svg+xml;base64,") and image.endswith(")")
    )
    return xml.etree.ElementTree.fromstring(base64.b64decode(image.partition("base64,")[2][:-1]))


def _points(line: xml.etree.ElementTree.Element) -> list[tuple[float, float]]:
    pairs = [point.split(",") for point in line.attrib["points"].split()]
    return [(float(x), float(y)) for x, y in pairs]


def test_each_metric_is_a_chart_with_a_line_per_split() -> None:
    rows = [
        {"epoch": epoch, "train/loss": 1.0 / (epoch + 1), "val/loss": 1.0, "val/accuracy": 0.1 * epoch}
        for epoch in range(5)
    ]
    drawn = _drawn(rows)
    lines = [_points(line) for line in drawn.iter(f"{SVG}polyline")]
    assert [len(line) for line in lines] == [5, 5, 5]
    down, flat, up = lines
    assert all(before[1] < after[1] for before, after in zip(down, down[1:], strict=False)), (
        "y grows downwards"
    )
    assert len({y for _, y in flat}) == 1 and up[0][1] > up[-1][1]
    texts = {text.text for text in drawn.iter(f"{SVG}text")}
    assert {"loss", "accuracy", "train", "val"} <= texts


def test_thousands_of_epochs_are_a_small_picture() -> None:
    rows = [{"epoch": epoch, "train/loss": math.sin(epoch)} for epoch in range(20_000)]
    [line] = _drawn(rows).iter(f"{SVG}polyline")
    points = _points(line)
    assert 200 < len(points) <= 302 and points[-1][0] == max(x for x, _ in points)


def test_what_cannot_be_drawn_is_left_out() -> None:
    nan, text = float("nan"), '<&">'
    assert curves_image([]) is None
    assert curves_image([{"epoch": 0, "train/loss": 1.0}]) is None
    assert curves_image([{"epoch": 0, "train/loss": nan}, {"epoch": 1, "train/loss": float("inf")}]) is None
    rows = [
        {"epoch": epoch, f"val/{text}": 1.0 * epoch, "val/name": text, "train/loss": nan}
        for epoch in range(3)
    ]
    drawn = _drawn(rows)
    assert len(list(drawn.iter(f"{SVG}polyline"))) == 1
    assert text in {each.text for each in drawn.iter(f"{SVG}text")}
