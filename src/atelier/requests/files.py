"""Images of a user's files: found, named, opened, and made in parts where they are large."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from atelier.core.errors import UserError
from atelier.data.base import DataModule
from atelier.data.finding import GRID, image_files
from atelier.data.reading import SUFFIXES, BadImage, decode

TILE = 256  # pixels of the source a side; what is larger is made in parts where the net allows it
MAX_PIXELS = 64_000_000
LEAST = 8  # pixels a side: nets that halve twice keep more than one place, which their norms need
Source = tuple[str, Path]  # the name under which a result is written, and the file that it is of


def sources(source: str, out: Path) -> list[Source]:
    """The image files of a request: one, or all in a folder.

    Raises:
        UserError: there is none, or results would come among the sources.
    """
    path = Path(source).expanduser()
    inside = out.resolve().is_relative_to(path.resolve()) if path.is_dir() else out.resolve() == path.parent.resolve()
    if path.exists() and inside:
        raise UserError("out", out, "results would come among the sources", "out=ANOTHER_FOLDER")
    found = [(name, path / name) for name in image_files(path)] if path.is_dir() else []
    if path.is_file():
        found = [(path.name, path)]
    if not found:
        problem = (
            f"no image file ({' '.join(SUFFIXES)}) is there" if path.exists() else "there is no such file or folder"
        )
        raise UserError("source", source, problem, "source=FILE_OR_FOLDER")
    stems = [str(Path(name).with_suffix("")) for name, _ in found]
    times = Counter([*stems, GRID.removesuffix(".png")])  # which is no name for a result
    return [
        (f"{stem if times[stem] == 1 else name}.png", path) for stem, (name, path) in zip(stems, found, strict=True)
    ]


def opened(path: Path, data: DataModule) -> Image.Image:
    """An image file as the set's own are read, of its own size.

    Raises:
        UserError: it cannot be read.
    """
    try:
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
