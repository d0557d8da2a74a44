"""A small convolutional encoder and decoder with a spatial latent."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from atelier.core.errors import UserError
from atelier.core.ranges import PositiveInt
from atelier.nets.layers import Residual, norm, zeroed


class VAENet(nn.Module):
    """Images to the mean and log-variance of a latent, latents to images.

    Args:
        image_size: side of the images; halves evenly `n_downs` times.
        image_channels: channels of the images.
        width: channels of the largest maps, doubled at each halving.
        n_downs: halvings.
        latent_channels: channels of the latent, whose size is image_size / patch / 2**n_downs.
        patch_size: 2 folds 2x2 pixels into channels first, so every map is half as large; None: folds down to 16x16
            maps.

    Raises:
        UserError: the image size does not halve evenly.
    """

    def __init__(
        self,
        *,
        image_size: PositiveInt,
        image_channels: PositiveInt,
        width: PositiveInt,
        n_downs: PositiveInt,
        latent_channels: PositiveInt,
        patch_size: PositiveInt | None,
    ) -> None:
        super().__init__()
        patch_size = patch_size or max(1, image_size // 16)
        step = patch_size * 2**n_downs
        if image_size % step:
            nearest = max(1, round(image_size / step)) * step
            problem = f"patches of {patch_size} and {n_downs} halvings need a multiple of {step}"
            raise UserError("data.image_size", image_size, problem, f"data.image_size={nearest}")
        self.image_shape = (image_channels, image_size, image_size)
        self.latent_shape = (latent_channels, image_size // step, image_size // step)
        self.encoder = encoder(image_channels, width, patch_size, n_downs, 1, 2 * latent_channels)
        self.decoder = decoder(latent_channels, width, patch_size, n_downs, 1, image_channels)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z | x), float32, log-variance within [-20, 10]."""
        mean, logvar = self.encoder(x).float().chunk(2, dim=1)   # (B, Z, h, w) each
        return mean, logvar.clamp(-20, 10)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z).float()                                     # (B, C, H, W)

    def forward(self, x: Tensor, eps: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, log-variance and decoded mean + std eps, or with None the decoded mean: what training goes through."""
        mean, logvar = self.encode(x)
        return mean, logvar, self.decode(mean if eps is None else mean + (0.5 * logvar).exp() * eps)


def encoder(pixels: int, width: int, patch_size: int, n_downs: int, n_blocks: int, n_out: int) -> nn.Sequential:
    """Images (B, `pixels`, H, W), folded by `patch_size` and halved `n_downs` times, to maps (B, n_out, h, w)."""
    widths = [width * 2**i for i in range(n_downs + 1)]
    stem = nn.Conv2d(pixels * patch_size**2, width, 3, padding=1)
    layers = [nn.PixelUnshuffle(patch_size), stem, *residuals(width, n_blocks)]
    for small, large in pairwise(widths):
        layers += [nn.Conv2d(small, large, 4, stride=2, padding=1), *residuals(large, n_blocks)]
    return nn.Sequential(*layers, norm(widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], n_out, 1))


def decoder(n_in: int, width: int, patch_size: int, n_downs: int, n_blocks: int, pixels: int) -> nn.Sequential:
    """Maps (B, n_in, h, w) to images (B, `pixels`, H, W): the way back of `encoder`.

    A fold of more numbers than `width` ends in `Unfold`.
    """
    widths = [width * 2**i for i in range(n_downs + 1)]
    layers = [nn.Conv2d(n_in, widths[-1], 3, padding=1), *residuals(widths[-1], n_blocks)]
    for large, small in pairwise(widths[::-1]):
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(large, small, 3, padding=1), *residuals(small, n_blocks)]
    return nn.Sequential(*layers, norm(width), nn.SiLU(), *_unfolded(width, patch_size, pixels))


def _unfolded(width: int, patch_size: int, pixels: int) -> list[nn.Module]:
    last = nn.Conv2d(width, pixels * patch_size**2, 3, padding=1)
    return [last, nn.PixelShuffle(patch_size)] if pixels * patch_size**2 <= width else [Unfold(last, patch_size)]


class Unfold(nn.Module):
    """Maps to pixels where a fold holds more of them than there are maps.

    A convolution has only as many pictures of a fold to add up as there are maps; beside it, 4 maps a colour at full
    size draw what these leave out, and start with nothing.
    """

    def __init__(self, coarse: nn.Conv2d, patch_size: int) -> None:
        super().__init__()
        self.coarse, self.patch_size, n = coarse, patch_size, 4 * coarse.out_channels
        self.spread = nn.Conv2d(coarse.in_channels, n, 1)
        self.last = zeroed(nn.Conv2d(n // patch_size**2, coarse.out_channels // patch_size**2, 3, padding=1))

    def forward(self, maps: Tensor) -> Tensor:
        """`maps` (B, width, H / patch, W / patch), activated, to (B, C, H, W)."""
        coarse, fine = (F.pixel_shuffle(conv(maps), self.patch_size) for conv in (self.coarse, self.spread))
        return coarse + self.last(F.silu(fine))


def residuals(width: int, n: int) -> list[nn.Module]:
    return [Residual(width, width) for _ in range(n)]
