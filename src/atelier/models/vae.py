"""Variational autoencoder (Kingma & Welling 2014)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from atelier.batch import Batch
from atelier.losses.kl import kl_to_standard_normal
from atelier.models.base import Autoencoder, Cond, Latent
from atelier.nets.vae import VAENet
from atelier.ranges import NonNegFloat, PositiveFloat
from atelier.rng import ImageRngs


class VAE(Latent, Autoencoder):
    """Gaussian likelihood of fixed width, standard normal prior.

    Args:
        net: images to posterior, latents to images.
        sigma: standard deviation of p(x | z), in units of x.
        beta: weight of the KL term; 1 is the ELBO.
        optimizer: parameters -> optimizer.
        grad_clip: global gradient norm.
    """

    averaged = ("net",)

    def __init__(
        self,
        net: VAENet,
        sigma: PositiveFloat,
        beta: NonNegFloat,
        optimizer: Callable,
        grad_clip: PositiveFloat | None,
    ) -> None:
        super().__init__()
        self.net, self.sigma, self.beta, self.optimizer, self.grad_clip = net, sigma, beta, optimizer, grad_clip

    def training_step(self, batch: Batch) -> Tensor:
        x = batch["image"]
        mean, logvar = self.net(x)
        z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        nll = self.nll(x, self.net.decode(z)).mean()
        kl = kl_to_standard_normal(mean, logvar).mean()
        self.report("nll", nll)
        self.report("kl", kl)
        loss = (nll + self.beta * kl) / x[0].numel()
        self.report("loss", loss)
        return loss

    def nll(self, x: Tensor, mean: Tensor) -> Tensor:
        """-log N(x; mean, sigma^2) of each image in nats, summed over pixels, (B,)."""
        constant = math.log(self.sigma * math.sqrt(2 * math.pi))
        return (((x - mean) / self.sigma) ** 2 / 2 + constant).flatten(1).sum(1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.net.parameters())

    def draw(self, rngs: ImageRngs, cond: Cond) -> Tensor:
        return rngs.randn(*self.net.latent_shape, device=self.device)

    def render(self, z: Tensor, cond: Cond, rngs: ImageRngs) -> Tensor:
        return self.decode(z)

    def encode(self, x: Tensor, rngs: ImageRngs | None = None) -> Tensor:
        mean, logvar = self.net.encode(x)
        if rngs is None:
            return mean
        return mean + (0.5 * logvar).exp() * rngs.randn(*mean.shape[1:], device=mean.device)

    def decode(self, z: Tensor) -> Tensor:
        return self.net.decode(z).clamp(-1, 1)
