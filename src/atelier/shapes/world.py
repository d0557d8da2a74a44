"""The shapes world: pictures of one object on a plain ground, whose truth is known.

Coordinates run from -1 to 1 over the image, x to the right and y down; h = 2 / image_size is a pixel.
Constants, geometry and grammar are frozen, so that figures can be compared over time. `judge.py` beside it judges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from atelier.images.masks import squared_distances

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = ("red", "green", "blue", "yellow", "magenta", "cyan")
SIZES = ("small", "large")
FILLS = ("solid", "striped")
GROUNDS = ("black", "grey", "navy", "brown")

COLOUR_RGB = torch.tensor(
    [
        [0.90, 0.10, 0.10],
        [0.10, 0.72, 0.15],
        [0.15, 0.30, 0.95],
        [0.97, 0.85, 0.10],
        [0.85, 0.15, 0.85],
        [0.10, 0.85, 0.90],
    ]
)
GROUND_RGB = torch.tensor([[0.04, 0.04, 0.04], [0.50, 0.50, 0.50], [0.08, 0.08, 0.38], [0.38, 0.22, 0.10]])
RADII = torch.tensor([0.44, 0.68])
MARGIN = 0.13  # kept free between an object of radius r and the edge of the image
PERIOD = 0.5  # of the stripes

N_LABELS = len(SHAPES) * len(COLOURS)

Split = Literal["train", "val", "test", "unseen"]
Fill = Literal["solid", "striped"]
FIRST: dict[str, int] = {"train": 0, "val": 1 << 40, "test": 2 << 40, "unseen": 3 << 40}  # number of scene 0

ATTRIBUTES = ("shape", "colour", "size", "fill", "ground")
COUNTS = (len(SHAPES), len(COLOURS), len(SIZES), len(FILLS), len(GROUNDS))
KEYS = torch.tensor([7, 5, 3, 11, 13])  # a combination c is unseen where KEYS . c = 0 mod 10
COMBINATIONS = torch.cartesian_prod(*(torch.arange(n) for n in COUNTS))  # (576, 5)

MASK_KINDS = ("box", "stroke")
LEAST_HIDDEN, MOST_HIDDEN = 0.3, 0.7  # of the object's pixels, by a stroke

PIXELS_AT_ONCE = 1 << 15  # rendered in one go: what a core's cache holds


@dataclass(frozen=True)
class Scenes:
    """N scenes; every field is (N,): int64 attribute numbers and float32 centres."""

    shape: Tensor
    colour: Tensor
    size: Tensor
    fill: Tensor
    ground: Tensor
    cx: Tensor
    cy: Tensor

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, rows: Tensor | slice) -> Scenes:
        return Scenes(*(getattr(self, field.name)[rows] for field in fields(self)))

    @property
    def combination(self) -> Tensor:
        """(N, 5) int64: shape, colour, size, fill, ground."""
        return torch.stack([self.shape, self.colour, self.size, self.fill, self.ground], dim=1)


# ---- numbers -------------------------------------------------------------------------------------------------------


def _shifted(x: Tensor, by: int) -> Tensor:
    return (x >> by) & ((1 << (64 - by)) - 1)


def _mixed(x: Tensor) -> Tensor:
    """64 bits to 64 bits, every bit of the result depending on all of x (the finaliser of SplitMix64; Steele, Lea
    and Flood, "Fast splittable pseudorandom number generators", 2014)."""
    x = (x ^ _shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shifted(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shifted(x, 31)


def uniform(seed: int, numbers: Tensor, draw: int) -> Tensor:
    """(N,) float64 in [0, 1): draw number `draw` of the scenes `numbers` (N,) int64, a pure function of all three."""
    key = _mixed(_mixed(torch.tensor(seed)) + draw + 1)
    return _shifted(_mixed(_mixed(numbers + 1) + key), 11) * 2.0**-53


def _numbers(indices: Sequence[int] | Tensor, split: Split) -> Tensor:
    return torch.as_tensor(indices, dtype=torch.int64) + FIRST[split]


def is_unseen(combination: Tensor) -> Tensor:
    """(...,) bool: which combinations (..., 5) are in no training scene (about a tenth of the 576)."""
    return (combination * KEYS).sum(-1) % 10 == 0


def furthest(size: Tensor) -> Tensor:
    """How far from the middle, along either axis, the centre of an object of size `size` (N,) may lie."""
    return 1 - RADII[size] - MARGIN


# ---- scenes --------------------------------------------------------------------------------------------------------


def scenes(seed: int, indices: Sequence[int] | Tensor, split: Split, fill: Fill | None = None) -> Scenes:
    """Scenes `indices` of a split, each a pure function of (seed, index, split).

    Attributes are uniform over the combinations of the split: "unseen" has those that are in no other split.

    Args:
        seed: seed of the world.
        indices: (N,) whole numbers from 0.
        split: "train", "val", "test" or "unseen".
        fill: only fill of the scenes drawn (a domain), independent of those without.
    """
    numbers = _numbers(indices, split)
    allowed = is_unseen(COMBINATIONS) == (split == "unseen")
    draw = 0
    if fill is not None:
        allowed &= COMBINATIONS[:, 3] == FILLS.index(fill)
        draw = 100 * (1 + FILLS.index(fill))
    table = COMBINATIONS[allowed]
    chosen = table[(uniform(seed, numbers, draw) * len(table)).long()]
    limit = furthest(chosen[:, 2]).double()
    cx, cy = ((limit * (2 * uniform(seed, numbers, draw + k) - 1)).float() for k in (1, 2))
    return Scenes(*chosen.unbind(1), cx, cy)


def edits(seed: int, indices: Sequence[int] | Tensor, split: Split) -> tuple[Scenes, list[str], Scenes]:
    """Before, instruction and after: the same scene with one attribute changed.

    After is scene `index` of the split, pulled towards the middle where before is too large for its place; before
    is always a combination of the training scenes. The five attributes change equally often, nearly.
    """
    numbers, after = _numbers(indices, split), scenes(seed, indices, split)
    options = torch.tensor([(a, k) for a, count in enumerate(COUNTS) for k in range(1, count)])  # (15, 2)
    kind, shift = options.unbind(1)
    before = after.combination[:, None].repeat(1, len(options), 1)  # (N, 15, 5)
    at = torch.arange(len(options))
    before[:, at, kind] = (before[:, at, kind] + shift) % torch.tensor(COUNTS)[kind]
    luck = torch.stack([uniform(seed, numbers, 10 + k) for k in range(len(options))], dim=1)  # (N, 15)
    score = luck.log() * (torch.tensor(COUNTS)[kind] - 1)  # the greatest of log(u) / w falls on each with odds w
    option = score.masked_fill(is_unseen(before), -math.inf).argmax(1)
    before = before[torch.arange(len(numbers)), option]
    room = torch.minimum(furthest(before[:, 2]), furthest(after.size)) / furthest(after.size)
    after = replace(after, cx=after.cx * room, cy=after.cy * room)
    instructions = [instruction(ATTRIBUTES[k], int(c[k])) for k, c in zip(kind[option], after.combination, strict=True)]
    return Scenes(*before.unbind(1), after.cx, after.cy), instructions, after


def attribute_transfer(seed: int, indices: Sequence[int] | Tensor, split: Split) -> Scenes:
    """The scenes of a split with one of colour, fill and ground changed, each as often: a pure function of all three.

    The combinations may be ones that are in no training scene.
    """
    numbers, kinds = _numbers(indices, split), torch.tensor([ATTRIBUTES.index(a) for a in ("colour", "fill", "ground")])
    known, counts = scenes(seed, indices, split), torch.tensor(COUNTS)
    kind = kinds[(uniform(seed, numbers, 400) * len(kinds)).long()]  # (N,)
    step = 1 + (uniform(seed, numbers, 401) * (counts[kind] - 1)).long()
    combination, at = known.combination, torch.arange(len(numbers))
    combination[at, kind] = (combination[at, kind] + step) % counts[kind]
    return Scenes(*combination.unbind(1), known.cx, known.cy)


def instruction(attribute: str, value: int) -> str:
    """What asks for `value` of an attribute: "make it blue", "turn it into a star", "put it on a brown ground"."""
    if attribute == "shape":
        return f"turn it into a {SHAPES[value]}"
    if attribute == "ground":
        return f"put it on a {GROUNDS[value]} ground"
    return f"make it {dict(colour=COLOURS, size=SIZES, fill=FILLS)[attribute][value]}"


def label(scenes: Scenes) -> Tensor:
    """(N,) int64: 6 * shape + colour, 0 .. 35."""
    return len(COLOURS) * scenes.shape + scenes.colour


def attributes(scenes: Scenes) -> Tensor:
    """(N, 14) float32 of 0 and 1: one-hots of colour (6), size (2), fill (2), ground (4)."""
    parts = zip((scenes.colour, scenes.size, scenes.fill, scenes.ground), COUNTS[1:], strict=True)
    return torch.cat([F.one_hot(values, count) for values, count in parts], dim=1).float()


def captions(scenes: Scenes) -> list[str]:
    """ "a small red striped circle on a navy ground"; solid ones say no fill: "a large blue cross on a grey ground"."""
    return [
        f"a {SIZES[size]} {COLOURS[colour]} {'striped ' if fill else ''}{SHAPES[shape]} on a {GROUNDS[ground]} ground"
        for shape, colour, size, fill, ground in scenes.combination.tolist()
    ]


# ---- geometry: signed distances, negative inside, of points (x, y) seen from the centre ------------------------------


def _circle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return (x * x + y * y).sqrt() - 0.92 * r


def _square(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.80 * r


def _triangle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Equilateral, apex up, inradius 0.56 r: the greatest of the distances to its three sides."""
    return torch.maximum(x.abs() * math.cos(math.pi / 6) - y * math.sin(math.pi / 6), y) - 0.56 * r


