"""Masks of what is to be filled: brushes led through an image, and boxes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

PUBLISHED = 256  # side in pixels of the images that the lengths below are of
STROKES, SEGMENTS, MOST_TURN = 5, 5, 4.0  # at most; an angle in radians
LENGTHS, WIDTHS = (10.0, 210.0), (5.0, 105.0)
BOXES, SIDES, MARGIN = 4, (30.0, 150.0), 10.0
MOST_HIDDEN = 0.5  # share of the image
PIXELS_AT_ONCE = 1 << 16  # what a core's cache holds


def squared_distances(starts: Tensor, ends: Tensor, size: int) -> Tensor:
    """(N, S, S) squared distances of the middles of S x S pixels to the segments between points (N, 2), x and y, of
    an image that runs from -1 to 1."""
    axis = (torch.arange(size) + 0.5) * 2 / size - 1
    (ax, ay), (bx, by) = (points[:, :, None, None].unbind(1) for points in (starts, ends))  # (N, 1, 1) each
    dx, dy = bx - ax, by - ay
    x, y = axis - ax, axis[:, None] - ay
    along = ((x * dx + y * dy) / (dx * dx + dy * dy).clamp(min=1e-12)).clamp_(0, 1)
    return (x - along * dx).square_() + (y - along * dy).square_()


def lama_mask(size: int, rng: torch.Generator) -> Tensor:
    """(1, S, S) float32 of 0 and 1, 1 = to fill: the wide masks of LaMa (Suvorov et al. 2022, "Resolution-robust large
    mask inpainting with Fourier convolutions", section 2.3), strokes or boxes with equal chance.

    One to five strokes of one to five segments each, a segment 10 to 210 long, 5 to 105 wide and turned by up to 4
    radians, at the border cut; or one to four boxes of sides 30 to 150, 10 from the border; of an image 256 pixels
    wide, and of others in proportion. A mask that is empty or hides more than half of the image is drawn anew.
    """
    draw = _strokes if float(torch.rand((), generator=rng)) < 0.5 else _boxes
    while True:
        mask = draw(size, rng)
        if 0 < mask.mean() <= MOST_HIDDEN:
            return mask[None]


def _strokes(size: int, rng: torch.Generator) -> Tensor:
    """(S, S) of 0 and 1."""
    counts, places = torch.rand(STROKES + 1, generator=rng).tolist(), torch.rand(STROKES, 2, generator=rng).tolist()
    numbers = torch.rand(STROKES, SEGMENTS, 3, generator=rng).tolist()
    starts, ends, widths = [], [], []
    for stroke, (x, y) in enumerate(places[: _whole(counts[-1], STROKES)]):
        x, y = 2 * x - 1, 2 * y - 1
        for u in numbers[stroke][: _whole(counts[stroke], SEGMENTS)]:
            turn = MOST_TURN * u[0] * (1 if stroke % 2 else -1)
            length = _between(u[1], LENGTHS) * 2 / PUBLISHED
            starts.append((x, y))
            x, y = (min(1.0, max(-1.0, p)) for p in (x + length * math.sin(turn), y + length * math.cos(turn)))
            ends.append((x, y))
            widths.append(_between(u[2], WIDTHS) * 2 / PUBLISHED)
    mask = torch.zeros(size, size, dtype=torch.bool)
    ways = (torch.tensor(numbers).split(max(1, PIXELS_AT_ONCE // size**2)) for numbers in (starts, ends, widths))
    for start, end, width in zip(*ways, strict=True):
        mask |= (squared_distances(start, end, size) < (width[:, None, None] / 2).square()).any(0)
    return mask.float()


def _boxes(size: int, rng: torch.Generator) -> Tensor:
    """(S, S) of 0 and 1."""
    mask, middle = torch.zeros(size, size), (torch.arange(size) + 0.5) * PUBLISHED / size
    n = _whole(float(torch.rand((), generator=rng)), BOXES)
    for box in torch.rand(BOXES, 2, 2, generator=rng)[:n].tolist():
        sides = [_between(u, SIDES) for u, _ in box]
        starts = [_between(u, (MARGIN, PUBLISHED - MARGIN - side)) for (_, u), side in zip(box, sides, strict=True)]
        rows, columns = ((middle >= a) & (middle < a + side) for a, side in zip(starts, sides, strict=True))
        mask[rows[:, None] & columns] = 1
    return mask


def _whole(u: float, most: int) -> int:
    """1 to `most`, of a number in [0, 1)."""
    return 1 + int(u * most)


def _between(u: float, span: tuple[float, float]) -> float:
    return span[0] + (span[1] - span[0]) * u
