"""Autoencoder: a latent smaller than the image, and back (Hinton & Salakhutdinov 2006)."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from atelier.core.batch import Batch
from atelier.core.errors import UserError
from atelier.core.precision import float32
from atelier.core.ranges import PositiveFloat
from atelier.core.rng import ImageRngs
from atelier.losses.likelihood import Bernoulli, Gaussian
from atelier.models.base import Autoencoder, Cond
from atelier.nets.codec import Moments
from atelier.nets.contracts import LikelihoodAutoencoder
from atelier.nets.vae import VAENet


class AE(Autoencoder):
    """Deterministic: the mean of the encoder, no noise, no prior.

    It has no prior; `sample_latents` takes a Gaussian with the mean and deviation that each latent had in
    training, so that one sees what decoding such noise gives.

    Args:
        net: images to latents (its variances are not used) and back.
        likelihood: distribution of the image given the decoder's output; a Gaussian of fixed sigma is the squared
            error.
        optimizer: parameters -> optimizer.
        grad_clip: global gradient norm.

    Raises:
        UserError: the latent is as large as the image.
    """

    idea = (
        "An encoder squeezes an image into a small latent, and a decoder draws it anew. "
        "Only the way there and back is learned, so no prior says which latents are images."
    )
    formula = "L = -log p(x | z) / D, z = encoder(x), D numbers in an image"
    ema_nets = ("net",)

    def __init__(
        self, net: VAENet, likelihood: Gaussian | Bernoulli, optimizer: Callable, grad_clip: PositiveFloat | None
    ) -> None:
        super().__init__()
        if math.prod(net.latent_shape) >= math.prod(net.image_shape):
            problem = f"latents {net.latent_shape} are no smaller than images {net.image_shape}"
            raise UserError(".net.latent_channels", net.latent_shape[0], problem, ".net.latent_channels=4")
        self.net, self.likelihood, self.optimizer, self.grad_clip = net, likelihood, optimizer, grad_clip
        self.moments = Moments(net.latent_shape)

    def training_step(self, batch: Batch) -> Tensor:
        x = batch["image"]
        z, _, back = self.net(x, None)
        nll = self.likelihood.nll(x, back).mean()
        self.moments.add(z.detach(), first=self.images_seen == 0)
        self.report("nll", nll)
        loss = nll / x[0].numel()
        self.report("loss", loss)
        return loss

    def sample_latents(self, rngs: ImageRngs, cond: Cond) -> Tensor:
        return self.moments.noise(rngs.randn(*self.net.latent_shape, device=self.device))

    def encode(self, x: Tensor, rngs: ImageRngs | None = None) -> Tensor:
        with float32(self.device):
            return self.net.encode(x)[0]

    def decode(self, z: Tensor) -> Tensor:
        with float32(self.device):
            return self.likelihood.image(self.net.decode(z))

    def part(self) -> LikelihoodAutoencoder:
        return LikelihoodAutoencoder(self.net, self.likelihood.image, deterministic=True)
