"""Pictures as files: PNGs, grids, animations."""

from __future__ import annotations

import math
from pathlib import Path

from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid


def save_png(image: Tensor, path: str | Path) -> None:
    """Write one image, (C, H, W) uint8 with C = 1 or 3."""
    _pillow(image).save(path, format="PNG")


def grid(images: Tensor, columns: int | None = None, padding: int = 2, cell: int = 64) -> Tensor:
    """One picture of many.

    Args:
        images: (N, C, H, W) uint8.
        columns: pictures in a row; None makes a square.
        padding: pixels of black between two pictures.
        cell: images narrower than this are enlarged by a whole factor, pixels repeated (16 px become 64).

    Returns:
        (3, H', W') uint8.
    """
    factor = max(1, cell // images.shape[-1])
    large = images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    return make_grid(large.cpu(), nrow=columns or math.ceil(math.sqrt(len(images))), padding=padding)


def save_gif(frames: Tensor, path: str | Path, milliseconds: int = 80) -> None:
    """Write an endless animation of (T, C, H, W) uint8 frames, each shown for so long."""
    first, *rest = [_pillow(frame) for frame in frames]
    first.save(path, format="GIF", save_all=True, append_images=rest, duration=milliseconds, loop=0)


def _pillow(image: Tensor) -> Image.Image:
    levels = image.cpu()
    return Image.fromarray((levels[0] if len(levels) == 1 else levels.permute(1, 2, 0)).contiguous().numpy())
