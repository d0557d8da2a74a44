"""Generative adversarial network with a condition (Goodfellow et al. 2014; Miyato & Koyama 2018), R1-regularised."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from atelier.batch import Batch
from atelier.losses.adversarial import non_saturating_discriminator, non_saturating_generator
from atelier.losses.regularizers import r1
from atelier.models.base import Cond, Latent
from atelier.nets.conditioning import Condition
from atelier.nets.gan import DiscriminatorNet, GeneratorNet
from atelier.ranges import NonNegFloat, PositiveFloat, PositiveInt
from atelier.rng import ImageRngs


class GAN(Latent):
    """Two nets, two optimizers, stepped by hand: each batch is a discriminator step, each n_critic-th a generator step.

    Args:
        generator: (z, condition) -> image.
        discriminator: (image, condition) -> logit.
        generator_embedder, discriminator_embedder: conditions to a vector, one for each player.
        r1_gamma: weight of R1; it is computed at every `r1_every`-th batch and weighted up by as much.
        n_critic: discriminator steps per generator step.
        generator_optimizer, discriminator_optimizer: parameters -> optimizer.
        grad_clip: global gradient norm of either player.
    """

    averaged = ("generator", "generator_embedder")
    strategy = {"find_unused_parameters": True}

    def __init__(
        self,
        generator: GeneratorNet,
        discriminator: DiscriminatorNet,
        generator_embedder: Condition,
        discriminator_embedder: Condition,
        r1_gamma: NonNegFloat,
        r1_every: PositiveInt,
        n_critic: PositiveInt,
        generator_optimizer: Callable,
        discriminator_optimizer: Callable,
        grad_clip: PositiveFloat | None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.generator_embedder = generator, generator_embedder
        self.discriminator, self.discriminator_embedder = discriminator, discriminator_embedder
        self.needs = frozenset(generator_embedder.conditions)
        self.r1_gamma, self.r1_every, self.n_critic = r1_gamma, r1_every, n_critic
        self.generator_optimizer, self.discriminator_optimizer = generator_optimizer, discriminator_optimizer
        self.grad_clip = grad_clip

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        generator_optimizer, discriminator_optimizer = self.optimizers()
        self._discriminator_step(batch, discriminator_optimizer, penalise=batch_idx % self.r1_every == 0)
        if (batch_idx + 1) % self.n_critic == 0:
            self._generator_step(batch, generator_optimizer)

    def _discriminator_step(self, batch: Batch, optimizer: Optimizer, penalise: bool) -> None:
        cond = self.condition(batch, "")
        real = batch["image"].requires_grad_(penalise)
        with torch.no_grad():
            fake = self._fake(cond, len(real))
        known = self.discriminator_embedder(cond, len(real))
        real_logits, fake_logits = self.discriminator(real, known), self.discriminator(fake, known)
        loss = non_saturating_discriminator(real_logits, fake_logits)
        self.report("discriminator", loss)
        self.report("real_logit", real_logits.mean())
        self.report("fake_logit", fake_logits.mean())
        if penalise and self.r1_gamma > 0:
            penalty = r1(real_logits, real)
            self.report("r1", penalty)
            loss = loss + self.r1_gamma / 2 * self.r1_every * penalty
        self.step(optimizer, loss)

    def _generator_step(self, batch: Batch, optimizer: Optimizer) -> None:
        cond = self.condition(batch, "")
        n = len(batch["image"])
        logits = self.discriminator(self._fake(cond, n), self.discriminator_embedder(cond, n))
        loss = non_saturating_generator(logits)
        self.report("generator", loss)
        self.step(optimizer, loss)

    def _fake(self, cond: Cond, n: int) -> Tensor:
        z = torch.randn(n, self.generator.noise_dim, device=self.device)
        return self.generator(z, self.generator_embedder(cond, n))

    def configure_optimizers(self) -> list[Optimizer]:
        players = [self.generator, self.generator_embedder], [self.discriminator, self.discriminator_embedder]
        ours, theirs = ([p for net in nets for p in net.parameters()] for nets in players)
        return [self.generator_optimizer(ours), self.discriminator_optimizer(theirs)]

    def draw(self, rngs: ImageRngs, cond: Cond) -> Tensor:
        return rngs.randn(self.generator.noise_dim, device=self.device)

    def render(self, z: Tensor, cond: Cond, rngs: ImageRngs) -> Tensor:
        return self.generator(z, self.generator_embedder(cond, len(z)))
