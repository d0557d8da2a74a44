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
        width: channels of the largest maps, doubled at each halving.
        downs: halvings.
        latent_channels: of the latent, whose size is image_size / patch / 2**downs.
        patch: 2 folds 2x2 pixels into channels first, so every map is half as large; None: folds down to 16x16 maps.

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
        patch: PositiveInt | None,
    ) -> None:
        super().__init__()
        self.patch = patch = patch or max(1, image_size // 16)
        step = patch * 2**downs
        if image_size % step:
            nearest = max(1, round(image_size / step)) * step
            problem = f"patches of {patch} and {downs} halvings need a multiple of {step}"
            raise UserError("data.image_size", image_size, problem, f"data.image_size={nearest}")
        self.image_shape = (image_channels, image_size, image_size)
        self.latent_shape = (latent_channels, image_size // step, image_size // step)
        widths = [width * 2**i for i in range(downs + 1)]
        down: list[nn.Module] = [nn.Conv2d(image_channels * patch**2, width, 3, padding=1), Residual(width)]
        for n_in, n_out in zip(widths, widths[1:], strict=False):
            down += [nn.Conv2d(n_in, n_out, 4, stride=2, padding=1), Residual(n_out)]
        self.encoder = nn.Sequential(*down, norm(n_out), nn.SiLU(), nn.Conv2d(n_out, 2 * latent_channels, 1))
        up: list[nn.Module] = [nn.Conv2d(latent_channels, n_out, 3, padding=1), Residual(n_out)]
        for n_in, n_out in zip(widths[::-1], widths[-2::-1], strict=False):
            up += [nn.Upsample(scale_factor=2), nn.Conv2d(n_in, n_out, 3, padding=1), Residual(n_out)]
        last = nn.Conv2d(width, image_channels * patch**2, 3, padding=1)
        self.decoder = nn.Sequential(*up, norm(width), nn.SiLU(), last)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z | x), float32, log-variance within [-20, 10]."""
        mean, logvar = self.encoder(F.pixel_unshuffle(x, self.patch)).float().chunk(2, dim=1)   # (B, Z, h, w) each
        return mean, logvar.clamp(-20, 10)

    def decode(self, z: Tensor) -> Tensor:
        return F.pixel_shuffle(self.decoder(z), self.patch).float()        # (B, C, H, W)

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
