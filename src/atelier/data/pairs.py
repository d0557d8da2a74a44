"""Sets of pairs, an image and the `source` that it is to be made from: `pairs` of files, `edges` of any images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from atelier.core.batch import Batch
from atelier.core.errors import UserError
from atelier.core.ranges import NonNegInt, PositiveFloat, PositiveInt
from atelier.data.base import Role, Split
from atelier.data.file_images import Views
from atelier.data.finding import Item, printable
from atelier.data.folders import ImageFiles, any_images
from atelier.data.layouts import Sides, matched, side_folders
from atelier.data.published import GREY
from atelier.data.reading import Background, BadImage, check, decode, pixels, read, square, upright_size

Direction = Literal["a2b", "b2a"]
SIGMA, THRESHOLD = 1.0, 0.03  # of edges: those of conf/data/edges.yaml


class PairImages:
    """Images with their sources, cut and mirrored together.

    Args:
        views: images that both are made of.
        apart: (B, C', S, S) to `image` and `source`.
        fingerprint: text that tells this set from another.
    """

    def __init__(self, views: Views, apart: Callable[[Tensor], tuple[Tensor, Tensor]], fingerprint: str) -> None:
        self.views, self.apart, self.fingerprint, self.labels = views, apart, fingerprint, None

    def __len__(self) -> int:
        return len(self.views)

    def read(self, indices: list[int], rngs: list[torch.Generator] | None) -> Batch:
        image, source = self.apart(self.views.draw(indices, rngs))
        return {"image": image, "source": source, "index": torch.tensor(indices)}


@dataclass(kw_only=True, eq=False)
class Pairs(ImageFiles):
    """Pairs of images, in the layouts of Pix2Pix (Isola, Zhu, Zhou, Efros 2017).

    One file for a pair, A at the left of B, each half of its width, in <root>/train and <root>/test, or all under
    <root> with a share held out (`holdout`). Or two folders with the same file names, suffixes aside: <root>/trainA
    beside trainB, with testA and testB; <root>/A beside B, perhaps with train/ and test/ in both; or train/A beside
    train/B. What else these may be called (input and target, val): data/layouts.py. A UserError names a file without
    its partner, or whose partner has other proportions.

    Args:
        direction: "a2b" makes B of A, which then is `source`; "b2a" makes A of B.
        jitter: training pairs are read so many pixels larger, and both are cut at the same random place.
    """

    direction: Direction
    jitter: NonNegInt = field(metadata={"role": Role.NOT_PIXELS | Role.OWN | Role.DRAWN})

    provides: ClassVar[frozenset[str]] = frozenset({"source"})

    @cached_property
    def sides(self) -> dict[Split, Sides] | None:
        """The two folders of each split; None where a pair is one file."""
        return side_folders(self.root)

    def layout(self) -> dict[Split, list[Item]]:
        if self.sides is None:
            return any_images(self.root, "rename the folder of the sources A, the other B", any_two=True)
        return {split: partners(self.root, *sides) for split, sides in self.sides.items()}

    def look(self) -> Callable[[Path, int], str]:
        return check if self.sides else check_halves

    def images(self, split: Split) -> PairImages:
        root, items = Path(self.root), self.index[split]
        self._refuse_other_proportions(items)
        both = {root / item.name: root / item.partner for item in items}
        reader = self.reader(partial(read_two, partners=both) if self.sides else read_halves)
        views = self.views(split, list(both), self.jitter, reader, pictures=2)
        return PairImages(views, partial(apart, direction=self.direction), self.files_fingerprint(split))

    def _refuse_other_proportions(self, items: list[Item]) -> None:
        sizes = {item: [upright_size(Path(self.root, name)) for name in item.names] for item in items if item.partner}
        other = [item for item, (a, b) in sizes.items() if not alike(a, b)]
        if other:
            first = " and ".join(
                f"{printable(name)} ({w} x {h})" for name, (w, h) in zip(other[0].names, sizes[other[0]], strict=True)
            )
            problem = f"{len(other)} of {len(items)} pairs differ in proportions, first {first}"
            raise UserError("data.root", printable(self.root), problem, "pairs that show the same part")


@dataclass(kw_only=True, eq=False)
class Edges(ImageFiles):
    """Any folder of images (as `ImageFolder`), each with its edges as `source`: see `edge_map`.

    Args:
        jitter: training images are read so many pixels larger and cut at a random place.
        sigma: width of the blur before edges are looked for, in pixels of the image that is made.
        threshold: least change of luma (0 .. 1) a pixel that is an edge.
    """

    jitter: NonNegInt = field(metadata={"role": Role.NOT_PIXELS | Role.OWN | Role.DRAWN})
    sigma: PositiveFloat
    threshold: PositiveFloat

    provides: ClassVar[frozenset[str]] = frozenset({"source"})

    def layout(self) -> dict[Split, list[Item]]:
        return any_images(self.root)

    def images(self, split: Split) -> PairImages:
        views = self.views(split, [Path(self.root, item.name) for item in self.index[split]], self.jitter)
        drawn = partial(with_edges, sigma=self.sigma, threshold=self.threshold)
        return PairImages(views, drawn, self.files_fingerprint(split))


# ---- files ----------------------------------------------------------------------------------------------------------


def partners(root: str, a: str, b: str) -> list[Item]:
    """The files of root/a, each with that of the same name in root/b. Raises UserError where one has none."""
    both = matched(root, a, b)
    alone = [one or other for one, other in both if one is None or other is None]
    if alone:
        problem = f"{len(alone)} files have no partner of the same name, first {printable(alone[0])}"
        fix = "add the other side, or remove them"
        if len(alone) == len(both):
            fix = "data=unpaired, or the same names on both sides"
        raise UserError("data.root", printable(root), problem, fix)
    return [Item(one, 0, other) for one, other in both]


def alike(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether two sizes (width, height) are of one shape, but for the rounding of the smaller to whole pixels."""
    (w, h), (large_w, large_h) = sorted((a, b))
    one_scale = w < large_w and h < large_h or (w, h) == (large_w, large_h)
    return one_scale and abs(w * large_h - h * large_w) < max(large_w, large_h)


def check_halves(path: Path, max_pixels: PositiveInt) -> str:
    """Why the file cannot be read as two halves, after decoding it whole; "" where it can."""
    try:
        width = decode(path, 3, "white", max_pixels).width
    except BadImage as error:
        return str(error)
    return f"{width} pixels wide: no two halves" if width % 2 else ""


def read_halves(
    path: Path, size: PositiveInt, channels: Literal[1, 3], background: Background, max_pixels: PositiveInt
) -> Tensor:
    """The left and the right half of a file, each squared and resized, (2 * channels, size, size) uint8."""
    whole = decode(path, channels, background, max_pixels)
    middle = whole.width // 2
    halves = ((0, 0, middle, whole.height), (middle, 0, whole.width, whole.height))
    return torch.cat([pixels(square(whole, size, half)) for half in halves])


def read_two(
    path: Path,
    size: PositiveInt,
    channels: Literal[1, 3],
    background: Background,
    max_pixels: PositiveInt,
    partners: dict[Path, Path],
) -> Tensor:
    """A file and its partner, each squared and resized, (2 * channels, size, size) uint8."""
    return torch.cat([read(side, size, channels, background, max_pixels) for side in (path, partners[path])])


def apart(both: Tensor, direction: Direction) -> tuple[Tensor, Tensor]:
    """A and B, (B, 2 C, S, S), to `image` and `source`, (B, C, S, S) each."""
    a, b = (side.contiguous() for side in both.chunk(2, dim=1))
    return (b, a) if direction == "a2b" else (a, b)


# ---- edges ----------------------------------------------------------------------------------------------------------


def with_edges(images: Tensor, sigma: float, threshold: float) -> tuple[Tensor, Tensor]:
    """Images (B, C, S, S), and their edges in as many equal channels."""
    return images, edge_map(images, sigma, threshold).expand_as(images).contiguous()


def edge_map(images: Tensor, sigma: float, threshold: float) -> Tensor:
    """Black lines (-1), about a pixel wide, on white (1), where the luma of images (B, C, H, W) in [-1, 1] changes.

    (B, 1, H, W). After Canny 1986 with one threshold: blur, take the gradient by Sobel's operator, and keep the
    pixels where it is greater than `threshold` and than at the two neighbours along it (to 45 degrees). The border
    of the image is no edge. Sums in a fixed order, so that a map depends on its image alone, to the last bit.
    """
    light = images if images.shape[1] == 1 else sum(w * c for w, c in zip(GREY, images.split(1, dim=1), strict=True))
    gauss = [math.exp(-(k**2) / (2 * sigma**2)) for k in range(math.ceil(3 * sigma) + 1)]
    whole = gauss[0] + 2 * sum(gauss[1:])
    gauss = [weight / whole for weight in gauss]
    light = _weighed(_weighed((light + 1) / 2, gauss, -1), gauss, -2)
    across = _difference(_weighed(light, [0.5, 0.25], -2), -1)
    down = _difference(_weighed(light, [0.5, 0.25], -1), -2)
    steep = (across.square() + down.square()).sqrt()
    return torch.where((steep > threshold) & _crest(steep, across, down), -1.0, 1.0)


def _beside(x: Tensor, dim: int, k: int) -> Tensor:
    """The value k pixels further along `dim`, that of the border beyond it."""
    n = x.shape[dim]
    return x.index_select(dim, (torch.arange(n) + k).clamp(0, n - 1))


def _weighed(x: Tensor, weights: list[float], dim: int) -> Tensor:
    """Symmetric weights along `dim`, the middle one first."""
    total = weights[0] * x
    for k, weight in enumerate(weights[1:], 1):
        total = total + weight * (_beside(x, dim, k) + _beside(x, dim, -k))
    return total


def _difference(x: Tensor, dim: int) -> Tensor:
    return (_beside(x, dim, 1) - _beside(x, dim, -1)) / 2


def _crest(steep: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """Where steepness (B, 1, H, W) is not less than ahead along the gradient and greater than behind."""
    flat, upright = (a.abs() <= math.tan(math.pi / 8) * b.abs() for a, b in ((down, across), (across, down)))
    rising = across * down > 0
    around = pad(steep, (1, 1, 1, 1))
    h, w = steep.shape[-2:]
    kept = torch.zeros_like(steep, dtype=torch.bool)
    ways = (
        (flat, 0, 1),
        (upright & ~flat, 1, 0),
        (~flat & ~upright & rising, 1, 1),
        (~flat & ~upright & ~rising, -1, 1),
    )
    for here, dy, dx in ways:
        ahead, behind = (around[..., 1 + y : 1 + y + h, 1 + x : 1 + x + w] for y, x in ((dy, dx), (-dy, -dx)))
        kept |= here & (steep >= ahead) & (steep > behind)
    return kept
