"""Pictures as files: PNGs, grids, animations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import make_grid

REQUESTED = "request"  # name of the text in a picture that says what it was asked for
LINE = 14  # pixels of height that a line of words has


def save_png(image: Tensor, path: str | Path, texts: Mapping[str, str] | None = None) -> None:
    """Write one image, (C, H, W) uint8 with C = 1 or 3, and texts by name, which are chunks of the file (iTXt)."""
    chunks = PngInfo()
    for name, text in (texts or {}).items():
        chunks.add_itxt(name, text)
    _pillow(image).save(path, format="PNG", pnginfo=chunks)


def png_texts(path: str | Path) -> dict[str, str]:
    """The texts in a picture by name; none where it is no PNG.

    Raises:
        OSError: it is no picture, or cannot be read.
    """
    with Image.open(path) as picture:
        return {name: str(text) for name, text in getattr(picture, "text", {}).items()}


def grid(
    images: Tensor, columns: int | None = None, padding: int = 2, cell: int = 64, words: Sequence[str] = ()
) -> Tensor:
    """One picture of many.

    Args:
        images: (N, C, H, W) uint8.
        columns: pictures in a row; None makes a square.
        padding: pixels of black between two pictures.
        cell: images narrower than this are enlarged by a whole factor, pixels repeated (16 px become 64).
        words: text below each picture, in two lines where it is wider than that; none: no room is left for it.

    Returns:
        (3, H', W') uint8.
    """
    factor = max(1, cell // images.shape[-1])
    large = images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    if not words:
        return make_grid(large.cpu(), nrow=columns, padding=padding)
    height, width = large.shape[2:]
    padding = padding if len(images) > 1 else 0  # a picture alone gets none
    told = [_lines(word, width) for word in words]
    room = LINE * max(map(len, told))
    canvas = _pillow(make_grid(F.pad(large.cpu(), (0, 0, 0, room)), nrow=columns, padding=padding))
    pen = ImageDraw.Draw(canvas)
    for k, lines in enumerate(told):
        row, column = divmod(k, columns)
        x, y = padding + column * (width + padding), padding + row * (height + room + padding) + height
        for j, line in enumerate(lines):
            pen.text((x, y + j * LINE), line, fill=(255, 255, 255))
    return pil_to_tensor(canvas)


def _lines(text: str, width: int) -> list[str]:
    """A text in two lines at most of so many pixels; what they do not hold is cut."""
    pen, words = ImageDraw.Draw(Image.new("L", (1, 1))), text.split()
    held = [k for k in range(1, len(words) + 1) if pen.textlength(" ".join(words[:k])) <= width]
    k = max(held, default=1)
    return [_cut(" ".join(part), pen, width) for part in (words[:k], words[k:]) if part] or [""]


def _cut(word: str, pen: ImageDraw.ImageDraw, width: int) -> str:
    """As much of a line as so many pixels hold."""
    if pen.textlength(word) <= width:
        return word
    return next((cut for k in range(len(word), 0, -1) if pen.textlength(cut := f"{word[:k]}..") <= width), "")


def beside(images: list[Tensor]) -> Tensor:
    """Pictures of several kinds in turn: the first of each kind, the second of each, ...

    Args:
        images: (N, C, H, W) uint8 each, C = 1 or 3; those smaller than the largest are enlarged by a whole factor,
            grey ones become RGB where others are.

    Returns:
        (N * len(images), C, H, W) uint8.
    """
    width, channels = max(x.shape[-1] for x in images), max(x.shape[1] for x in images)
    factors = [width // x.shape[-1] for x in images]
    large = [x.repeat_interleave(f, -1).repeat_interleave(f, -2) for x, f in zip(images, factors, strict=True)]
    return rearrange([x.expand(-1, channels, -1, -1).cpu() for x in large], "kinds n c h w -> (n kinds) c h w")


def labelled(rows: list[tuple[str, Tensor]], margin: int = 64, padding: int = 2) -> Tensor:
    """One picture of rows, each with a word on its left.

    Args:
        rows: word and images (N, 3, H, W) uint8, N and H, W the same in all.
        margin: pixels that words have.
        padding: pixels of black around images.

    Returns:
        (3, H', W') uint8.
    """
    images = torch.cat([images for _, images in rows])
    whole = make_grid(images.cpu(), nrow=len(rows[0][1]), padding=padding)
    canvas = _pillow(F.pad(whole, (margin, 0, 0, 0)))
    height, pen = images.shape[2] + padding, ImageDraw.Draw(canvas)
    for k, (word, _) in enumerate(rows):
        pen.text((4, padding + k * height + height // 2), word, fill=(255, 255, 255), anchor="lm")
    return pil_to_tensor(canvas)


def shrunk(images: Tensor, side: int) -> Tensor:
    """Images (N, C, H, W) uint8, those with a side longer than `side` made as small as that."""
    factor = side / max(images.shape[2:])
    if factor >= 1:
        return images
    size = [max(1, round(n * factor)) for n in images.shape[2:]]
    return F.interpolate(images.float(), size=size, mode="bilinear", antialias=True).round().to(torch.uint8)


def framed(images: Tensor, side: int) -> Tensor:
    """Images (N, C, H, W) uint8 in the middle of black squares (N, 3, side, side)."""
    height, width = images.shape[2:]
    top, left = (side - height) // 2, (side - width) // 2
    return F.pad(images.expand(-1, 3, -1, -1), (left, side - width - left, top, side - height - top))


def save_gif(frames: Tensor, path: str | Path, milliseconds: int = 80) -> None:
    """Write an endless animation of (T, C, H, W) uint8 frames, each shown for so long."""
    first, *rest = [_pillow(frame) for frame in frames]
    first.save(path, format="GIF", save_all=True, append_images=rest, duration=milliseconds, loop=0)


def _pillow(image: Tensor) -> Image.Image:
    levels = image.cpu()
    return Image.fromarray((levels[0] if len(levels) == 1 else levels.permute(1, 2, 0)).contiguous().numpy())
