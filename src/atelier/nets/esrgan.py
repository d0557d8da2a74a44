"""The net of ESRGAN (Wang et al. 2018): super-resolution by dense blocks inside residual blocks, without norms."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atelier.core.ranges import PositiveInt
from atelier.nets.srgan import STAGES

BETA = 0.2  # of what a block adds (section 3.1)
SLOPE = 0.2  # of leaky ReLU
FIRST = 0.1  # of the first weights inside the blocks, beside He et al. 2015
CONVOLUTIONS = 5  # of a dense block, of which a residual block has as many as DENSE
DENSE = 3


class RRDBNet(nn.Module):
    """Images to images `scale_factor` times as wide (Wang et al. 2018, ESRGAN, figures 3 and 4).

    A convolution; blocks, a convolution and a skip over all of them; for each enlargement the nearest pixels, a
    convolution and a leaky ReLU; two convolutions to the image, all 3x3. Published: width 64, 23 blocks, growth 32:
    16,697,987 parameters for colour and factor 4. It takes sources of any size.

    Args:
        image_channels: channels of source and result.
        width: channels.
        n_blocks: residual blocks, each of three dense ones.
        growth: channels that each convolution of a dense block adds.
        scale_factor: width of a result in widths of its source.
    """

    def __init__(
        self,
        *,
        image_channels: PositiveInt,
        width: PositiveInt,
        n_blocks: PositiveInt,
        growth: PositiveInt,
        scale_factor: Literal[2, 3, 4],
    ) -> None:
        super().__init__()
        self.scale_factor = scale_factor
        self.receptive_radius = _reach(n_blocks, scale_factor)
        self.first = nn.Conv2d(image_channels, width, 3, padding=1)
        self.body = nn.Sequential(*(_Residual(width, growth) for _ in range(n_blocks)))
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.up = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in STAGES[scale_factor])
        self.inner, self.last = (nn.Conv2d(width, n, 3, padding=1) for n in (width, image_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Results (B, C, factor H, factor W) float32 of sources (B, C, H, W) in [-1, 1]."""
        h = self.first(x)                                                  # (B, N, H, W)
        h = h + self.middle(self.body(h))                                  # (B, N, H, W)
        for times, conv in zip(STAGES[self.scale_factor], self.up, strict=True):
            h = _leaky(conv(F.interpolate(h, scale_factor=float(times))))  # (B, N, t H, t W)
        return self.last(_leaky(self.inner(h))).float()                    # (B, C, f H, f W)


class _Residual(nn.Module):
    """Three dense blocks, of whose sum with the input a part is added to it."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(_Dense(width, growth) for _ in range(DENSE)))

    def forward(self, x: Tensor) -> Tensor:
        return x + BETA * self.layers(x)                                   # (B, N, H, W)


class _Dense(nn.Module):
    """Convolutions, each of which sees the input and what all before it made (Huang et al. 2017, DenseNet)."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        sizes = [*[growth] * (CONVOLUTIONS - 1), width]
        self.convs = nn.ModuleList(nn.Conv2d(width + i * growth, n, 3, padding=1) for i, n in enumerate(sizes))
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight)
            nn.init.zeros_(conv.bias)
            conv.weight.data *= FIRST

    def forward(self, x: Tensor) -> Tensor:
        seen = x                                                           # (B, N + i G, H, W)
        for conv in self.convs[:-1]:
            seen = torch.cat([seen, _leaky(conv(seen))], dim=1)
        return x + BETA * self.convs[-1](seen)                             # (B, N, H, W)


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, SLOPE)


def _reach(n_blocks: int, scale_factor: int) -> int:
    """How far a pixel of the result looks into the source, in pixels.

    From the last two convolutions back: each adds a pixel, and each stage is coarser.
    """
    low, high = -2, scale_factor - 1 + 2
    for times in STAGES[scale_factor][::-1]:
        low, high = (low - 1) // times, (high + 1) // times
    return max(-low, high) + 1 + n_blocks * DENSE * CONVOLUTIONS + 1
