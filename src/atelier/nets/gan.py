"""A small conditional generator and its projection discriminator."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atelier.errors import UserError
from atelier.ranges import PositiveInt


def n_halvings(image_size: int) -> int:
    """Halvings from image_size down to 4.

    Raises:
        UserError: it is no power of two from 8 up.
    """
    halvings = math.log2(image_size / 4)
    if halvings < 1 or halvings != int(halvings):
        power = max(8, 2 ** round(math.log2(max(1, image_size))))
        fix = f"data.image_size={power}"
        raise UserError("data.image_size", image_size, "this net needs a power of two from 8 up", fix)
    return int(halvings)


class GeneratorNet(nn.Module):
    """Noise and a condition to an image, by doubling from 4x4 (batch norm and ReLU, as in Radford et al. 2016).

    Args:
        image_size: a power of two from 8 up.
        image_channels: of the images.
        width: channels at full size; twice as many at each halving, at most 8 times.
        noise_dim: size of z.
        cond_dim: size of the condition.
    """

    def __init__(
        self,
        *,
        image_size: PositiveInt,
        image_channels: PositiveInt,
        width: PositiveInt,
        noise_dim: PositiveInt,
        cond_dim: PositiveInt,
    ) -> None:
        super().__init__()
        self.noise_dim = noise_dim
        widths = [width * min(8, 2**i) for i in range(n_halvings(image_size) + 1)][::-1]
        self.start = nn.Linear(noise_dim + cond_dim, widths[0] * 16)
        blocks: list[nn.Module] = [nn.BatchNorm2d(widths[0]), nn.ReLU()]
        for n_in, n_out in zip(widths, widths[1:], strict=False):
            blocks += [nn.Upsample(scale_factor=2), nn.Conv2d(n_in, n_out, 3, padding=1)]
            blocks += [nn.BatchNorm2d(n_out), nn.ReLU()]
        self.blocks = nn.Sequential(*blocks, nn.Conv2d(widths[-1], image_channels, 3, padding=1), nn.Tanh())

    def forward(self, z: Tensor, cond: Tensor) -> Tensor:
        h = self.start(torch.cat([z, cond], dim=1)).unflatten(1, (-1, 4, 4))    # (B, C0, 4, 4)
        return self.blocks(h).float()                                            # (B, C, H, W)


class DiscriminatorNet(nn.Module):
    """Image and condition to a logit: features' own score plus their product with the condition

    (Miyato & Koyama 2018, cGANs with Projection Discriminator, eq. 4). No norm, so that R1 sees each image alone.
    """

    def __init__(
        self, *, image_size: PositiveInt, image_channels: PositiveInt, width: PositiveInt, cond_dim: PositiveInt
    ) -> None:
        super().__init__()
        widths = [width * min(8, 2**i) for i in range(n_halvings(image_size) + 1)]
        blocks: list[nn.Module] = [nn.Conv2d(image_channels, width, 3, padding=1), nn.LeakyReLU(0.2)]
        for n_in, n_out in zip(widths, widths[1:], strict=False):
            blocks += [nn.Conv2d(n_in, n_out, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        self.blocks = nn.Sequential(*blocks)
        self.score = nn.Linear(widths[-1] * 16, 1)
        self.features = nn.Linear(widths[-1] * 16, cond_dim)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        h = self.blocks(x).flatten(1)                                            # (B, 16 C)
        product = (self.features(h) * F.normalize(cond, dim=1)).sum(1)           # (B,)
        return (self.score(h).squeeze(1) + product).float()                      # (B,)
