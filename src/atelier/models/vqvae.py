"""Vector-quantised variational autoencoder (van den Oord et al. 2017), also with finite scalar quantisation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor

from atelier.core.batch import Batch
from atelier.core.precision import float32
from atelier.core.ranges import PositiveFloat
from atelier.core.rng import ImageRngs
from atelier.models.base import Cond, DiscreteAutoencoder
from atelier.nets.quantizers import perplexity
from atelier.nets.vqvae import VQNet


class VQVAE(DiscreteAutoencoder):
    """Squared error plus what the quantiser asks for, both as means over elements; `sample` shows it without a prior.

    Args:
        net: images to codes and back.
        optimizer: parameters -> optimizer.
        grad_clip: global gradient norm; None = off.
    """

    idea = (
        "An encoder writes an image as a map of entries of a learned codebook, and a decoder reads it. "
        "The codes have no prior of their own: what generates is a second model that writes them."
    )
    formula = "L = mean |x - x'|^2 + commitment, which holds encoder(x) to the entries chosen for it"
    ema_nets = ("net",)
    ddp_options = {"broadcast_buffers": False}  # every rank computes the same codebook

    def __init__(self, net: VQNet, optimizer: Callable, grad_clip: PositiveFloat | None) -> None:
        super().__init__()
        self.net, self.optimizer, self.grad_clip = net, optimizer, grad_clip
        self.n_codes = net.n_codes

    def training_step(self, batch: Batch) -> Tensor:
        x = batch["image"]
        back, quantized = self.net(x)
        reconstruction = F.mse_loss(back, x)
        loss = reconstruction + quantized.loss
        self.report("reconstruction", reconstruction)
        self.report("commitment", quantized.loss)
        self.report("perplexity", perplexity(quantized.codes, self.n_codes))
        self.report("loss", loss)
        return loss

    def sample_latents(self, rngs: ImageRngs, cond: Cond) -> Tensor:
        """Latents of codes that know nothing of each other, each as frequent as lately in training."""
        borders = self.net.quantizer.usage().double().cumsum(0)
        u = rngs.rand(*self.net.code_shape, device=self.device)
        codes = torch.searchsorted(borders, u * borders[-1], right=True)
        return self.net.quantizer.latents(codes)

    def encode(self, x: Tensor, rngs: ImageRngs | None = None) -> Tensor:
        """Latents before quantisation; there is nothing to draw."""
        with self._float32():
            return self.net.encode(x)[0]

    def decode(self, z: Tensor) -> Tensor:
        with self._float32():
            return self.net.decode(z).clamp(-1, 1)

    def codes(self, x: Tensor) -> Tensor:
        with self._float32():
            return self.net.codes(x)

    def _float32(self) -> AbstractContextManager:
        """A latent near the border of two codes must fall to the same side in every batch and for every user."""
        return float32(self.device)