def _star(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Five points, apex up, outer radius 1.06 r, inner 0.42 of it: folded into the tenth right of the apex, where
    its outline is one segment from the tip to the inner corner."""
    outer, sin, cos = 1.06 * r, math.sin(math.pi / 5), math.cos(math.pi / 5)
    x, y = x.abs(), -y
    for _ in range(2):
        beyond = (x * cos - y * sin).clamp_(min=0)
        x, y = (x - 2 * cos * beyond).abs(), y + 2 * sin * beyond
    ex, ey = 0.42 * sin, 0.42 * cos - 1
    y = y - outer
    along = ((x * ex + y * ey) / (ex * ex + ey * ey)).clamp(min=torch.zeros_like(outer), max=outer)
    dx, dy = x - ex * along, y - ey * along
    return (dx * dx + dy * dy).sqrt() * torch.sign(y * ex - x * ey)


def _ring(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return ((x * x + y * y).sqrt() - 0.74 * r).abs() - 0.24 * r


def _cross(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    upright, level = torch.maximum(x - 0.30 * r, y - 0.95 * r), torch.maximum(x - 0.95 * r, y - 0.30 * r)
    return torch.minimum(upright, level)


DISTANCES: tuple[Callable[[Tensor, Tensor, Tensor], Tensor], ...] = (
    _circle,
    _square,
    _triangle,
    _star,
    _ring,
    _cross,
)


def grid(image_size: int) -> Tensor:
    """(2 * image_size,) coordinates of the 2x2 points of each pixel along an axis."""
    return (torch.arange(2 * image_size) + 0.5) / image_size - 1


def covered(distance: Tensor, image_size: int) -> Tensor:
    """Signed distances at the points of a grid to the share that is inside, 0 .. 1."""
    return (0.5 - distance * image_size).clamp_(0, 1)


def coverage_of(shape: int, x: Tensor, y: Tensor, radius: Tensor, image_size: int) -> Tensor:
    """(N, Hp, Wp): mean coverage of pixels by a shape.

    Args:
        x, y: (N, 2 Wp) and (N, 2 Hp), points of the grid seen from the centre.
        radius: (N,).
    """
    distance = DISTANCES[shape](x[:, None, :], y[:, :, None], radius[:, None, None])
    return F.avg_pool2d(covered(distance, image_size)[:, None], 2)[:, 0]


def coverage_map(scenes: Scenes, image_size: int) -> Tensor:
    """(N, S, S) float32: share of each pixel that the object covers."""
    points, out = grid(image_size).to(scenes.cx.device), scenes.cx.new_empty(len(scenes), image_size, image_size)
    radius = RADII.to(points.device)[scenes.size]
    for shape in range(len(SHAPES)):
        for rows in (scenes.shape == shape).nonzero()[:, 0].split(max(1, PIXELS_AT_ONCE // image_size**2)):
            x, y = points - scenes.cx[rows, None], points - scenes.cy[rows, None]
            out[rows] = coverage_of(shape, x, y, radius[rows], image_size)
    return out


def stripe_map(cy: Tensor, image_size: int) -> Tensor:
    """(N, S) float32: share of each row of pixels that is white in striped objects centred at cy (N,)."""
    y = (grid(image_size).to(cy.device) - cy[:, None]) / PERIOD
    distance = ((y - y.floor() - 0.5).abs() - 0.25) * PERIOD
    return covered(distance, image_size).unflatten(1, (image_size, 2)).mean(2)


# ---- pictures ------------------------------------------------------------------------------------------------------


def render(scenes: Scenes, image_size: int) -> Tensor:
    """(N, 3, S, S) float32 in [-1, 1]: ground (1 - a) + colour (a - s) + white s, a = coverage, s = a * stripe."""
    device = scenes.cx.device
    ground = 2 * GROUND_RGB.to(device)[scenes.ground][:, :, None, None] - 1  # (N, 3, 1, 1)
    colour = 2 * COLOUR_RGB.to(device)[scenes.colour][:, :, None, None] - 1
    stripe = stripe_map(scenes.cy, image_size) * scenes.fill[:, None]  # (N, S)
    paint = torch.lerp(colour, torch.ones_like(colour), stripe[:, None, :, None])  # (N, 3, S, 1)
    return torch.addcmul(ground, coverage_map(scenes, image_size)[:, None], paint - ground)  # (N, 3, S, S)


def label_map(scenes: Scenes, image_size: int) -> Tensor:
    """(N, 3, S, S) float32, three flat planes in [-1, 1]: the ground's number 0 .. 3, the colour's 1 .. 6 inside
    the object and 0 outside, and 1 inside white stripes. It determines the scene."""
    inside = coverage_map(scenes, image_size) >= 0.5
    ground = scenes.ground[:, None, None].expand_as(inside) / (len(GROUNDS) - 1)
    colour = inside * (scenes.colour + 1)[:, None, None] / len(COLOURS)
    stripe = (stripe_map(scenes.cy, image_size) * scenes.fill[:, None] >= 0.5)[:, :, None] & inside
    return 2 * torch.stack([ground, colour, stripe.float()], dim=1) - 1


def box_mask(scenes: Scenes, image_size: int) -> Tensor:
    """(N, 1, S, S) float32 of 0 and 1: the object's bounding box grown by one pixel."""
    inside = coverage_map(scenes, image_size) > 0
    rows, columns = (F.max_pool1d(inside.any(axis).float(), 3, 1, 1) for axis in (2, 1))  # (N, S) each
    ends = [(part.cumsum(1) > 0) & (part.flip(1).cumsum(1).flip(1) > 0) for part in (rows, columns)]
    return (ends[0][:, :, None] & ends[1][:, None, :])[:, None].float()


def stroke_mask(seed: int, indices: Sequence[int] | Tensor, split: Split, image_size: int) -> Tensor:
    """(N, 1, S, S) float32 of 0 and 1: free-form masks that cover 30 to 70 % of the object's pixels, which are those
    that it covers by half at least.

    A brush is led through two to five points about the object, and is as wide as the share that it is to cover asks
    for: half as wide as that share of the object's pixels lies from its way. A pure function of (seed, index, split).
    """
    numbers, here = _numbers(indices, split), scenes(seed, indices, split)
    u = torch.stack([uniform(seed, numbers, 300 + k) for k in (*range(11), 12)], dim=1).float()  # (N, 12)
    centre, radius = torch.stack([here.cx, here.cy], dim=1), RADII[here.size]
    points = centre[:, None] + radius[:, None, None] * (2 * u[:, :10].view(-1, 5, 2) - 1)
    n_points, share = 2 + (4 * u[:, 11]).long(), LEAST_HIDDEN + (MOST_HIDDEN - LEAST_HIDDEN) * u[:, 10]
    last = points[torch.arange(len(points)), n_points - 1]
    points = torch.where((torch.arange(5) < n_points[:, None])[..., None], points, last[:, None])
    mask = torch.empty(len(numbers), image_size, image_size)
    for rows in torch.arange(len(numbers)).split(max(1, PIXELS_AT_ONCE // image_size**2)):
        inside = coverage_map(here[rows], image_size) >= 0.5
        ways = [squared_distances(*points[rows, k : k + 2].unbind(1), image_size) for k in range(points.shape[1] - 1)]
        off = torch.stack(ways).amin(0)
        mask[rows] = (off < reach_of_share(off, inside, share[rows])[:, None, None]).float()
    return mask[:, None]


def reach_of_share(distances: Tensor, inside: Tensor, share: Tensor) -> Tensor:
    """(N,): the distance below which that share (N,) of the pixels inside (N, S, S) lies, as near as whole pixels come
    without leaving LEAST_HIDDEN to MOST_HIDDEN."""
    n = inside.flatten(1).sum(1)
    fewest, most = (LEAST_HIDDEN * n).ceil().long(), (MOST_HIDDEN * n).floor().long()
    count = (share * n).round().long().clamp(min=fewest, max=most)
    ordered = distances.masked_fill(~inside, math.inf).flatten(1).sort(dim=1).values
    return ordered.gather(1, torch.stack([count - 1, count], dim=1)).mean(1)


def mask_kinds(seed: int, indices: Sequence[int] | Tensor, split: Split) -> Tensor:
    """(N,) int64: which of MASK_KINDS `masks` gives, either in half of the scenes."""
    return (uniform(seed, _numbers(indices, split), 311) >= 0.5).long()


def masks(seed: int, indices: Sequence[int] | Tensor, split: Split, image_size: int) -> Tensor:
    """(N, 1, S, S) float32 of 0 and 1, 1 = to fill: `box_mask` or `stroke_mask`, as `mask_kinds` says."""
    boxes = box_mask(scenes(seed, indices, split), image_size)
    strokes = mask_kinds(seed, indices, split)[:, None, None, None] == MASK_KINDS.index("stroke")
    return torch.where(strokes, stroke_mask(seed, indices, split, image_size), boxes)


def low_resolution(images: Tensor, scale_factor: int) -> Tensor:
    """(N, 3, S / factor, S / factor) in [-1, 1]: antialiased bicubic reduction of images (N, 3, S, S)."""
    size = images.shape[-1] // scale_factor
    return F.interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp(-1, 1)
