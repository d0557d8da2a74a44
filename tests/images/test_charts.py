"""Line charts: points where they belong, ticks around them, and a file that a browser reads."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from atelier.images.charts import _ticks, line_chart

SVG = "{http://www.w3.org/2000/svg}"


def drawn(chart: str) -> tuple[list[list[tuple[float, float]]], list[str]]:
    """Points of each line in pixels, and all words."""
    root = ElementTree.fromstring(chart)
    lines = [
        [tuple(map(float, p.split(","))) for p in line.get("points").split()] for line in root.iter(f"{SVG}polyline")
    ]
    return lines, [text.text for text in root.iter(f"{SVG}text")]


def test_points_lie_as_their_numbers_do() -> None:
    """The y axis begins at 0 and points up; x is even in its logarithm where that is asked for."""
    lines, words = drawn(line_chart({"a < b": [(5, 0.0), (10, 0.5), (20, 1.0)]}, "NFE", "valid", log_x=True))
    (x0, y0), (x1, y1), (x2, y2) = lines[0]
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 - y1 == pytest.approx(y1 - y2, abs=0.2) and y2 < y0
    assert {"a < b", "NFE", "valid", "5", "10", "20", "0", "1"} <= set(words)
    lines, _ = drawn(line_chart({"": [(5, 0.0), (10, 0.5), (20, 1.0)]}, "x", "y"))
    assert lines[0][2][0] - lines[0][1][0] == pytest.approx(2 * (lines[0][1][0] - lines[0][0][0]), abs=0.3)


def test_what_is_not_finite_is_left_out() -> None:
    lines, _ = drawn(line_chart({"a": [(1, 2.0), (2, math.nan), (3, 4.0)], "b": [(1, math.inf)]}, "x", "y"))
    assert [len(line) for line in lines] == [2, 0]
    assert drawn(line_chart({"a": [(5, math.nan)]}, "x", "y", log_x=True))[0] == [[]]


def test_an_interval_is_a_band_around_its_curve() -> None:
    """Its outline goes along the upper ends and back along the lower ones; the axis reaches both."""
    curves = {"a": [(0, 1.0), (1, 2.0), (2, math.nan)], "b": [(0, 1.0), (1, 1.0)]}
    chart = line_chart(curves, "x", "y", half_widths={"a": [0.5, 1.0, 0.1]})
    outlines = [polygon.get("points") for polygon in ElementTree.fromstring(chart).iter(f"{SVG}polygon")]
    band = [tuple(map(float, point.split(","))) for point in outlines[0].split()]
    (x0, y0), (x1, y1) = drawn(chart)[0][0]
    assert len(outlines) == 1 and [x for x, _ in band] == [x0, x1, x1, x0]
    around = [a + b for (_, a), (_, b) in zip(band[:2], band[:1:-1], strict=True)]
    assert around == pytest.approx([2 * y0, 2 * y1], abs=0.2)
    assert (y0 - band[0][1]) * 2 == pytest.approx(y1 - band[1][1], abs=0.2) and "3" in drawn(chart)[1]


def test_many_curves_look_different() -> None:
    chart = line_chart({f"c{k}": [(1, k), (2, k + 1)] for k in range(13)}, "x", "y")
    assert len(set(re.findall(r'fill="none" (stroke="\S+" stroke-dasharray=".*?")', chart))) == 13


@pytest.mark.parametrize("values", [[0.0, 1.0], [0.0, 0.03], [3.0, 3.0], [-2.0, 700.0], [0.0]])
def test_ticks_enclose_all_values(values: list[float]) -> None:
    ticks = _ticks(values)
    assert ticks[0] <= min(values) and ticks[-1] >= max(values) and 2 <= len(ticks) <= 9
