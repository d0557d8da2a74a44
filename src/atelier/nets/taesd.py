"""The tiny autoencoder that mimics a large one of latent diffusion (Bohan 2023, TAESD), as its files lay it out.

B batch, W channels of every map, Z latent channels, H image size, h = H / 8.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from atelier.core.errors import UserError
from atelier.core.ranges import PositiveInt
from atelier.nets.quantizers import DETERMINISTIC_LOGVAR

FACTOR = 8
LATENT_RANGE = 3.0  # the decoder squeezes latents into (-3, 3)
GROUPS, WIDER = 4, 4  # of the norm in the middle of a pooled block's first part, and how many times as wide it is


class TAESD(nn.Module):
    """Images to latents and back, without norms but in the blocks at the size of the latents.

    Layers have the numbers that they have in the published files of taef2, so that weights go in by name.

    Args:
        image_size: side of the images, a multiple of 8.
        width: W.
        latent_channels: Z.

    Raises:
        UserError: the image does not halve three times.
    """

    def __init__(self, image_size: PositiveInt, width: PositiveInt, latent_channels: PositiveInt) -> None:
        super().__init__()
        if image_size % FACTOR:
            problem, nearest = f"its latents are {FACTOR} times smaller", max(1, round(image_size / FACTOR)) * FACTOR
            raise UserError("data.image_size", image_size, problem, f"data.image_size={nearest}")
        self.latent_shape = (latent_channels, image_size // FACTOR, image_size // FACTOR)
        self.encoder = nn.Sequential(
            _conv(3, width),
            _Block(width),
            *_level(_halving(width), width),
            *_level(_halving(width), width),
            *_level(_halving(width), width, pooled=True),
            _conv(width, latent_channels),
        )
        self.decoder = nn.Sequential(
            _Squeeze(),
            *_level(_conv(latent_channels, width), width, nn.ReLU(), pooled=True),
            nn.Upsample(scale_factor=2),
            *_level(_conv(width, width, bias=False), width),
            nn.Upsample(scale_factor=2),
            *_level(_conv(width, width, bias=False), width),
            nn.Upsample(scale_factor=2),
            _conv(width, width, bias=False),
            _Block(width),
            _conv(width, 3),
        )

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, Z, h, h) float32 of images (B, 3, H, H), and the log-variance of what is certain."""
        mean = self.encoder(x / 2 + 0.5).float()                               # files are for images in [0, 1]
        return mean, torch.full_like(mean, DETERMINISTIC_LOGVAR)

    def decode(self, z: Tensor) -> Tensor:
        """Images (B, 3, H, H) float32 of latents."""
        return 2 * self.decoder(z).float() - 1


class _Squeeze(nn.Module):
    """r tanh(z / r): latents of any size become small ones."""

    def forward(self, z: Tensor) -> Tensor:
        return LATENT_RANGE * (z / LATENT_RANGE).tanh()


class _Block(nn.Module):
    """relu(x + three convolutions of x); where `pooled`, x has another residual first, of a pixel across channels."""

    def __init__(self, width: int, pooled: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width))
        inner = WIDER * width
        self.pool = nn.Sequential(
            nn.Conv2d(width, inner, 1, bias=False),
            nn.GroupNorm(GROUPS, inner),
            nn.ReLU(),
            nn.Conv2d(inner, width, 1, bias=False),
        ) if pooled else None

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return (x + self.conv(x)).relu()


def _level(first: nn.Module, width: int, *then: nn.Module, pooled: bool = False) -> list[nn.Module]:
    """A convolution and three blocks of one size."""
    return [first, *then, *(_Block(width, pooled) for _ in range(3))]


def _conv(n_in: int, n_out: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, padding=1, bias=bias)


def _halving(width: int) -> nn.Conv2d:
    return nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False)
