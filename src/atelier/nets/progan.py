"""Nets that grow: the whole net is there from the start, and a number says how much of it is used.

Karras et al. 2018, Progressive Growing of GANs for Improved Quality, Stability, and Variation;
Karras et al. 2019, A Style-Based Generator Architecture for Generative Adversarial Networks (StyleGAN).

`level` k works at size 4 2^k; k + a with 0 < a < 1 fades from k to k + 1: images are a times those of the larger size
and 1 - a times those of the smaller, made as large by repeating pixels. B batch, C channels, H, W height, width at the
level's size, L layers that take a style.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atelier.core.errors import UserError
from atelier.core.ranges import NonNegInt, PositiveInt
from atelier.nets.equalized import EqualizedConv, EqualizedLinear, MinibatchStd, active, pixel_norm
from atelier.nets.layers import n_halvings

GROUP = 4  # of the minibatch deviation


def widths(image_size: int, channel_base: int, channel_max: int) -> list[int]:
    """Channels of the maps from 4x4 up: `channel_base` / size, at most `channel_max`.

    Raises:
        UserError: none are left in the largest.
    """
    if channel_base < image_size:
        problem = f"{image_size} px leave no channel of it"
        raise UserError(".channel_base", channel_base, problem, f".channel_base={16 * image_size}")
    return [min(channel_max, channel_base // 2 ** (i + 2)) for i in range(n_halvings(image_size) + 1)]


def doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0)                              # (B, C, 2 H, 2 W)


def halved(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)                                              # (B, C, H / 2, W / 2)


def seen_at(x: Tensor, level: float, top: int) -> Tensor:
    """Images of full size as they are at a level, a fade included: (B, C, h, w)."""
    for _ in range(top - math.ceil(level)):
        x = halved(x)
    part = level % 1
    return x if part == 0 else torch.lerp(doubled(halved(x)), x, part)


class GrowingSynthesis(nn.Module):
    """Colours of a map of each size, and the fade between two of them.

    Args:
        image_channels: channels of the images.
        channels: channels of the maps, from 4x4 up.
    """

    def __init__(self, image_channels: int, channels: list[int]) -> None:
        super().__init__()
        self.top = len(channels) - 1
        self.colours = nn.ModuleList(EqualizedConv(n, image_channels, 1) for n in channels)

    def to_rgb(self, maps: list[Tensor], level: float) -> Tensor:
        """The image (B, C, H, W) float32 of a level, of the maps of all sizes up to it."""
        k, part = math.ceil(level), level % 1
        image = self.colours[k](maps[k]).float()
        return image if part == 0 else torch.lerp(doubled(self.colours[k - 1](maps[k - 1]).float()), image, part)


def two_convolutions(n_in: int, n_between: int, n_out: int) -> nn.ModuleList:
    return nn.ModuleList([EqualizedConv(n_in, n_between, 3), EqualizedConv(n_between, n_out, 3)])


class ProGenerator(GrowingSynthesis):
    """Noise on a sphere, two convolutions a size, each vector of channels normalised (Karras et al. 2018, table 2).

    Args:
        image_size: a power of two from 8 up.
        image_channels: channels of the images; nothing bounds them.
        noise_dim: size of z.
        cond_dim: size of the condition, 0 for none.
        channel_base, channel_max: `channel_base` / s channels in a map of size s, at most `channel_max`,
            published: 16384, 512.
    """

    def __init__(
        self,
        *,
        image_size: PositiveInt,
        image_channels: PositiveInt,
        noise_dim: PositiveInt,
        cond_dim: NonNegInt,
        channel_base: PositiveInt,
        channel_max: PositiveInt,
    ) -> None:
        channels = widths(image_size, channel_base, channel_max)
        super().__init__(image_channels, channels)
        self.noise_dim = noise_dim
        self.start = nn.Parameter(torch.randn(noise_dim + cond_dim, channels[0], 4, 4))
        self.bias = nn.Parameter(torch.zeros(channels[0], 1, 1))
        self.scale = math.sqrt(2) / 4 / math.sqrt(noise_dim + cond_dim)  # the published gain of a 4x4 start
        first = EqualizedConv(channels[0], channels[0], 3)
        later = (two_convolutions(n_in, n_out, n_out) for n_in, n_out in pairwise(channels))
        self.blocks = nn.ModuleList([nn.ModuleList([first]), *later])

    def forward(self, z: Tensor, cond: Tensor, level: float) -> Tensor:
        """Images (B, C, H, W) float32 of the level's size."""
        latent = pixel_norm(torch.cat([z, cond], dim=1))                   # (B, Z + E)
        h = torch.einsum("bz,zchw->bchw", latent, self.start * self.scale) + self.bias
        h, maps = pixel_norm(active(h)), []
        for k in range(math.ceil(level) + 1):
            h = doubled(h) if k else h
            for conv in self.blocks[k]:
                h = pixel_norm(active(conv(h)))                            # (B, C, H, W)
            maps.append(h)
        return self.to_rgb(maps, level)


class ProDiscriminator(nn.Module):
    """The generator backwards, with the minibatch deviation at 4x4 (Karras et al. 2018, table 2).

    With a condition the logit is the features' product with it (Miyato & Koyama 2018, eq. 4, without the first term).

    Args:
        image_size: a power of two from 8 up.
        image_channels: channels of the images.
        cond_dim: size of the condition, 0 for none.
        channel_base, channel_max: `channel_base` / s channels in a map of size s, at most `channel_max`,
            as the generator's.
    """

    def __init__(
        self,
        *,
        image_size: PositiveInt,
        image_channels: PositiveInt,
        cond_dim: NonNegInt,
        channel_base: PositiveInt,
        channel_max: PositiveInt,
    ) -> None:
        super().__init__()
        channels = widths(image_size, channel_base, channel_max)
        self.top, self.cond_dim, n = len(channels) - 1, cond_dim, channels[0]
        self.colours = nn.ModuleList(EqualizedConv(image_channels, c, 1) for c in channels)
        self.blocks = nn.ModuleList(two_convolutions(large, large, small) for small, large in pairwise(channels))
        self.spread, self.conv = MinibatchStd(GROUP), EqualizedConv(n + 1, n, 3)
        self.dense, self.score = EqualizedLinear(n * 16, n), EqualizedLinear(n, cond_dim or 1)

    def forward(self, x: Tensor, cond: Tensor, level: float) -> Tensor:
        """Logits (B,) of images of the level's size."""
        k, part = math.ceil(level), level % 1
        h = active(self.colours[k](x))                                     # (B, C, H, W)
        for block in reversed(self.blocks[:k]):
            for conv in block:
                h = active(conv(h))
            h = halved(h)
            if part > 0 and h.shape[2] * 2 == x.shape[2]:                  # the step that fades in
                h = torch.lerp(active(self.colours[k - 1](halved(x))), h, part)
        h = active(self.conv(self.spread(h))).flatten(1)                   # (B, 16 C)
        score = self.score(active(self.dense(h))).float()                  # (B, 1 or E)
        return (score * pixel_norm(cond)).sum(1) / math.sqrt(self.cond_dim) if self.cond_dim else score.squeeze(1)
