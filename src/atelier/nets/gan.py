"""The first generator and discriminator, of dense layers (Goodfellow et al. 2014, GAN)."""

from __future__ import annotations

import math

from einops import reduce
from torch import Tensor, nn

from atelier.core.ranges import PositiveInt, Probability


class MLPGenerator(nn.Module):
    """Noise through two hidden layers of ReLU to all pixels at once (Goodfellow et al. 2014, GAN, section 5).

    Args:
        image_size, image_channels: side and channels of the images, which end in tanh.
        noise_dim: size of z.
        width: units of a hidden layer.
    """

    def __init__(
        self, *, image_size: PositiveInt, image_channels: PositiveInt, noise_dim: PositiveInt, width: PositiveInt
    ) -> None:
        super().__init__()
        self.noise_dim, shape = noise_dim, (image_channels, image_size, image_size)
        first, second, last = nn.Linear(noise_dim, width), nn.Linear(width, width), nn.Linear(width, math.prod(shape))
        pixels = nn.Tanh(), nn.Unflatten(1, shape)
        self.layers = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last, *pixels)

    def forward(self, z: Tensor, cond: Tensor) -> Tensor:
        return self.layers(z).float()                                      # (B, C, H, W)


class MLPDiscriminator(nn.Module):
    """Two hidden layers of maxout with dropout in front of each layer (Goodfellow et al. 2014, GAN, section 5).

    Args:
        image_size, image_channels: side and channels of the images.
        width: units of a hidden layer.
        pieces: linear functions of which each unit takes the largest (Goodfellow et al. 2013, Maxout Networks, eq. 1).
        dropout: share of units left out.
    """

    def __init__(
        self,
        *,
        image_size: PositiveInt,
        image_channels: PositiveInt,
        width: PositiveInt,
        pieces: PositiveInt,
        dropout: Probability,
    ) -> None:
        super().__init__()
        self.per_sample, self.pieces = True, pieces
        self.hidden = nn.ModuleList(
            nn.Sequential(nn.Dropout(dropout), nn.Linear(n_in, width * pieces))
            for n_in in (image_channels * image_size**2, width)
        )
        self.score = nn.Sequential(nn.Dropout(dropout), nn.Linear(width, 1))

    def forward(self, x: Tensor, cond: Tensor) -> tuple[Tensor, None]:
        """Logits (B,)."""
        h = x.flatten(1)                                                   # (B, C H W)
        for layer in self.hidden:
            h = reduce(layer(h), "b (w pieces) -> b w", "max", pieces=self.pieces)
        return self.score(h).squeeze(1).float(), None                      # (B,)
