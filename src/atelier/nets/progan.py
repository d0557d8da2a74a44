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

from atelier.core.ranges import NonNegInt, PositiveFloat, PositiveInt
from atelier.nets.equalized import Conv, Linear, MinibatchStd, active, pixel_norm
from atelier.nets.resample import Resample
from atelier.nets.stylegan2 import GROUP, Mapping, widths


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


class Growing(nn.Module):
    """Colours of a map of each size, and the fade between two of them.

    Args:
        image_channels: of the images.
        channels: of the maps from 4x4 up.
    """

    def __init__(self, image_channels: int, channels: list[int]) -> None:
        super().__init__()
        self.top = len(channels) - 1
        self.colours = nn.ModuleList(Conv(n, image_channels, 1) for n in channels)

    def painted(self, maps: list[Tensor], level: float) -> Tensor:
        """The image (B, C, H, W) float32 of a level, of the maps of all sizes up to it."""
        k, part = math.ceil(level), level % 1
        image = self.colours[k](maps[k]).float()
        return image if part == 0 else torch.lerp(doubled(self.colours[k - 1](maps[k - 1]).float()), image, part)


class ProGenerator(Growing):
    """Noise on a sphere, two convolutions a size, each vector of channels normalised (Karras et al. 2018, table 2).

    Args:
        image_size: a power of two from 8 up.
        image_channels: of the images; nothing bounds them.
        noise_dim: size of z.
        cond_dim: size of the condition, 0 for none.
        base, most: channels of a map of size s are base / s, at most `most`; published: 16384, 512.
    """

    def __init__(
        self,
        *,
        image_size: PositiveInt,
        image_channels: PositiveInt,
        noise_dim: PositiveInt,
        cond_dim: NonNegInt,
        base: PositiveInt,
        most: PositiveInt,
    ) -> None:
        channels = widths(image_size, base, most)
        super().__init__(image_channels, channels)
        self.noise_dim = noise_dim
        self.start = nn.Parameter(torch.randn(noise_dim + cond_dim, channels[0], 4, 4))
        self.bias = nn.Parameter(torch.zeros(channels[0], 1, 1))
        self.scale = math.sqrt(2) / 4 / math.sqrt(noise_dim + cond_dim)  # the published gain of a 4x4 start
        first = Conv(channels[0], channels[0], 3)
        later = (nn.ModuleList([Conv(n_in, n_out, 3), Conv(n_out, n_out, 3)]) for n_in, n_out in pairwise(channels))
        self.blocks = nn.ModuleList([nn.ModuleList([first]), *later])

    def forward(self, z: Tensor, cond: Tensor, level: float) -> Tensor:
        """Images (B, C, H, W) float32 of the level's size."""
        told = pixel_norm(torch.cat([z, cond], dim=1))                     # (B, Z + E)
        h = torch.einsum("bz,zchw->bchw", told, self.start * self.scale) + self.bias
        h, maps = pixel_norm(active(h)), []
        for k in range(math.ceil(level) + 1):
            h = doubled(h) if k else h
            for conv in self.blocks[k]:
                h = pixel_norm(active(conv(h)))                            # (B, C, H, W)
            maps.append(h)
        return self.painted(maps, level)


class AdaIN(nn.Module):
    """Each map to mean 0 and deviation 1, then scaled and shifted as the style says (Huang & Belongie 2017, eq. 8)."""

    def __init__(self, channels: int, style_dim: int) -> None:
        super().__init__()
        self.style = Linear(style_dim, 2 * channels)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        scale, shift = self.style(w).float()[:, :, None, None].chunk(2, dim=1)     # (B, C, 1, 1) each
        return F.instance_norm(x.float()) * (1 + scale) + shift            # (B, C, H, W) float32


class StyledLayer(nn.Module):
    """Convolution, noise of a learned strength for each channel, leaky ReLU, AdaIN (Karras et al. 2019, figure 1b).

    Args:
        n_in: None: there is no convolution, the map is the constant.
        up: the size doubles before it, through the filter (1, 2, 1).
    """

    def __init__(self, n_in: int | None, n_out: int, style_dim: int, up: bool = False) -> None:
        super().__init__()
        self.conv = None if n_in is None else Conv(n_in, n_out, 3, bias=False)
        self.blur = Resample([1, 2, 1], gain=1.0) if up else None
        self.strength, self.bias = (nn.Parameter(torch.zeros(n_out, 1, 1)) for _ in range(2))
        self.adain = AdaIN(n_out, style_dim)

    def forward(self, x: Tensor, w: Tensor, noise: Tensor) -> Tensor:
        if self.blur is not None:
            x = self.blur.filtered(doubled(x), (1, 1), 1)                  # (B, C, 2 H, 2 W)
        h = x if self.conv is None else self.conv(x)
        return self.adain(active(h + self.strength * noise.to(h.dtype) + self.bias), w)


