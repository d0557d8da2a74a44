"""Plots of a report, by matplotlib, as SVG text: on a page in its colours, or on white as a file."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

INK = "#010203"  # stands for the colour of the page's text
COLOURS = ("#2a78b8", "#d1495b", "#2e8b57", "#d98a1c", "#7a52a8", "#5d6d7e", "#b5548f", "#8a7a1f", "#1f9aa0")
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 9, "font.family": "sans-serif",
    "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 8,
    "figure.dpi": 72, "axes.grid": True, "grid.alpha": 0.2, "grid.color": INK,
}  # fmt: skip
WIDTH, HEIGHT = 6.2, 4.1  # inches
LETTER, BESIDE, LINE = 4.5, 5, 10  # pixels: width of a letter, from a point to its name, between two lines of names
Points = dict[str, tuple[float, float]]
Curve = list[tuple[float, float]]
Spot = tuple[float, float]


def scatter(points: Mapping[str, Points], x_label: str, y_label: str, log_x: bool, log_y: bool) -> str:
    """Named points by kind, each kind in a colour of its own; what a logarithm does not have is left out."""
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH, HEIGHT), layout="constrained")
        axes = figure.subplots()
        kept = {kind: {n: p for n, p in named.items() if _shown(p, log_x, log_y)} for kind, named in points.items()}
        for k, (kind, named) in enumerate(kept.items()):
            if named:
                axes.scatter(*zip(*named.values(), strict=True), s=26, color=COLOURS[k % len(COLOURS)], label=kind)
        _scaled(axes, log_x, log_y)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.margins(x=0.16, y=0.08)
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=6, handletextpad=0, columnspacing=0.5, fontsize=7
        )
        figure.draw_without_rendering()
        _named(axes, {name: place for named in kept.values() for name, place in named.items()})
        return _svg(figure)


def panels(curves: Mapping[str, Mapping[str, Curve]], x_label: str, y_label: str, log_y: bool) -> str:
    """A panel for each kind, with a curve for each name."""
    with matplotlib.rc_context(STYLE):
        columns = min(3, len(curves))
        rows = math.ceil(len(curves) / columns)
        figure = Figure((3.4 * columns, 2.7 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
        for axes, (kind, named) in zip(grid, curves.items(), strict=False):
            for k, (name, curve) in enumerate(named.items()):
                kept = [p for p in curve if _shown(p, False, log_y)]
                axes.plot(*zip(*kept, strict=True), marker="o", ms=3, color=COLOURS[k % len(COLOURS)], label=name)
            _scaled(axes, False, log_y)
            axes.set_title(kind, fontsize=9)
            axes.legend(ncols=2, fontsize=7, handlelength=1.2, columnspacing=0.8)
        for axes in grid[len(curves) :]:
            axes.set_visible(False)
        figure.supxlabel(x_label, fontsize=9)
        figure.supylabel(y_label, fontsize=9)
        return _svg(figure)


def inline(svg: str) -> str:
    """For a page: as wide as there is room, in the colour of its text."""
    inner = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg class="plot" \1 role="img">', inner, count=1)


def on_white(svg: str) -> str:
    """For a file: black on white."""
    ground = r'\1<rect width="100%" height="100%" fill="white"/>'
    return re.sub(r"(<svg [^>]*>)", ground, svg.replace(INK, "#222222"), count=1)


def _shown(place: tuple[float, float], log_x: bool, log_y: bool) -> bool:
    return all(math.isfinite(v) and (v > 0 or not log) for v, log in zip(place, (log_x, log_y), strict=True))


def _scaled(axes: Axes, log_x: bool, log_y: bool) -> None:
    for axis, log, scale in ((axes.xaxis, log_x, axes.set_xscale), (axes.yaxis, log_y, axes.set_yscale)):
        if log:
            scale("log")
            low, high = axis.get_data_interval()
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())


def _named(axes: Axes, points: Points) -> None:
    """A name beside each point; where it would lie on others or outside, as near as there is room, with a line."""
    places = {name: axes.transData.transform(place) for name, place in points.items()}
    taken = [(x - 3, x + 3, y) for x, y in places.values()]
    for name, (x, y) in sorted(places.items(), key=lambda item: -item[1][1]):
        width = LETTER * len(name)
        aside, move = _free(axes.bbox, taken, (x, y), width)
        taken.append((x + aside, x + aside + width, y + move))
        near = move == 0 and aside in (BESIDE, -BESIDE - width)
        line = {} if near else {"arrowprops": {"arrowstyle": "-", "lw": 0.4, "color": INK, "shrinkA": 0, "shrinkB": 2}}
        offset = {"xytext": (aside, move - 3), "textcoords": "offset points", "fontsize": 8}
        axes.annotate(name, points[name], **offset, **line).set_in_layout(False)


def _free(box: Bbox, taken: list[tuple[float, float, float]], point: tuple[float, float], width: float) -> Spot:
    """How far from a point a name of this width begins, and how far above it, in pixels: the nearest free place.

    Args:
        box: axes.
        taken: left end, right end and height of the points, and of the names that are there.
    """
    (x, y), sides = point, (BESIDE, -BESIDE - width, 24, -24 - width, 60, -60 - width)
    spots = [(side, move) for side in sides for move in range(-200, 201, LINE)]
    inside = [
        (side, move)
        for side, move in spots
        if box.x0 <= x + side and x + side + width <= box.x1 and box.y0 + 5 <= y + move <= box.y1
    ]
    free = [
        (side, move)
        for side, move in inside
        if all(abs(y + move - v) >= 9 or x + side + width < left or right < x + side for left, right, v in taken)
    ]
    return min(free or inside or spots, key=lambda spot: math.hypot(max(spot[0], -spot[0] - width), spot[1]))


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return re.sub(r"font-family: [^;]+;", "font-family: sans-serif;", out.getvalue())
