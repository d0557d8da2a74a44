"""Normalizing flows trained by exact likelihood (Dinh et al. 2017, RealNVP; Kingma & Dhariwal 2018, Glow)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from atelier.core.batch import Batch
from atelier.core.precision import float32
from atelier.core.ranges import NonNegFloat, PositiveFloat
from atelier.core.rng import ImageRngs
from atelier.images.pixels import to_uint8
from atelier.models.base import Cond, Latent, Likelihood
from atelier.nets.conditioning import ConditionEmbedder
from atelier.nets.normalizing_flow import NormalizingFlowNet

LEVELS = 256  # grey levels of a pixel


class NormalizingFlow(Latent, Likelihood):
    """One invertible net from images to standard normal noise.

    Training follows the run's precision inside the couplings' nets; likelihoods and samples are float32 throughout,
    since there the net is gone through in both directions and rounding must not depend on the batch.

    Args:
        net: (image, condition) -> noise and log-determinant, and its inverse.
        embedder: conditions to one vector.
        temperature: factor of the noise of samples, unless another is asked for; 1 = the model's own distribution.
        optimizer: parameters -> optimizer.
        grad_clip: global gradient norm; None = off.
    """

    idea = (
        "One invertible net turns images into normal noise, and run backwards noise into images. "
        "How much it stretches space at each image gives the exact probability, which training raises."
    )
    formula = (
        "L = -(log N(f(x); 0, 1) + log |det df/dx|) / (D log 2), bits for each of the D numbers of an image,"
        " x: grey levels 0 .. 255 plus uniform noise"
    )
    ema_nets = ("net", "embedder")
    ddp_options = {"find_unused_parameters": True}  # the vector for "no condition"

    def __init__(
        self,
        net: NormalizingFlowNet,
        embedder: ConditionEmbedder,
        temperature: NonNegFloat,
        optimizer: Callable,
        grad_clip: PositiveFloat | None,
    ) -> None:
        super().__init__()
        self.net, self.embedder, self.temperature = net, embedder, temperature
        self.needs = frozenset(embedder.conditions)
        self.optimizer, self.grad_clip = optimizer, grad_clip

    def training_step(self, batch: Batch) -> Tensor:
        x = batch["image"]
        uniform = torch.rand(x.shape, device=x.device)
        nats = self._nats(x, self.condition(batch, ""), uniform)
        bits = nats.mean().float() / (x[0].numel() * math.log(2))
        self.report("bpd", bits)
        return bits

    def _nats(self, x: Tensor, cond: Cond, uniform: Tensor) -> Tensor:
        """-log P of 8-bit images, bounded by the mean density of each pixel's level, (B,) float64.

        Theis et al. 2016, A note on the evaluation of generative models, 3.1: with v uniform within the level,
        noise = f(v) and D numbers in an image, -log N(noise; 0, 1) - log |det df/dv| + D log 256.
        """
        v = (to_uint8(x) + uniform) / LEVELS - 0.5
        noise, logdet = self.net(v, self.embedder.vector(cond, len(x)))
        energy = noise.square().sum(1, dtype=torch.float64) / 2
        return energy - logdet + x[0].numel() * (math.log(2 * math.pi) / 2 + math.log(LEVELS))

    def nll(self, x: Tensor, cond: Cond, rngs: ImageRngs) -> Tensor:
        with float32(x.device):
            return self._nats(x, cond, rngs.rand(*x.shape[1:], device=x.device)).float()

    def sample_latents(self, rngs: ImageRngs, cond: Cond) -> Tensor:
        return rngs.randn(sum(self.net.sizes), device=self.device)

    def generate(self, z: Tensor, cond: Cond, rngs: ImageRngs, *, temperature: float | None = None) -> Tensor:
        """Images (B, C, H, W).

        Args:
            temperature: the noise is multiplied by it; 1 = the model's own distribution, 0 = one image for each
                condition. None: the model's.
        """
        heat = self.temperature if temperature is None else temperature
        with float32(z.device):
            v = self.net.inverse(heat * z, self.embedder.vector(cond, len(z)))
        return v * (LEVELS / 127.5)

    def sample(self, cond: Cond, rngs: ImageRngs, *, temperature: NonNegFloat | None = None) -> Tensor:
        """Images (n, C, H, W); `temperature` as in `generate`."""
        return self.generate(self.sample_latents(rngs, cond), cond, rngs, temperature=temperature)

    def protocol(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "dequantisation": "uniform"}
