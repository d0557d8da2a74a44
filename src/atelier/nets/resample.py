"""Twice or half the size through a short smoothing filter, against aliasing (Karras et al. 2020, StyleGAN2).

The filter is an outer product of `taps`, which are normed to sum 1. B batch, C channels, H, W height, width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class Resample(nn.Module):
    """Common to both ways: the filter, a buffer that is not saved."""

    kernel: Tensor

    def __init__(self, taps: list[int], gain: float) -> None:
        super().__init__()
        line = torch.tensor(taps, dtype=torch.float32)
        self.n = len(taps)
        self.register_buffer("kernel", gain * line.outer(line)[None, None] / line.sum() ** 2, persistent=False)

    def filtered(self, x: Tensor, pad: tuple[int, int], stride: int) -> Tensor:
        """Padded with zeros by pad[0] above and left and pad[1] below and right, correlated, every stride-th kept."""
        channels = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(channels, 1, -1, -1)       # (C, 1, n, n)
        return F.conv2d(F.pad(x, (*pad, *pad)), kernel, stride=stride, groups=channels)


class UpFiltered(Resample):
    """Zeros between pixels, then the filter, times 4."""

    def __init__(self, taps: list[int]) -> None:
        super().__init__(taps, gain=4.0)

    def forward(self, x: Tensor) -> Tensor:
        blocks = F.pad(rearrange(x, "b c h w -> b c h 1 w 1"), (0, 1, 0, 0, 0, 1))   # a pixel and three zeros each
        spread = rearrange(blocks, "b c h p w q -> b c (h p) (w q)")       # (B, C, 2 H, 2 W)
        return self.filtered(spread, ((self.n + 1) // 2, (self.n - 2) // 2), 1)    # (B, C, 2 H, 2 W)


class DownFiltered(Resample):
    """The filter, then every second pixel."""

    def __init__(self, taps: list[int]) -> None:
        super().__init__(taps, gain=1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.filtered(x, ((self.n - 1) // 2, (self.n - 2) // 2), 2)     # (B, C, H / 2, W / 2)
