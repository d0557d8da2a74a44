"""A small convolutional encoder and decoder with a spatial latent."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from atelier.errors import UserError
from atelier.nets.layers import norm
from atelier.ranges import PositiveInt


class VAENet(nn.Module):
    """Images to the mean and log-variance of a latent, latents to images.

    Args:
        image_size: height and width of the images; halves evenly `downs` times.
        image_channels: of the images.
        width: channels at full resolution, doubled at each halving.
        downs: halvings.
        latent_channels: of the latent, whose size is image_size / 2**downs.

    Raises:
        UserError: the image size does not halve evenly.
    """

    def __init__(
        self,
        *,
        image_size: PositiveInt,
        image_channels: PositiveInt,
        width: PositiveInt,
        downs: PositiveInt,
        latent_channels: PositiveInt,
    ) -> None:
        super().__init__()
        if image_size % 2**downs:
            nearest = max(1, round(image_size / 2**downs)) * 2**downs
            problem = f"{downs} halvings need a multiple of {2**downs}"
            raise UserError("data.image_size", image_size, problem, f"data.image_size={nearest}")
        self.latent_shape = (latent_channels, image_size // 2**downs, image_size // 2**downs)
        widths = [width * 2**i for i in range(downs + 1)]
        down: list[nn.Module] = [nn.Conv2d(image_channels, width, 3, padding=1), Residual(width)]
        for n_in, n_out in zip(widths, widths[1:], strict=False):
            down += [nn.Conv2d(n_in, n_out, 4, stride=2, padding=1), Residual(n_out)]
        self.encoder = nn.Sequential(*down, norm(n_out), nn.SiLU(), nn.Conv2d(n_out, 2 * latent_channels, 1))
        up: list[nn.Module] = [nn.Conv2d(latent_channels, n_out, 3, padding=1), Residual(n_out)]
        for n_in, n_out in zip(widths[::-1], widths[-2::-1], strict=False):
            up += [nn.Upsample(scale_factor=2), nn.Conv2d(n_in, n_out, 3, padding=1), Residual(n_out)]
        self.decoder = nn.Sequential(*up, norm(width), nn.SiLU(), nn.Conv2d(width, image_channels, 3, padding=1))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z | x), float32, log-variance within [-20, 10]."""
        mean, logvar = self.encoder(x).float().chunk(2, dim=1)             # (B, Z, H / f, W / f) each
        return mean, logvar.clamp(-20, 10)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z).float()                                     # (B, C, H, W)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.encode(x)


class Residual(nn.Module):
    """Norm, SiLU, 3x3 twice, plus the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2, self.conv2 = norm(channels), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))                              # (B, C, H, W)
        return x + self.conv2(F.silu(self.norm2(h)))                       # (B, C, H, W)
