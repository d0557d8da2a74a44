"""Generator and discriminator of R3GAN: ResNets of grouped bottlenecks without norms.

Huang et al. 2024, The GAN is dead; long live the GAN! A Modern GAN Baseline, section 4 and appendix.
B batch, C channels, H, W height, width, E condition.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atelier.core.ranges import NonNegInt, PositiveInt
from atelier.nets.layers import M, n_halvings, zeroed
from atelier.nets.resample import DownFiltered, UpFiltered

SLOPE = 0.2  # of leaky ReLU
GAIN = math.sqrt(2 / (1 + SLOPE**2))  # keeps the size of activations through it (He et al. 2015)
TAPS = [1, 2, 1]


class R3Generator(nn.Module):
    """A learned 4x4 map, weighted by noise and condition, through blocks and doublings to an image.

    Args:
        image_size: a power of two from 8 up.
        image_channels: channels of the images; nothing bounds them.
        noise_dim: size of z.
        cond_dim: size of the condition, 0 for none.
        width: channels at full size; twice as many at each halving.
        channel_max: channels of any map.
        n_blocks: residual blocks of each size.
        group_width: channels of a group of the 3x3 convolutions, or as many as divide a map's.
    """

    def __init__(
        self,
        *,
        image_size: PositiveInt,
        image_channels: PositiveInt,
        noise_dim: PositiveInt,
        cond_dim: NonNegInt,
        width: PositiveInt,
        channel_max: PositiveInt,
        n_blocks: PositiveInt,
        group_width: PositiveInt,
    ) -> None:
        super().__init__()
        widths = _widths(image_size, width, channel_max)
        self.noise_dim, n = noise_dim, len(widths) * n_blocks
        self.basis = nn.Parameter(torch.randn(widths[0], 4, 4))
        self.weigh = scaled(nn.Linear(noise_dim + cond_dim, widths[0], bias=False), 1.0)
        stages: list[nn.Module] = [*residuals(widths[0], n_blocks, group_width, n)]
        for n_in, n_out in pairwise(widths):
            stages += [*changed(n_in, n_out), UpFiltered(TAPS), *residuals(n_out, n_blocks, group_width, n)]
        self.stages = nn.Sequential(*stages)
        self.pixels = scaled(nn.Conv2d(widths[-1], image_channels, 1, bias=False), 1.0)

    def forward(self, z: Tensor, cond: Tensor) -> Tensor:
        weights = self.weigh(torch.cat([z, cond], dim=1))                  # (B, C0)
        h = self.basis * weights[:, :, None, None]                         # (B, C0, 4, 4)
        return self.pixels(self.stages(h)).float()                         # (B, C, H, W)


class R3Discriminator(nn.Module):
    """The generator backwards: down to 4x4, where a learned map weighs each channel.

    With a condition the logit is the features' product with it (Miyato & Koyama 2018, eq. 4, without the first term).

    Args:
        image_size: a power of two from 8 up.
        image_channels: channels of the images.
        cond_dim: size of the condition, 0 for none.
        width: channels at full size; twice as many at each halving.
        channel_max: channels of any map.
        n_blocks: residual blocks of each size.
        group_width: channels of a group of the 3x3 convolutions, or as many as divide a map's.
    """

    def __init__(
        self,
        *,
        image_size: PositiveInt,
        image_channels: PositiveInt,
        cond_dim: NonNegInt,
        width: PositiveInt,
        channel_max: PositiveInt,
        n_blocks: PositiveInt,
        group_width: PositiveInt,
    ) -> None:
        super().__init__()
        widths = _widths(image_size, width, channel_max)
        self.per_sample, self.cond_dim, n = True, cond_dim, len(widths) * n_blocks
        down = widths[::-1]
        self.pixels = scaled(nn.Conv2d(image_channels, down[0], 1, bias=False), 1.0)
        stages: list[nn.Module] = [*residuals(down[0], n_blocks, group_width, n)]
        for n_in, n_out in pairwise(down):
            stages += [DownFiltered(TAPS), *changed(n_in, n_out), *residuals(n_out, n_blocks, group_width, n)]
        self.stages = nn.Sequential(*stages)
        self.basis = scaled(nn.Conv2d(down[-1], down[-1], 4, groups=down[-1], bias=False), 1.0)
        self.score = scaled(nn.Linear(down[-1], cond_dim or 1, bias=False), 1.0)

    def forward(self, x: Tensor, cond: Tensor) -> tuple[Tensor, None]:
        """Logits (B,)."""
        h = self.basis(self.stages(self.pixels(x))).flatten(1)             # (B, C0)
        score = self.score(h).float()                                      # (B, E or 1)
        return ((score * cond).sum(1) / math.sqrt(self.cond_dim) if self.cond_dim else score.squeeze(1)), None


class Bottleneck(nn.Module):
    """1x1 to twice the channels, grouped 3x3, 1x1 back, plus the input; starts as the identity.

    The first two weights are smaller by n_blocks^(-1/4) each (Zhang et al. 2019, Fixup, eq. 5).
    """

    def __init__(self, channels: int, group_width: int, n_blocks: int) -> None:
        super().__init__()
        inner, gain = 2 * channels, GAIN * n_blocks**-0.25
        groups = inner // math.gcd(inner, group_width)
        self.widen = scaled(nn.Conv2d(channels, inner, 1, bias=False), gain)
        self.conv = scaled(nn.Conv2d(inner, inner, 3, padding=1, groups=groups, bias=False), gain)
        self.narrow = zeroed(nn.Conv2d(inner, channels, 1, bias=False))
        self.shift1, self.shift2 = (nn.Parameter(torch.zeros(inner, 1, 1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.widen(x) + self.shift1, SLOPE)               # (B, 2 C, H, W)
        h = F.leaky_relu(self.conv(h) + self.shift2, SLOPE)                # (B, 2 C, H, W)
        return x + self.narrow(h)                                          # (B, C, H, W)


def residuals(channels: int, n: int, group_width: int, n_blocks: int) -> list[nn.Module]:
    return [Bottleneck(channels, group_width, n_blocks) for _ in range(n)]


def changed(n_in: int, n_out: int) -> list[nn.Module]:
    """Another number of channels, where it is another."""
    return [] if n_in == n_out else [scaled(nn.Conv2d(n_in, n_out, 1, bias=False), 1.0)]


def scaled(layer: M, gain: float) -> M:
    """Weights of N(0, gain^2 / fan_in)."""
    nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.weight[0].numel()))
    return layer


def _widths(image_size: int, width: int, channel_max: int) -> list[int]:
    """Of the maps from 4x4 up."""
    return [min(channel_max, width * 2**i) for i in range(n_halvings(image_size) + 1)][::-1]
