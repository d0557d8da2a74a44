"""Line charts as SVG, which browsers and GitHub show: text, without a library."""

from __future__ import annotations

import math
from html import escape

WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 190, 20, 50  # margins; the right one holds the names
COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#e08e1d", "#6a4c93", "#3a3a3a")
DASHES = ("", "7 4", "2 3")  # one for each round of the colours

Points = list[tuple[float, float]]


def line_chart(
    curves: dict[str, Points],
    x_label: str,
    y_label: str,
    log_x: bool = False,
    half_widths: dict[str, list[float]] | None = None,
) -> str:
    """An SVG of curves by name, their points marked; those that are not finite are left out.

    Args:
        curves: name -> (x, y) in the order of drawing; "" has no name at the right.
        x_label: text below.
        y_label: text at the left.
        log_x: whether x, all positive, is drawn by its logarithm.
        half_widths: name -> half of the interval of each of its points, drawn as a band around the curve.
    """
    bands = {name: _band(curves[name], widths) for name, widths in (half_widths or {}).items()}
    kept = {name: [p for p in points if all(map(math.isfinite, p))] for name, points in curves.items()}
    xs, ys = ([p[i] for points in [*kept.values(), *bands.values()] for p in points] for i in (0, 1))
    xs = xs or [1.0, 10.0]
    x_ticks = _log_ticks(xs) if log_x else _ticks(xs)
    y_ticks = _ticks([*ys, 0.0])
    flat = math.log if log_x else float
    x_ends = [flat(end) for end in ((min(xs), max(xs)) if log_x else (x_ticks[0], x_ticks[-1]))]

    def place(x: float, y: float) -> tuple[float, float]:
        right = (flat(x) - x_ends[0]) / ((x_ends[1] - x_ends[0]) or 1)
        up = (y - y_ticks[0]) / ((y_ticks[-1] - y_ticks[0]) or 1)
        return LEFT + right * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    axis_x, axis_y = LEFT, HEIGHT - BOTTOM
    body = [_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, x_label, "middle"), _upright(y_label)]
    for tick in x_ticks:
        x, _ = place(tick, y_ticks[0])
        body += [_line(x, axis_y, x, axis_y + 5, "#666"), _text(x, axis_y + 20, f"{tick:g}", "middle")]
    for tick in y_ticks:
        _, y = place(x_ticks[0], tick)
        body += [_line(axis_x, y, WIDTH - RIGHT, y, "#ddd"), _text(axis_x - 8, y + 4, f"{tick:g}", "end")]
    for k, name in enumerate(kept):
        if name in bands:
            outline = _path([place(*p) for p in bands[name]])
            body.append(f'<polygon points="{outline}" fill="{COLOURS[k % len(COLOURS)]}" opacity="0.18"/>')
    for k, (name, points) in enumerate(kept.items()):
        body += _curve([place(*p) for p in points], name, k)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>', *body, "</svg>", ""])


def _band(points: Points, half_widths: list[float]) -> Points:
    """The outline of intervals: their upper ends, and back along the lower ones."""
    ends = [(x, y, width) for (x, y), width in zip(points, half_widths, strict=True) if math.isfinite(y + width)]
    return [(x, y + width) for x, y, width in ends] + [(x, y - width) for x, y, width in reversed(ends)]


def _curve(points: Points, name: str, k: int) -> list[str]:
    """Line, marks and name of curve k, in pixels."""
    colour, dash = COLOURS[k % len(COLOURS)], DASHES[k // len(COLOURS) % len(DASHES)]
    style = f'stroke="{colour}" stroke-dasharray="{dash}" stroke-width="2"'
    drawn = [f'<polyline points="{_path(points)}" fill="none" {style}/>']
    drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
    if name:
        y, x = TOP + 8 + 18 * k, WIDTH - RIGHT + 14
        drawn += [f'<line x1="{x}" y1="{y}" x2="{x + 26}" y2="{y}" {style}/>', _text(x + 34, y + 4, name, "start")]
    return drawn


def _path(points: Points) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _ticks(values: list[float]) -> list[float]:
    """Four to eight round numbers around all values."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    span = (high - low) or abs(high) or 1.0
    step = next(s for s in (m * 10.0 ** (math.floor(math.log10(span)) - 1) for m in (2, 5, 10, 20)) if span / s <= 6)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, max(last, first + 1) + 1)]


def _log_ticks(values: list[float]) -> list[float]:
    """The numbers 1, 2 and 5 of every power of ten between the ends of all values, or else the ends."""
    low, high = min(values), max(values)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    inside = [m * 10.0**k for k in powers for m in (1, 2, 5) if low <= m * 10.0**k <= high]
    return inside if len(inside) > 1 else sorted({low, high})


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="13" text-anchor="{anchor}">{escape(text)}</text>'


def _upright(text: str) -> str:
    place = f"translate(18 {(TOP + HEIGHT - BOTTOM) / 2:.1f}) rotate(-90)"
    return f'<text transform="{place}" font-size="13" text-anchor="middle">{escape(text)}</text>'
