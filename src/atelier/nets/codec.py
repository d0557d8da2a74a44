"""Latents of about unit size, made of images and back, and what latents were like in training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from atelier.core import ranks
from atelier.core.errors import UserError
from atelier.core.precision import float32
from atelier.core.ranges import PositiveFloat, PositiveInt, Tile
from atelier.nets.frozen import Frozen
from atelier.nets.tiles import by_tiles

MOMENTUM = 0.02  # of latents' moments, per batch
GIVEN_CHECK = 64  # images whose latents tell how well a given scale fits


class LatentCodec(nn.Module):
    """z = (encode(x) - shift) * scale, x = decode(z / scale + shift), x in [-1, 1], in float32.

    Args:
        autoencoder: a frozen net with encode(x) -> (mean, logvar) and decode(z).
        scale: factor of the latents; None: measured before training, so that their deviation is 1 (Rombach et al. 2022,
            section G); until then it is 1.
        shift: number subtracted before scaling.
        mode: "mode" encodes to the mean, "sample" draws from the posterior.
        n_measured: images that the scale is measured on, or all of them where there are fewer.
        tile: side in latents of the tiles that larger maps are encoded and decoded by; None: they are whole.
    """

    scale: Tensor

    def __init__(
        self,
        autoencoder: Frozen,
        scale: PositiveFloat | None,
        shift: float,
        mode: Literal["mode", "sample"],
        n_measured: PositiveInt = 10_000,
        tile: Tile | None = None,
    ) -> None:
        super().__init__()
        self.tile = tile
        self.autoencoder, self.shift, self.mode, self.n_measured = autoencoder, shift, mode, n_measured
        self.given = scale is not None
        self.register_buffer("scale", torch.tensor(scale or 1.0))              # saved: never measured again

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(Z, h, w) of a latent."""
        return self.autoencoder.net.latent_shape

    def encode(self, x: Tensor) -> Tensor:
        """Latents (B, Z, h, w) of images (B, C, H, W)."""
        return self.draw(self.moments(x))

    @torch.no_grad()
    def moments(self, x: Tensor) -> Tensor:
        """Mean and log-variance (B, 2 Z, h, w), neither shifted nor scaled, of the latents of images (B, C, H, W)."""
        net = self.autoencoder.net
        tile = self.tile * (x.shape[3] // self.latent_shape[2]) if self.tile else max(x.shape[2:])
        with float32(x.device):
            return by_tiles(lambda part: torch.cat(net.encode(part), 1), x, tile)

    @torch.no_grad()
    def draw(self, moments: Tensor) -> Tensor:
        """Latents (B, Z, h, w) of what `moments` gave."""
        mean, logvar = moments.contiguous().chunk(2, 1)  # noise is drawn in the order of the memory
        z = mean if self.mode == "mode" else mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        return (z - self.shift) * self.scale

    @torch.no_grad()
    def centre(self, x: Tensor) -> Tensor:
        """Latents (B, Z, h, w) of images (B, C, H, W), the mean of their posterior whatever the mode."""
        return (self.mode_of(x) - self.shift) * self.scale

    @torch.no_grad()
    def mode_of(self, x: Tensor) -> Tensor:
        """The mean of the posterior as the autoencoder gives it, neither shifted nor scaled, (B, Z, h, w)."""
        return self.moments(x).chunk(2, 1)[0]

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Images (B, C, H, W) of latents (B, Z, h, w)."""
        z = z.float() / self.scale + self.shift
        with float32(z.device):
            return by_tiles(self.autoencoder.net.decode, z, self.tile or max(z.shape[2:]))

    @torch.no_grad()
    def measure(self, images: Callable[[int], Iterable[Tensor]]) -> str:
        """Set the scale to 1 / deviation of latents of images, all ranks', unless it was given; gives a line about it.

        A deviation is that of all numbers of all latents, noise of the posterior included where `mode` draws it.

        Args:
            images: number of images -> this rank's share of so many, in batches (B, C, H, W).

        Raises:
            UserError: latents are not finite, or all alike.
        """
        n, mean, second = self._powers(images(GIVEN_CHECK if self.given else self.n_measured))
        variance = second.mean() - mean.mean() ** 2
        if not variance.isfinite() or variance <= 0:
            why = "all alike" if variance.isfinite() else "not finite"
            given = self.scale.item() if self.given else "null"
            fix = ".scale=NUMBER, or another first stage"
            raise UserError(".scale", given, f"latents of these images are {why}", fix)
        if not self.given:
            self.scale.copy_(variance.rsqrt())
        scale = self.scale.item()
        deviations = (second - mean**2).clamp(min=0).sqrt() * scale            # (Z,), of each channel
        how = "as given" if self.given else "measured"
        return (
            f"latents: scale {scale:.4g} {how}; deviation {variance.sqrt().item() * scale:.3f} after scaling,"
            f" {deviations.min().item():.2f} to {deviations.max().item():.2f} by channel ({n:,} images)"
        )

    def _powers(self, batches: Iterable[Tensor]) -> tuple[int, Tensor, Tensor]:
        """Number of images of all ranks, and first and second moment of each channel of their latents, (Z,) float64."""
        channels, *places = self.autoencoder.net.latent_shape
        total = torch.zeros(1 + 2 * channels, dtype=torch.float64, device=self.scale.device)
        for x in batches:
            mean, logvar = self.moments(x).chunk(2, 1)
            second = mean.double() ** 2 + (logvar.double().exp() if self.mode == "sample" else 0)
            total[0] += len(x)
            total[1:] += torch.cat([mean.double().sum((0, 2, 3)), second.sum((0, 2, 3))])
        n = (total := ranks.summed(total))[0].item()
        mean, second = (total[1:] / (n * math.prod(places))).chunk(2)
        return round(n), mean, second


class Moments(nn.Module):
    """First and second moment of latents over about the last 1 / MOMENTUM batches.

    Args:
        shape: (Z, h, w), moments of each number of a latent, or (Z, 1, 1), of each channel.
    """

    mean: Tensor
    second: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("second", torch.ones(shape))

    def add(self, z: Tensor, first: bool) -> None:
        """A batch of latents (B, Z, h, w); the first is taken whole."""
        momentum = 1.0 if first else MOMENTUM
        shared = [k for k, n in enumerate(self.mean.shape, 1) if n != z.shape[k]]
        self.mean.lerp_(z.mean([0, *shared]).view_as(self.mean), momentum)
        self.second.lerp_(z.square().mean([0, *shared]).view_as(self.second), momentum)

    def noise(self, eps: Tensor) -> Tensor:
        """Standard normal numbers (n, Z, h, w) with these moments instead."""
        return self.mean + (self.second - self.mean**2).clamp(min=0).sqrt() * eps
