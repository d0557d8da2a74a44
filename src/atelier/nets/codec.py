"""Latents of about unit size, made of images and back, and what latents were like in training."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from atelier.core import ranks
from atelier.core.precision import float32
from atelier.core.ranges import PositiveFloat
from atelier.nets.frozen import Frozen

MOMENTUM = 0.02  # of latents' moments, per batch


class LatentCodec(nn.Module):
    """z = (encode(x) - shift) * scale, x = decode(z / scale + shift), x in [-1, 1], in float32.

    Args:
        autoencoder: a frozen net with encode(x) -> (mean, logvar) and decode(z).
        scale: factor of the latents; None: measured once, so that their deviation is 1 (Rombach et al. 2022, section
            G).
        shift: number subtracted before scaling.
        mode: "mode" encodes to the mean, "sample" draws from the posterior.
    """

    scale: Tensor

    def __init__(
        self, autoencoder: Frozen, scale: PositiveFloat | None, shift: float, mode: Literal["mode", "sample"]
    ) -> None:
        super().__init__()
        self.autoencoder, self.shift, self.mode = autoencoder, shift, mode
        self._known = False
        self.register_buffer("scale", torch.tensor(scale or 0.0))  # saved: never measured again

    def encode(self, x: Tensor) -> Tensor:
        """Latents (B, Z, h, w) of images (B, C, H, W)."""
        return self.draw(self.moments(x))

    @torch.no_grad()
    def moments(self, x: Tensor) -> Tensor:
        """Mean and log-variance (B, 2 Z, h, w), neither shifted nor scaled, of the latents of images (B, C, H, W)."""
        with float32(x.device):
            return torch.cat(self.autoencoder.net.encode(x), 1)

    @torch.no_grad()
    def draw(self, moments: Tensor) -> Tensor:
        """Latents (B, Z, h, w) of what `moments` gave."""
        mean, logvar = moments.contiguous().chunk(2, 1)  # noise is drawn in the order of the memory
        z = mean if self.mode == "mode" else mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        return (z - self.shift) * self.scale

    @torch.no_grad()
    def centre(self, x: Tensor) -> Tensor:
        """Latents (B, Z, h, w) of images (B, C, H, W), the mean of their posterior whatever the mode."""
        with float32(x.device):
            mean, _ = self.autoencoder.net.encode(x)
        return (mean - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Images (B, C, H, W) of latents (B, Z, h, w)."""
        with float32(z.device):
            return self.autoencoder.net.decode(z.float() / self.scale + self.shift)

    def measure(self, x: Tensor) -> None:
        """Where scale is not given, set it to 1 / std of the latents of these images, all ranks'."""
        self.measure_moments(self.moments(x))

    @torch.no_grad()
    def measure_moments(self, moments: Tensor) -> None:
        """`measure` of what `moments` gave."""
        if self._known or self.scale > 0:
            self._known = True  # no look at the device in every step
            return
        mean, logvar = moments.chunk(2, 1)
        second = mean**2 + (logvar.exp() if self.mode == "sample" else 0)
        centre, power = ranks.mean(mean.mean()), ranks.mean(second.mean())
        self.scale.copy_((power - centre**2).rsqrt())


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
