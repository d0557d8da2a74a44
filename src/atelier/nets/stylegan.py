"""Generator of StyleGAN: styles set the mean and deviation of each map, in a net that grows.

Karras et al. 2019, A Style-Based Generator Architecture for Generative Adversarial Networks. Levels as in `progan.py`.
B batch, C channels, H, W height, width at the level's size, L layers that take a style, W also the size of a style.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atelier.core.ranges import NonNegInt, PositiveFloat, PositiveInt
from atelier.nets.equalized import EqualizedConv, EqualizedLinear, active, pixel_norm
from atelier.nets.progan import GrowingSynthesis, doubled, widths
from atelier.nets.resample import Resample


class Mapping(nn.Module):
    """Noise and condition to a style, and the running mean of styles that truncation draws towards.

    Args:
        noise_dim: size of z.
        cond_dim: size of the condition, 0 for none.
        style_dim: W.
        n_layers: layers.
        lr_multiplier: learning rate of these layers as a factor of the other layers'.
    """

    mean: Tensor

    def __init__(
        self,
        *,
        noise_dim: PositiveInt,
        cond_dim: NonNegInt,
        style_dim: PositiveInt,
        n_layers: PositiveInt,
        lr_multiplier: PositiveFloat,
    ) -> None:
        super().__init__()
        self.noise_dim, self.style_dim = noise_dim, style_dim
        self.conditioning = EqualizedLinear(cond_dim, style_dim) if cond_dim else None
        sizes = [noise_dim + (style_dim if cond_dim else 0), *[style_dim] * n_layers]
        layers = (EqualizedLinear(n_in, n_out, lr_multiplier=lr_multiplier) for n_in, n_out in pairwise(sizes))
        self.layers = nn.ModuleList(layers)
        self.register_buffer("mean", torch.zeros(style_dim))

    def forward(self, z: Tensor, cond: Tensor) -> Tensor:
        h = pixel_norm(z)                                                  # (B, Z)
        if self.conditioning is not None:
            h = torch.cat([h, pixel_norm(self.conditioning(cond))], dim=1) # (B, Z + W)
        for layer in self.layers:
            h = active(layer(h))
        return h.float()                                                   # (B, W)


def mixed(first: Tensor, second: Tensor, layers: int, share: float) -> Tensor:
    """Styles (B, L, W): those of the first (B, W), for a share of images those of the second from a random layer on.

    Mixing regularisation (Karras et al. 2019, StyleGAN, section 3.1).
    """
    b, device = len(first), first.device
    cut = torch.randint(1, layers, (b, 1), device=device)
    cut = torch.where(torch.rand(b, 1, device=device) < share, cut, layers)
    other = torch.arange(layers, device=device) >= cut                     # (B, L)
    return torch.where(other[:, :, None], second[:, None], first[:, None])


class AdaIN(nn.Module):
    """Each map to mean 0 and deviation 1, then scaled and shifted as the style says (Huang & Belongie 2017, eq. 8)."""

    def __init__(self, channels: int, style_dim: int) -> None:
        super().__init__()
        self.style = EqualizedLinear(style_dim, 2 * channels)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        scale, shift = self.style(w).float()[:, :, None, None].chunk(2, dim=1)     # (B, C, 1, 1) each
        return F.instance_norm(x.float()) * (1 + scale) + shift            # (B, C, H, W) float32


class StyledLayer(nn.Module):
    """Convolution, noise of a learned strength for each channel, leaky ReLU, AdaIN (Karras et al. 2019, figure 1b).

    Args:
        n_in: channels of the map that comes in; None: there is no convolution, the map is the constant.
        up: whether the size doubles before it, through the filter (1, 2, 1).
    """

    def __init__(self, n_in: int | None, n_out: int, style_dim: int, up: bool = False) -> None:
        super().__init__()
        self.conv = None if n_in is None else EqualizedConv(n_in, n_out, 3, bias=False)
        self.blur = Resample([1, 2, 1], gain=1.0) if up else None
        self.strength, self.bias = (nn.Parameter(torch.zeros(n_out, 1, 1)) for _ in range(2))
        self.adain = AdaIN(n_out, style_dim)

    def forward(self, x: Tensor, w: Tensor, noise: Tensor) -> Tensor:
        if self.blur is not None:
            x = self.blur.filtered(doubled(x), (1, 1), 1)                  # (B, C, 2 H, 2 W)
        h = x if self.conv is None else self.conv(x)
        return self.adain(active(h + self.strength * noise.to(h.dtype) + self.bias), w)


class StyleSynthesis(GrowingSynthesis):
    """Styles to an image: a constant, two layers a size.

    Args:
        image_channels: channels of the images.
        channels: channels of the maps, from 4x4 up.
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
        return self.to_rgb(maps, level)


class StyleGenerator(nn.Module):
    """Mapping and synthesis of 2018.

    Args:
        image_size: a power of two from 8 up.
        image_channels: channels of the images; nothing bounds them.
        noise_dim: size of z.
        cond_dim: size of the condition, 0 for none.
        style_dim: size of a style.
        n_layers: layers of the mapping.
        mapping_lr_multiplier: learning rate of the mapping as a factor of the other layers'; published: 0.01, for runs
            of 25 M images.
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
        style_dim: PositiveInt,
        n_layers: PositiveInt,
        mapping_lr_multiplier: PositiveFloat = 0.01,
        channel_base: PositiveInt,
        channel_max: PositiveInt,
    ) -> None:
        super().__init__()
        sizes = {"noise_dim": noise_dim, "cond_dim": cond_dim, "style_dim": style_dim, "n_layers": n_layers}
        self.mapping = Mapping(**sizes, lr_multiplier=mapping_lr_multiplier)
        self.synthesis = StyleSynthesis(image_channels, widths(image_size, channel_base, channel_max), style_dim)
        self.noise_dim, self.top = noise_dim, self.synthesis.top
