"""Images to latents of about unit size and back: the one owner of a first stage's range and scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from atelier.nets.frozen import Frozen
from atelier.ranges import PositiveFloat


class LatentCodec(nn.Module):
    """z = (encode(x) - shift) * scale, x = decode(z / scale + shift), x in [-1, 1], in float32.

    Args:
        autoencoder: a frozen net with encode(x) -> (mean, logvar) and decode(z).
        scale: None: measured once, so that the latents' standard deviation is 1 (Rombach et al. 2022, section G).
        shift: subtracted before scaling.
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

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Latents (B, Z, h, w) of images (B, C, H, W)."""
        with torch.autocast(x.device.type, enabled=False):
            mean, logvar = self.autoencoder.net.encode(x)
        z = mean if self.mode == "mode" else mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        return (z - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Images (B, C, H, W) of latents (B, Z, h, w)."""
        with torch.autocast(z.device.type, enabled=False):
            return self.autoencoder.net.decode(z.float() / self.scale + self.shift)

    @torch.no_grad()
    def measure(self, x: Tensor, reduce_mean: Callable[[Tensor], Tensor]) -> None:
        """Where scale is not given, set it to 1 / std of these images' latents; `reduce_mean` averages over ranks."""
        if self._known or self.scale > 0:
            self._known = True  # no look at the device in every step
            return
        with torch.autocast(x.device.type, enabled=False):
            mean, logvar = self.autoencoder.net.encode(x)
        second = mean**2 + (logvar.exp() if self.mode == "sample" else 0)
        centre, power = reduce_mean(mean.mean()), reduce_mean(second.mean())
        self.scale.copy_((power - centre**2).rsqrt())
