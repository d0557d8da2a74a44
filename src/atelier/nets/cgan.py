"""A small conditional generator and discriminator; the condition enters in any of the ways of conditional GANs."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from atelier.core.errors import UserError
from atelier.core.ranges import NonNegInt, PositiveInt
from atelier.nets.layers import ConditionalBatchNorm, n_halvings


class CGANGenerator(nn.Module):
    """Noise and a condition to an image, by doubling from 4x4 (batch norm and ReLU, as in Radford et al. 2016).

    Args:
        image_size: a power of two from 8 up.
        image_channels: channels of the images.
        width: channels at full size; twice as many at each halving, at most 8 times.
        noise_dim: size of z.
        cond_dim: size of the condition.
        conditioning: "concatenation": the condition stands beside z (Mirza & Osindero 2014); "norm": it scales and
            shifts behind each batch norm (de Vries et al. 2017; Miyato & Koyama 2018, section 5).
    """

    def __init__(
        self,
        *,
        image_size: PositiveInt,
        image_channels: PositiveInt,
        width: PositiveInt,
        noise_dim: PositiveInt,
        cond_dim: NonNegInt,
        conditioning: Literal["concatenation", "norm"],
    ) -> None:
        super().__init__()
        self.noise_dim, self.beside = noise_dim, conditioning == "concatenation"
        widths = [width * min(8, 2**i) for i in range(n_halvings(image_size) + 1)][::-1]
        self.start = nn.Linear(noise_dim + cond_dim * self.beside, widths[0] * 16)
        norms = [ConditionalBatchNorm(n, 0 if self.beside else cond_dim) for n in widths]
        self.norms = nn.ModuleList(norms)
        self.convs = nn.ModuleList(nn.Conv2d(n_in, n_out, 3, padding=1) for n_in, n_out in pairwise(widths))
        self.last = nn.Conv2d(widths[-1], image_channels, 3, padding=1)

    def forward(self, z: Tensor, cond: Tensor) -> Tensor:
        latent = torch.cat([z, cond], dim=1) if self.beside else z
        h = F.relu(self.norms[0](rearrange(self.start(latent), "b (c h w) -> b c h w", h=4, w=4), cond))
        for conv, norm in zip(self.convs, self.norms[1:], strict=True):
            h = conv(F.interpolate(h, scale_factor=2.0))                         # (B, C, 2 H, 2 W)
            h = F.relu(norm(h, cond))
        return self.last(h).tanh().float()                                       # (B, C, H, W)


class CGANDiscriminator(nn.Module):
    """Image and condition to a logit, by halving down to 4x4. No norm, so that penalties see each image alone.

    Args:
        image_size: a power of two from 8 up.
        image_channels: channels of the images.
        width: channels at full size; twice as many at each halving, at most 8 times.
        cond_dim: size of the condition.
        conditioning: "concatenation": the condition stands beside the colours of each pixel (Mirza & Osindero 2014);
            "projection": the features' own score plus their product with the condition (Miyato & Koyama 2018, eq. 4);
            "classifier": the condition is not seen, the net tells the label itself (Odena et al. 2017, AC-GAN).
        n_classes: labels that a classifier tells apart.
        norm: "spectral": weights divided by their largest singular value (Miyato et al. 2018, SNGAN, eq. 8).

    Raises:
        UserError: a classifier of a set without labels.
    """

    def __init__(
        self,
        *,
        image_size: PositiveInt,
        image_channels: PositiveInt,
        width: PositiveInt,
        cond_dim: NonNegInt,
        conditioning: Literal["concatenation", "projection", "classifier"],
        n_classes: NonNegInt,
        norm: Literal["spectral", "none"],
    ) -> None:
        super().__init__()
        if conditioning == "classifier" and n_classes == 0:
            fix = ".conditioning=projection"
            raise UserError(".conditioning", conditioning, "this set has no labels", fix)
        self.conditioning, self.per_sample = conditioning, True
        widths = [width * min(8, 2**i) for i in range(n_halvings(image_size) + 1)]
        n_in = image_channels + (cond_dim if conditioning == "concatenation" else 0)
        blocks: list[nn.Module] = [nn.Conv2d(n_in, width, 3, padding=1), nn.LeakyReLU(0.2)]
        for n_in, n_out in pairwise(widths):
            blocks += [nn.Conv2d(n_in, n_out, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        self.blocks = nn.Sequential(*blocks)
        self.score = nn.Linear(widths[-1] * 16, 1)
        if conditioning != "concatenation":
            self.features = nn.Linear(widths[-1] * 16, cond_dim if conditioning == "projection" else n_classes)
        if norm == "spectral":
            for layer in self.modules():
                if isinstance(layer, nn.Conv2d | nn.Linear):
                    spectral_norm(layer)

    def forward(self, x: Tensor, cond: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits (B,), and of the classes (B, K) where the net is their classifier."""
        if self.conditioning == "concatenation":
            x = torch.cat([x, repeat(cond, "b d -> b d h w", h=x.shape[2], w=x.shape[3])], dim=1)
        h = self.blocks(x).flatten(1)                                            # (B, 16 C)
        score = self.score(h).squeeze(1).float()                                 # (B,)
        if self.conditioning == "projection":
            score = score + (self.features(h) * F.normalize(cond, dim=1)).sum(1).float()
        return score, self.features(h).float() if self.conditioning == "classifier" else None
