"""Masks of inpainting: of a word, a file, or a folder with one for each source; true = to be filled."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from atelier.core.errors import UserError
from atelier.core.rng import ImageRngs
from atelier.data.finding import images_among
from atelier.data.reading import BadImage, decode, pixels, square
from atelier.requests.files import MAX_PIXELS, listed

WORDS = ("center", "left", "random")
OBJECT = "object"  # the mask that a set has beside each image
LEAST, MOST = 0.3, 0.6  # sides of a random box, in sides of the image


def drawn(word: str, size: int, rngs: ImageRngs) -> Tensor:
    """Masks (len(rngs), 1, size, size) bool of a word.

    center: a square half as wide as the image; left: the left half; random: a box of each image's own.
    """
    part = (torch.arange(size) + 0.5) / size  # (S,)
    if word == "random":
        sides, place = (rngs.again().rand(2, 2)).unbind(1)  # (B, 2), height and width
        sides = LEAST + (MOST - LEAST) * sides
        start = place * (1 - sides)
        end = start + sides
    else:
        bounds = {"center": ((0.25, 0.25), (0.75, 0.75)), "left": ((0.0, 0.0), (1.0, 0.5))}[word]
        start, end = (torch.tensor(bound).expand(len(rngs), 2) for bound in bounds)
    inside = (part >= start[..., None]) & (part < end[..., None])  # (B, 2, S)
    return (inside[:, 0, :, None] & inside[:, 1, None, :])[:, None]  # (B, 1, S, S)


def read(mask: str, name: str, sides: tuple[int, int], size: int) -> Tensor:
    """The mask (1, 1, size, size) bool of the central square of an image: where its file is white.

    Args:
        mask: file, or folder with a mask of the same name for each image.
        name: path of the image under its folder, as the result is named.
        sides: width and height of the image, which the mask has too.
        size: width of the square after it was resized.

    Raises:
        UserError: there is none, it cannot be read, or it has other sides.
    """
    path = _found(Path(mask).expanduser(), mask, name)
    try:
        image = decode(path, 1, "black", MAX_PIXELS)
    except BadImage as error:
        raise UserError("mask", path, str(error), "another file") from error
    if image.size != sides:
        problem = f"it is {image.width} x {image.height} pixels, the image {sides[0]} x {sides[1]}"
        raise UserError("mask", path, problem, f"a mask of {sides[0]} x {sides[1]}, or mask=center")
    return pixels(square(image, size))[None] >= 128


def _found(path: Path, mask: str, name: str) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError("mask", mask, "there is no such file or folder", f"mask=FILE_OR_FOLDER, or {', '.join(WORDS)}")
    stem = Path(name).with_suffix("")
    for other in images_among(listed(path, "mask").files):
        if other == name or Path(other).with_suffix("") == stem:
            return path / other
    raise UserError("mask", mask, f"no mask named like {name} is there", "a mask for each source, or mask=center")
