"""Variational autoencoder (Kingma & Welling 2014; Rezende et al. 2014)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from atelier.core.batch import Batch
from atelier.core.precision import float32
from atelier.core.ranges import NonNegFloat, NonNegInt, PositiveFloat, PositiveInt
from atelier.core.rng import ImageRngs
from atelier.losses.kl import kl_to_standard_normal, with_free_bits
from atelier.losses.likelihood import Bernoulli, Gaussian
from atelier.models.base import Autoencoder, Cond, Likelihood
from atelier.nets.contracts import LikelihoodAutoencoder
from atelier.nets.vae import VAENet


class VAE(Autoencoder, Likelihood):
    """Standard normal prior, diagonal Gaussian posterior.

    Args:
        net: images to posterior, latents to images.
        likelihood: p(x | z).
        beta: weight of the KL term; 1 is the ELBO (Higgins et al. 2017).
        beta_warmup_images: images over which beta rises linearly from 0.
        free_bits: nats that each latent channel may hold at no cost (Kingma et al. 2016); 0 = off.
        nll_samples: posterior draws per image of the importance-sampled likelihood; more are tighter.
        optimizer: parameters -> optimizer.
        grad_clip: global gradient norm.
    """

    idea = (
        "An encoder says which latents an image may have, and a decoder draws an image of one of them. "
        "Their distribution is held to a standard normal, from which new latents are then drawn."
    )
    formula = "L = (E_q(z|x) [-log p(x | z)] + beta KL(q(z | x) || N(0, 1))) / D, D numbers in an image"
    ema_nets = ("net", "likelihood")

    def __init__(
        self,
        net: VAENet,
        likelihood: Gaussian | Bernoulli,
        beta: NonNegFloat,
        beta_warmup_images: NonNegInt,
        free_bits: NonNegFloat,
        nll_samples: PositiveInt,
        optimizer: Callable,
        grad_clip: PositiveFloat | None,
    ) -> None:
        super().__init__()
        self.net, self.likelihood, self.nll_samples = net, likelihood, nll_samples
        self.beta, self.beta_warmup_images, self.free_bits = beta, beta_warmup_images, free_bits
        self.optimizer, self.grad_clip = optimizer, grad_clip

    def training_step(self, batch: Batch) -> Tensor:
        x = batch["image"]
        mean, logvar, back = self.net(x, torch.randn(len(x), *self.net.latent_shape, device=x.device))
        nll = self.likelihood.nll(x, back).mean()
        kl = kl_to_standard_normal(mean, logvar)
        risen = min(1.0, self.images_seen / self.beta_warmup_images) if self.beta_warmup_images else 1.0
        loss = (nll + self.beta * risen * with_free_bits(kl, self.free_bits)) / x[0].numel()
        self.report("nll", nll)
        self.report("kl", kl.flatten(1).sum(1).mean())
        self.report("loss", loss)
        return loss

    def nll(self, x: Tensor, cond: Cond, rngs: ImageRngs) -> Tensor:
        """The importance-sampled bound -log 1/K sum_k p(x, z_k) / q(z_k | x), K = nll_samples, (B,) nats.

        Burda et al. 2016, eq. 8; with K = 1 it is the negative ELBO.
        """
        uniform, terms = rngs.rand(*x.shape[1:], device=x.device), []
        with float32(x.device):
            mean, logvar = self.net.encode(x)
            for _ in range(self.nll_samples):
                eps = rngs.randn(*mean.shape[1:], device=x.device)
                z = mean + (0.5 * logvar).exp() * eps
                ratio = ((z**2 - eps**2 - logvar) / 2).flatten(1).sum(1)  # log q(z | x) - log p(z)
                terms.append(-ratio - self.likelihood.nll_8bit(x, self.net.decode(z), uniform))
        return math.log(self.nll_samples) - torch.stack(terms).logsumexp(0)

    def sample_latents(self, rngs: ImageRngs, cond: Cond) -> Tensor:
        return rngs.randn(*self.net.latent_shape, device=self.device)

    def encode(self, x: Tensor, rngs: ImageRngs | None = None) -> Tensor:
        with float32(self.device):
            mean, logvar = self.net.encode(x)
        if rngs is None:
            return mean
        return mean + (0.5 * logvar).exp() * rngs.randn(*mean.shape[1:], device=mean.device)

    def decode(self, z: Tensor) -> Tensor:
        with float32(self.device):
            return self.likelihood.image(self.net.decode(z))

    def part(self) -> LikelihoodAutoencoder:
        return LikelihoodAutoencoder(self.net, self.likelihood.image)

    def protocol(self) -> dict[str, Any]:
        return {"nll_samples": self.nll_samples, "likelihood": type(self.likelihood).__name__}
