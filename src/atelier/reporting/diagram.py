"""What feeds what, as an inline SVG: sources at the left, what comes out at the right."""

from __future__ import annotations

from html import escape

from atelier.reporting.structure import Part, Structure

BOX, HEIGHT, GAP_X, GAP_Y, EDGE = 136, 46, 54, 16, 8  # pixels


def svg(structure: Structure, title: str) -> str:
    """A drawing whose colours are those of the page (`.part`, `.frozen`, `.end`)."""
    columns = _columns(structure)
    depth = {name: k for k, column in enumerate(columns) for name in column}
    tallest = max(map(len, columns))
    skips = any(depth[b] - depth[a] != 1 for a, b in structure.arrows)
    top = EDGE + (GAP_Y + 12) * skips
    width = 2 * EDGE + len(columns) * BOX + (len(columns) - 1) * GAP_X
    height = top + tallest * (HEIGHT + GAP_Y) - GAP_Y + EDGE + 18 * skips
    place = {}
    for k, column in enumerate(columns):
        first = top + (tallest - len(column)) * (HEIGHT + GAP_Y) / 2
        for row, name in enumerate(column):
            place[name] = (EDGE + k * (BOX + GAP_X), first + row * (HEIGHT + GAP_Y))
    drawn = [_arrow(place[a], place[b], depth[b] - depth[a]) for a, b in structure.arrows]
    parts = {part.name: part for part in structure.parts}
    drawn += [_box(name, *place[name], parts.get(name)) for column in columns for name in column]
    head = f'<svg class="diagram" width="{width}" height="{height:.0f}" viewBox="0 0 {width} {height:.0f}" role="img">'
    return "\n".join([head, f"<title>{escape(title)}</title>", MARKER, *drawn, "</svg>"])


MARKER = (
    '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path d="M0 0 L8 4 L0 8 z" class="tip"/></marker></defs>'
)


def _columns(structure: Structure) -> list[list[str]]:
    """Names by how many parts lie before them; an arrow from a part that is called later first does not count."""
    order = {part.name: k for k, part in enumerate(structure.parts)}
    depth: dict[str, int] = {}
    for name in order:
        before = [depth[a] for a, b in structure.arrows if b == name and order.get(a, len(order)) < order[name]]
        depth[name] = 1 + max(before, default=0)
    for name in structure.sources:
        depth[name] = min((depth[b] for a, b in structure.arrows if a == name and b in depth), default=1) - 1
    depth[structure.result] = 1 + max(depth.values(), default=0)
    found: list[list[str]] = [[] for _ in range(max(depth.values()) + 1)]
    for name, k in depth.items():
        found[k].append(name)
    return [column for column in found if column]


def _arrow(a: tuple[float, float], b: tuple[float, float], steps: int) -> str:
    """From the right side of a box to the left side of another, or over the boxes between, or back below them."""
    (x1, y1), (x2, y2) = (a[0] + BOX, a[1] + HEIGHT / 2), (b[0], b[1] + HEIGHT / 2)
    if steps == 1:
        middle = (x1 + x2) / 2
        path = f"M{x1} {y1} C{middle} {y1} {middle} {y2} {x2 - 1} {y2}"
    elif steps > 1:
        x1, y1, y2 = a[0] + BOX * 0.7, a[1], b[1]
        over = min(y1, y2) - HEIGHT
        path = f"M{x1} {y1} C{x1 + GAP_X} {over} {x2 - GAP_X / 2} {over} {x2 + BOX * 0.3} {y2 - 1}"
    else:
        x1, y1, x2, y2 = a[0] + BOX * 0.4, a[1] + HEIGHT, b[0] + BOX * 0.6, b[1] + HEIGHT
        under = max(y1, y2) + HEIGHT / 2
        path = f"M{x1} {y1} C{x1} {under} {x2} {under} {x2} {y2 + 1}"
    return f'<path d="{path}" class="arrow" marker-end="url(#tip)"/>'


def _box(name: str, x: float, y: float, part: Part | None) -> str:
    kind = "end" if part is None else "part frozen" if part.frozen else "part"
    shape = (
        f'<rect x="{x}" y="{y:.1f}" width="{BOX}" height="{HEIGHT}" rx="{22 if part is None else 6}" class="{kind}"/>'
    )
    lines = [name.replace("_", " ")] + ([] if part is None else [size(part)])
    middle = y + HEIGHT / 2 + (5 if len(lines) == 1 else -4)
    words = [
        f'<text x="{x + BOX / 2}" y="{middle + 16 * k:.1f}" text-anchor="middle" class="{"small" if k else "name"}">'
        f"{escape(line)}</text>"
        for k, line in enumerate(lines)
    ]
    return shape + "".join(words)


def size(part: Part) -> str:
    """`0.86 M, 0.031 GFLOP`, with the number of evaluations where there are several; small numbers in full.

    Of a part of buffers alone, whose work is none: `no trained weights`.
    """
    n = f"{part.parameters / 1e6:.2f} M" if part.parameters >= 1e4 else f"{part.parameters:,} weights"
    words = [n if part.parameters else "no trained weights"]
    words += [f"{part.gflop:.2g} GFLOP"] if part.gflop >= 1e-3 else []
    return ", ".join([*words, *([f"{part.calls} x"] if part.calls > 1 else [])])


def sentence(structure: Structure) -> str:
    """The same in words: `image -> net.encoder -> net.decoder -> loss; noise -> net.decoder`."""
    left = list(structure.arrows)
    chains = []
    while left:
        chain = list(left.pop(0))
        while following := next(((a, b) for a, b in left if a == chain[-1]), None):
            left.remove(following)
            chain.append(following[1])
        chains.append(" -> ".join(chain))
    return "; ".join(chains)
