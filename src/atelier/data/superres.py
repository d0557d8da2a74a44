"""Images and themselves made smaller, for super-resolution: any folder of images, or two folders of the same ones."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor

from atelier.core.batch import Batch
from atelier.core.errors import UserError
from atelier.core.ranges import PositiveInt
from atelier.data.base import Role, Split, with_floats
from atelier.data.file_images import decoded
from atelier.data.finding import Item, files_of, printable, subfolders, tell
from atelier.data.folders import ImageFiles, any_images
from atelier.data.layouts import LARGE, SMALL, matched, side_folders
from atelier.data.reading import Background, decode, pixels, upright_size
from atelier.images.bicubic import reduced
from atelier.images.pixels import to_float, to_uint8

DIV2K = {"train": "train", "test": "valid"}  # what its folders call the splits
SRF = re.compile(r"_SRF_([234])_HR(?=\.\w+$)")  # the end of a name in image_SRF_2/ to image_SRF_4/


@dataclass(kw_only=True, eq=False)
class SuperRes(ImageFiles):
    """`image`: a square of `image_size` px cut out of a file; `source`: the same square `scale_factor` times smaller.

    The place is random in training and the middle at test. A source is the MATLAB bicubic reduction of the square
    (`atelier.images.bicubic`), rounded to 8 bits as in a file; or, where there are HR/ and LR/ with files of the same
    names, it is cut out of that in LR/, which must be `scale_factor` times smaller, but for rounding to whole pixels,
    of which one line tells. Layouts: <root>/train/ beside test/, or <root>/ with a share held out; HR/ and LR/ lie in
    each of these, or each of these in them (what else they may be called: data/layouts.py), in LR/ perhaps X4/ with
    names that end in x4. As they are published:
    DIV2K (Agustsson & Timofte 2017), DIV2K_train_HR/ beside DIV2K_valid_HR/ with the sources
    DIV2K_train_LR_bicubic/X4/0001x4.png where they are; Set5, Set14, BSD100 and Urban100 as Huang, Singh and Ahuja
    2015 give them away, image_SRF_4/img_001_SRF_4_HR.png beside _LR.png. The search of files, and what is kept in
    memory: as in `ImageFiles`, but files are kept as large as they are.

    Args:
        scale_factor: width of an image in widths of its source; `image_size` is a multiple of it.
        resize: length in px that the shorter side of each file is first brought to (antialiased bicubic; a smaller one
            is enlarged); None: files stay as they are.
        turn: turns of training squares by 0 to 3 quarters.

    Files smaller than `image_size`, and pairs that do not fit, are refused at the start with their names.
    """

    scale_factor: Literal[2, 3, 4]
    resize: PositiveInt | None
    turn: bool = field(metadata={"role": Role.OWN | Role.DRAWN})

    provides: ClassVar[frozenset[str]] = frozenset({"source"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size % self.scale_factor:
            fix = f"data.image_size={max(1, self.image_size // self.scale_factor) * self.scale_factor}"
            raise UserError(
                "data.image_size", self.image_size, f"no multiple of data.scale_factor={self.scale_factor}", fix
            )
        if self.resize is not None and self.resize < self.image_size:
            problem = f"squares of {self.image_size} px are cut out"
            raise UserError("data.resize", self.resize, problem, f"data.resize={self.image_size}")

    def layout(self) -> dict[Split, list[Item]]:
        parts = {split: part for split, part in DIV2K.items() if Path(self.root, f"DIV2K_{part}_HR").is_dir()}
        if parts:
            files = {split: self._div2k(part) for split, part in parts.items()}
            return files if len(files) == 2 else {"train": next(iter(files.values()))}
        also = tuple(f"{word}x{self.scale_factor}" for word in ("", "lr", "lrbicubic"))
        found = side_folders(self.root, ((*SMALL, *also), LARGE))
        if found:
            return {split: self._pairs(large, small) for split, (small, large) in found.items()}
        return any_images(self.root, "rename the folder of the sources LR, the other HR", items_of=self._files)

    def _div2k(self, part: str) -> list[Item]:
        """All images of a part of DIV2K; with their sources where there are any."""
        large, small = f"DIV2K_{part}_HR", f"DIV2K_{part}_LR_bicubic"
        there = Path(self.root, small, f"X{self.scale_factor}").is_dir()
        return self._pairs(large, small) if there else list(map(Item, files_of(self.root, large)))

    def _pairs(self, large: str, small: str) -> list[Item]:
        """The files of a folder with those that it has in another, or in the part of that made for this factor."""
        inside = f"x{self.scale_factor}"
        small = next((os.path.join(small, n) for n in subfolders(Path(self.root, small)) if n.lower() == inside), small)
        return self._paired(matched(self.root, small, large, inside), large, small)

    def _files(self, folder: str) -> list[Item]:
        """All images under a folder; with their sources where their names say which they are (Set5 and others)."""
        names = files_of(self.root, folder)
        factors = {name: int(end[1]) for name in names if (end := SRF.search(name))}
        if not factors:
            return list(map(Item, names))
        large = [name for name, factor in factors.items() if factor == self.scale_factor]
        if not large:
            made = ", ".join(map(str, sorted(set(factors.values()))))
            problem = f"the images of {printable(self.root)} are made for {made}"
            raise UserError(
                "data.scale_factor", self.scale_factor, problem, f"data.scale_factor={min(factors.values())}"
            )
        sources = (SRF.sub(f"_SRF_{self.scale_factor}_LR", name) for name in large)
        there = set(names)
        both = [(name if name in there else None, one) for name, one in zip(sources, large, strict=True)]
        return self._paired(both, "*_HR", "*_LR")

    def _paired(self, both: list[tuple[str | None, str | None]], large: str, small: str) -> list[Item]:
        """Sources and images as items; a source without its image belongs to nothing."""
        missing = [name for source, name in both if name and source is None]
        if missing:
            n = sum(name is not None for _, name in both)
            problem = f"{len(missing)} of {n} files of {printable(large)}/ have none in {printable(small)}/"
            fix = f"the sources of all files of {printable(large)} in {printable(small)}"
            raise self._refused(f"{problem}, first {printable(missing[0])}", fix)
        return [Item(name, partner=source) for source, name in both if name]

    @cached_property
    def sides(self) -> dict[str, tuple[int, int]]:
        """Width and height of each readable file, as it is cut from.

        Raises:
            UserError: one is too small, or a pair does not fit.
        """
        items = {item for items in self.index.values() for item in items}
        sides = {name: self._sides(name) for item in sorted(items) for name in item.names}
        tiny = [item.name for item in sorted(items) if min(sides[item.name]) < self.image_size]
        if tiny:
            problem = f"{len(tiny)} of {len(items)} images are smaller than {self.image_size} px"
            least = min(min(sides[name]) for name in tiny) // self.scale_factor * self.scale_factor
            fix = f"data.image_size={least}, or remove them" if least else "remove them"
            raise self._refused(f"{problem}, first {_shown(tiny[0], sides[tiny[0]])}", fix)
        self._refuse_or_tell_rounded([item for item in sorted(items) if item.partner], sides)
        return sides

    def _refuse_or_tell_rounded(self, pairs: list[Item], sides: dict[str, tuple[int, int]]) -> None:
        """Pairs that are not exactly 1 to `scale_factor`: off by less than a pixel of the source, or by more."""
        scale = self.scale_factor
        off = {item: [n - scale * m for n, m in zip(*map(sides.get, item.names), strict=True)] for item in pairs}
        for item, pixels_off in off.items():
            if any(abs(n) >= scale for n in pixels_off):
                large, small = (_shown(name, sides[name]) for name in item.names)
                raise self._refused(
                    f"{large} is not {scale} times {small}", "another data.scale_factor, or other files"
                )
        rounded = [item for item in pairs if any(off[item])]
        if rounded:
            large, small = (_shown(name, sides[name]) for name in rounded[0].names)
            told = f"{len(rounded)} of {len(pairs)} pairs are rounded, first {large} and {small}; both are cut from the"
            told += " top left, so they may be apart by less than a pixel of the source"
            tell(self.root, told)

    def _sides(self, name: str) -> tuple[int, int]:
        return _resized(*upright_size(Path(self.root, name)), self.resize)

    def _refused(self, problem: str, fix: str) -> UserError:
        return UserError("data.root", printable(self.root), problem, fix)

    def images(self, split: Split) -> Squares:
        items = self.index[split]
        if items[0].partner and self.resize is not None:
            raise UserError("data.resize", self.resize, "the sources are files", "data.resize=null")
        n_bytes = sum(width * height for width, height in self.sides.values()) * self.image_channels
        return Squares(
            [Path(self.root, item.name) for item in items],
            [Path(self.root, item.partner) for item in items if item.partner],
            partial(self.reader(_pixels), resize=self.resize),
            self.image_size,
            self.scale_factor,
            self.flip,
            self.turn,
            self.fits(split, n_bytes),
            self.files_fingerprint(split),
        )


class Squares:
    """Squares cut out of image files, and their sources.

    Args:
        paths: one file for each image.
        sources: the files of the sources, as many; none: they are made.
        read_file: path to (C, H, W) uint8; raises BadImage.
        size, scale_factor: side and factor of the squares.
        flip, turn: mirroring of half of them, turns by quarters, when generators are given.
        keep: whether each file stays in memory as uint8 once it has been read.
        fingerprint: text that tells this set from another.
    """

    def __init__(
        self,
        paths: list[Path],
        sources: list[Path],
        read_file: Callable[[Path], Tensor],
        size: int,
        scale_factor: int,
        flip: bool,
        turn: bool,
        keep: bool,
        fingerprint: str,
    ) -> None:
        self.paths, self.sources, self.read_file = paths, sources, read_file
        self.size, self.scale_factor, self.flip, self.turn = size, scale_factor, flip, turn
        self.keep, self.fingerprint, self.labels = keep, fingerprint, None
        self._kept: dict[Path, Tensor] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: list[int], rngs: list[torch.Generator] | None) -> Batch:
        return with_floats(self.levels(indices, rngs), to_float)

    def levels(self, indices: list[int], rngs: list[torch.Generator] | None) -> Batch:
        squares = [self._square(index, rng) for index, rng in zip(indices, rngs or [None] * len(indices), strict=True)]
        image = torch.stack([square[0] for square in squares])
        if self.sources:
            source = torch.stack([square[1] for square in squares])
        else:
            source = to_uint8(reduced(to_float(image), self.scale_factor))
        return {"image": image, "source": source, "index": torch.tensor(indices)}

    def _square(self, index: int, rng: torch.Generator | None) -> list[Tensor]:
        """The square (C, S, S) of an image, and that of its source where it has a file."""
        files = [self.paths[index], *([self.sources[index]] if self.sources else [])]
        pictures = [self._decoded(file) for file in files]
        scale = self.scale_factor if self.sources else 1  # places are those of whole pixels of the source
        side = self.size // scale
        top, left = (_place(n // scale - side, rng) for n in pictures[0].shape[1:])
        cuts = [_cut(p, top * k, left * k, side * k) for p, k in zip(pictures, (scale, 1), strict=False)]
        if rng is not None and self.flip and _drawn(2, rng):
            cuts = [cut.flip(-1) for cut in cuts]
        quarters = _drawn(4, rng) if rng is not None and self.turn else 0
        return [cut.rot90(quarters, (-2, -1)) for cut in cuts]

    def _decoded(self, path: Path) -> Tensor:
        if path in self._kept:
            return self._kept[path]
        picture = decoded(path, self.read_file)
        if self.keep:
            self._kept[path] = picture
        return picture


def _place(room: int, rng: torch.Generator | None) -> int:
    """Where a square begins that has `room` to either side of it: in the middle without a generator."""
    return room // 2 if rng is None else _drawn(room + 1, rng)


def _drawn(n: int, rng: torch.Generator) -> int:
    return int(torch.randint(n, (), generator=rng))


def _cut(picture: Tensor, top: int, left: int, side: int) -> Tensor:
    return picture[:, top : top + side, left : left + side]


def _pixels(path: Path, channels: Literal[1, 3], background: Background, max_pixels: int, resize: int | None) -> Tensor:
    """The file as (channels, H, W) uint8. Raises BadImage."""
    image = decode(path, channels, background, max_pixels)
    if resize is not None:
        image = image.resize(_resized(*image.size, resize), Image.Resampling.BICUBIC)
    return pixels(image)


def _resized(width: int, height: int, resize: int | None) -> tuple[int, int]:
    if resize is None:
        return width, height
    return tuple(max(resize, round(n * resize / min(width, height))) for n in (width, height))


def _shown(name: str, sides: tuple[int, int]) -> str:
    return f"{printable(name)} ({sides[0]} x {sides[1]})"
