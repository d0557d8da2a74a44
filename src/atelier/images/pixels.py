"""The two ends of an image's way: 8-bit grey levels in a file or a set, float32 in [-1, 1] everywhere between."""

from __future__ import annotations

import torch
from torch import Tensor


def to_float(levels: Tensor) -> Tensor:
    """Grey levels 0 .. 255 to [-1, 1]: 0 is -1, 255 is 1."""
    return levels.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Grey levels of images in [-1, 1], any shape: floor(clamp(127.5 x + 128, 0, 255)).

    The inverse of `to_float` for each of the 256 levels, in float32. Beyond [-1, 1] it saturates; NaN becomes 0.
    """
    return torch.nan_to_num(x.float() * 127.5 + 128, nan=0.0).clamp(0, 255).to(torch.uint8)  # which floors
