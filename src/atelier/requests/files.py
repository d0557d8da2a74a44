"""Images of a user's files: found, named, opened, and made in parts where they are large."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from atelier.core.errors import UserError
from atelier.data.base import DataModule
from atelier.data.finding import GRID, Listing, found_under, images_among, passed_over, tell
from atelier.data.reading import SUFFIXES, BadImage, decode, unwarned

TILE = 256  # pixels of the source a side; what is larger is made in parts where the net allows it
MAX_PIXELS = 64_000_000
LONGEST_NAME = 255  # bytes, of most file systems
LEAST = 8  # pixels a side: nets that halve twice keep more than one place, which their norms need
Source = tuple[str, Path]  # the name under which a result is written, and the file that it is of


def sources(source: str, out: Path | None) -> list[Source]:
    """The image files of a request: one, or all in a folder, of which one line says what else lies there.

    Args:
        source: file or folder.
        out: folder that results are written to; None: none are.

    Raises:
        UserError: there is none, or results would come among the sources.
    """
    path = Path(source).expanduser()
    if out is not None and path.exists() and _among(out.resolve(), path.resolve()):
        raise UserError("out", out, "results would come among the sources", "out=ANOTHER_FOLDER")
    if path.is_file():
        return [(result_names([path.name])[0], path)]
    listing = listed(path, "source") if path.is_dir() else Listing([], Counter())
    found = images_among(listing.files)
    if not found:
        problem = (
            f"no image file ({' '.join(SUFFIXES)}) is there" if path.exists() else "there is no such file or folder"
        )
        raise UserError("source", source, problem, "source=FILE_OR_FOLDER")
    if others := passed_over(listing):
        tell(str(path), f"left out are {', '.join(others)}")
    return [(result, path / name) for result, name in zip(result_names(found), found, strict=True)]


def _among(out: Path, source: Path) -> bool:
    return out.is_relative_to(source) if source.is_dir() else out == source.parent


def listed(path: Path, key: str) -> Listing:
    """What lies in a folder that an option names. Raises UserError, of that option, where it cannot be read."""
    try:
        return found_under(path)
    except UserError as error:
        raise UserError(key, error.value, error.problem, error.fix.replace("data.root", key)) from error


def result_names(names: list[str]) -> list[str]:
    """Under which name what becomes of each file is written: its own, with its suffix where the rest is not its alone.

    A name that is too long with both suffixes is a hash.
    """
    stems = [str(Path(name).with_suffix("")) for name in names]
    folders = {str(folder) for name in names for folder in Path(name).parents}
    taken = {*names, *(folder.removesuffix(".png") for folder in folders), GRID.removesuffix(".png")}
    times = Counter(stems)
    results = [
        stem if times[stem] == 1 and stem not in taken else name for stem, name in zip(stems, names, strict=True)
    ]
    return [f"{result if _fits(result) else _hash(result)}.png" for result in results]


def _fits(name: str) -> bool:
    return len(os.fsencode(os.path.basename(name))) + len(".png") <= LONGEST_NAME


def _hash(name: str) -> str:
    return os.path.join(os.path.dirname(name), hashlib.sha256(os.fsencode(name)).hexdigest()[:16])


def opened(path: Path, data: DataModule) -> Image.Image:
    """An image file as the set's own are read, of its own size.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with unwarned():
            return decode(path, data.image_channels, getattr(data, "background", "white"), MAX_PIXELS)
    except BadImage as error:
        raise UserError("source", path, str(error), "another file, or a folder without it") from error


def tiled(
    whole: Callable[[Tensor], Tensor], x: Tensor, receptive_radius: int | None, size_divisor: int, scale_factor: int
) -> Tensor:
    """whole(x) for an image (1, C, H, W) of any size, (1, C, scale_factor H, scale_factor W); in parts if it is large.

    Parts reach as far over their edges as the net sees, so they are those of the whole image.

    Args:
        whole: map from an image to what the net makes of it, `scale_factor` times as wide.
        receptive_radius: pixels around its own place that a pixel of the result depends on; None: all, so no parts.
        size_divisor: number that the places of the parts divide by.
        scale_factor: width of a result in widths of its source.
    """
    height, width = x.shape[2:]
    if receptive_radius is None or max(height, width) <= TILE:
        return whole(x)
    step, edge = -(-TILE // size_divisor) * size_divisor, -(-receptive_radius // size_divisor) * size_divisor
    rows = []
    for top in range(0, height, step):
        row = []
        for left in range(0, width, step):
            y, x0 = max(0, top - edge), max(0, left - edge)
            part = whole(x[:, :, y : top + step + edge, x0 : left + step + edge])
            part = part[:, :, scale_factor * (top - y) :, scale_factor * (left - x0) :]
            row.append(part[:, :, : scale_factor * min(step, height - top), : scale_factor * min(step, width - left)])
        rows.append(torch.cat(row, dim=3))
    return torch.cat(rows, dim=2)


def continued(x: Tensor, size_divisor: int) -> Tensor:
    """Sides that do not divide by `size_divisor`, or are shorter than `LEAST`, are continued by their last pixels."""
    height, width = x.shape[2:]
    right, below = (-(-max(side, LEAST) // size_divisor) * size_divisor - side for side in (width, height))
    return F.pad(x, (0, right, 0, below), mode="replicate")
