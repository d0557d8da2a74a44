"""The two ends of an image's way: 8-bit grey levels in a file or a set, float32 in [-1, 1] everywhere between."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def to_float(levels: Tensor) -> Tensor:
    """Grey levels 0 .. 255 to [-1, 1]: 0 is -1, 255 is 1."""
    return levels.float() / 127.5 - 1


def looked_up(levels: Tensor) -> Tensor:
    """`to_float` of uint8 on any device, the same to the bit: a GPU divides by a constant by multiplying."""
    return _table(levels.device).index_select(0, levels.flatten().int()).view(levels.shape)


@cache
def _table(device: torch.device) -> Tensor:
    return to_float(torch.arange(256)).to(device)


def to_uint8(x: Tensor) -> Tensor:
    """Grey levels of images in [-1, 1], any shape: floor(clamp(127.5 x + 128, 0, 255)).

    The inverse of `to_float` for each of the 256 levels, in float32. Beyond [-1, 1] it saturates; NaN becomes 0.
    """
    return torch.nan_to_num(x.float() * 127.5 + 128, nan=0.0).clamp(0, 255).to(torch.uint8)  # which floors