class StyleSynthesis(Growing):
    """Styles to an image: a constant, two layers a size.

    Args:
        image_channels: of the images.
        channels: of the maps from 4x4 up.
        style_dim: W.
    """

    def __init__(self, image_channels: int, channels: list[int], style_dim: int) -> None:
        super().__init__(image_channels, channels)
        self.constant = nn.Parameter(torch.ones(channels[0], 4, 4))
        layers = [StyledLayer(None, channels[0], style_dim), StyledLayer(channels[0], channels[0], style_dim)]
        for n_in, n_out in pairwise(channels):
            layers += [StyledLayer(n_in, n_out, style_dim, up=True), StyledLayer(n_out, n_out, style_dim)]
        self.layers = nn.ModuleList(layers)
        self.n_styles = len(layers)
        self.noise_sizes = [4 * 2 ** (k // 2) for k in range(len(layers))]

    def forward(self, styles: Tensor, noises: list[Tensor], level: float) -> Tensor:
        """styles (B, L, W), noises (B, 1, h, w) of each of `noise_sizes`; those of the level are used."""
        h, maps = self.constant.expand(len(styles), -1, -1, -1), []
        for k in range(math.ceil(level) + 1):
            for place in (2 * k, 2 * k + 1):
                h = self.layers[place](h, styles[:, place], noises[place])         # (B, C, H, W)
            maps.append(h)
        return self.painted(maps, level)


class StyleGenerator(nn.Module):
    """Mapping and synthesis of 2018.

    Args:
        image_size: a power of two from 8 up.
        image_channels: of the images; nothing bounds them.
        noise_dim: size of z.
        cond_dim: size of the condition, 0 for none.
        style_dim: size of a style.
        depth: layers of the mapping.
        mapping_speed: of their learning, beside the other layers'; published: 0.01, for runs of 25 M images.
        base, most: channels of a map of size s are base / s, at most `most`; published: 16384, 512.
    """

    def __init__(
        self,
        *,
        image_size: PositiveInt,
        image_channels: PositiveInt,
        noise_dim: PositiveInt,
        cond_dim: NonNegInt,
        style_dim: PositiveInt,
        depth: PositiveInt,
        mapping_speed: PositiveFloat = 0.01,
        base: PositiveInt,
        most: PositiveInt,
    ) -> None:
        super().__init__()
        sizes = {"noise_dim": noise_dim, "cond_dim": cond_dim, "style_dim": style_dim, "depth": depth}
        self.mapping = Mapping(**sizes, speed=mapping_speed)
        self.synthesis = StyleSynthesis(image_channels, widths(image_size, base, most), style_dim)
        self.noise_dim, self.top = noise_dim, self.synthesis.top


class ProDiscriminator(nn.Module):
    """The generator backwards, with the minibatch deviation at 4x4 (Karras et al. 2018, table 2).

    With a condition the logit is the features' product with it (Miyato & Koyama 2018, eq. 4, without the first term).

    Args:
        image_size: a power of two from 8 up.
        image_channels: of the images.
        cond_dim: size of the condition, 0 for none.
        base, most: as the generator's.
    """

    def __init__(
        self,
        *,
        image_size: PositiveInt,
        image_channels: PositiveInt,
        cond_dim: NonNegInt,
        base: PositiveInt,
        most: PositiveInt,
    ) -> None:
        super().__init__()
        channels = widths(image_size, base, most)
        self.top, self.cond_dim, n = len(channels) - 1, cond_dim, channels[0]
        self.colours = nn.ModuleList(Conv(image_channels, c, 1) for c in channels)
        self.blocks = nn.ModuleList(
            nn.ModuleList([Conv(large, large, 3), Conv(large, small, 3)]) for small, large in pairwise(channels)
        )
        self.spread, self.conv = MinibatchStd(GROUP), Conv(n + 1, n, 3)
        self.dense, self.score = Linear(n * 16, n), Linear(n, cond_dim or 1)

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
