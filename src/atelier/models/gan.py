"""Generative adversarial networks (Goodfellow et al. 2014) with and without a condition."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from atelier.core.batch import Batch
from atelier.core.errors import UserError
from atelier.core.precision import float32
from atelier.core.ranges import NonNegFloat, PositiveFloat, PositiveInt
from atelier.core.rng import ImageRngs
from atelier.losses.adversarial import Adversarial
from atelier.models.base import Cond, Latent
from atelier.models.two_players import TwoPlayers, no_weight_grads
from atelier.nets.augment import ADA, DiffAugment
from atelier.nets.conditioning import ConditionEmbedder, NoCondition


class GAN(TwoPlayers, Latent):
    """Two nets, two optimizers, stepped by hand: each batch is a discriminator step, each n_critic-th a generator step.

    Penalties on the discriminator's gradient are computed at every `penalty_every`-th batch and weighted up by as much:
    at 1 as a part of the loss, else as a step of their own, for which the optimizer is corrected
    (Karras et al. 2020, StyleGAN2, appendix B).

    Args:
        generator: (z, condition) -> image.
        discriminator: (image, condition) -> logits (B,) and, where it is a classifier, logits of the classes (B, K).
        generator_embedder, discriminator_embedder: conditions to a vector, one for each player; None: there are none.
        loss: losses of the two players.
        augment: change of all that the discriminator sees; None: nothing.
        r1_gamma, r2_gamma: weights of its squared gradient at real and at generated images, each halved.
        gp_weight: weight of the penalty for a gradient whose length is not 1 (WGAN-GP).
        penalty_every: batches.
        classifier_weight: weight of the cross-entropy of the label, for both players.
        n_critic: discriminator steps per generator step.
        categorical_codes: numbers of values. Each code takes the place of so many numbers of the noise, of which one,
            each as likely, is not 0 (Chen et al. 2016, InfoGAN, section 4, here without the loss that tells codes
            apart); the other numbers are normal. What an image either has or has not needs no steep slope then.
        generator_optimizer, discriminator_optimizer: parameters -> optimizer.
        grad_clip: global gradient norm of either player.

    Raises:
        UserError: a penalty on a discriminator with batch norm; codes that the noise has no room for.
    """

    idea = (
        "A generator makes images of noise, and a discriminator learns to tell them from real ones. "
        "The generator learns whatever makes the discriminator take its images for real."
    )
    formula = (
        "L_D = E l_D(D(x), D(G(z))) + gamma/2 E |dD/dx|^2, R3GAN also at G(z)\n"
        "L_G = E l_G(D(x), D(G(z))), where relativistic losses alone look at D(x)"
    )
    ema_nets = ("generator", "generator_embedder")
    players = ("generator", "generator_embedder"), ("discriminator", "discriminator_embedder")

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        generator_embedder: ConditionEmbedder | None,
        discriminator_embedder: ConditionEmbedder | None,
        loss: Adversarial,
        augment: DiffAugment | ADA | None,
        r1_gamma: NonNegFloat,
        r2_gamma: NonNegFloat,
        gp_weight: NonNegFloat,
        penalty_every: PositiveInt,
        classifier_weight: NonNegFloat,
        n_critic: PositiveInt,
        generator_optimizer: Callable,
        discriminator_optimizer: Callable,
        grad_clip: PositiveFloat | None,
        categorical_codes: list[PositiveInt] | None = None,
    ) -> None:
        super().__init__(loss, generator_optimizer, discriminator_optimizer, grad_clip, augment)
        self.penalised = max(r1_gamma, r2_gamma, gp_weight) > 0
        if self.penalised and not discriminator.per_sample:
            problem = "with batch norm a gradient is not of one image"
            raise UserError(".discriminator.norm", "batch", problem, ".discriminator.norm=none")
        self.generator, self.generator_embedder = generator, generator_embedder or NoCondition()
        self.discriminator, self.discriminator_embedder = discriminator, discriminator_embedder or NoCondition()
        self.needs = frozenset(self.generator_embedder.conditions)
        self.r1_gamma, self.r2_gamma, self.gp_weight = r1_gamma, r2_gamma, gp_weight
        self.penalty_every, self.classifier_weight, self.n_critic = penalty_every, classifier_weight, n_critic
        self.lazy_every = 0, penalty_every if self.penalised else 0
        self.categorical_codes = categorical_codes or []
        if (codes := sum(self.categorical_codes)) > generator.noise_dim:
            problem = f"their one-hot vectors are longer than the noise of {generator.noise_dim}"
            raise UserError(".categorical_codes", categorical_codes, problem, f".generator.noise_dim={codes}")

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        generator_optimizer, discriminator_optimizer = self.optimizers()
        penalise = self.penalised and batch_idx % self.penalty_every == 0
        self._discriminator_step(batch, discriminator_optimizer, penalise and self.penalty_every == 1)
        if penalise and self.penalty_every > 1:
            self._penalty_step(batch, discriminator_optimizer)
        if (batch_idx + 1) % self.n_critic == 0:
            self._generator_step(batch, generator_optimizer)

    def _discriminator_step(self, batch: Batch, optimizer: Optimizer, penalise: bool) -> None:
        real, fake, known = self._shown(batch, penalise)
        with float32(self.device, real.requires_grad):  # what a penalty is of, and no other pass
            real_logits, real_classes = self.discriminator(real, known)
        with float32(self.device, fake.requires_grad):
            fake_logits, fake_classes = self.discriminator(fake, known)
        loss = self.loss.discriminator(real_logits, fake_logits)
        self.report_adversarial(loss, real_logits, fake_logits)
        if real_classes is not None:
            loss = loss + self._classified(torch.cat([real_classes, fake_classes]), batch["label"].repeat(2))
        if penalise:
            loss = loss + self._penalty(real, fake, known, real_logits, fake_logits)
        self.step(optimizer, loss, "discriminator", penalise)

    def _penalty_step(self, batch: Batch, optimizer: Optimizer) -> None:
        real, fake, known = self._shown(batch, penalise=True, alone=True)
        with float32(self.device):
            real_logits = self.discriminator(real, known)[0] if self.r1_gamma > 0 else None
            fake_logits = self.discriminator(fake, known)[0] if self.r2_gamma > 0 else None
            penalty = self._penalty(real, fake, known, real_logits, fake_logits)
        self.step(optimizer, self.penalty_every * penalty, "penalty", True)

    def _penalty(
        self, real: Tensor, fake: Tensor, known: Tensor, real_logits: Tensor | None, fake_logits: Tensor | None
    ) -> Tensor:
        """gamma1 / 2 R1 + gamma2 / 2 R2 + weight times what WGAN-GP adds: scalar."""
        loss = self.zero_centred_penalty("r1", self.r1_gamma, real_logits, real)
        loss = loss + self.zero_centred_penalty("r2", self.r2_gamma, fake_logits, fake)
        return loss + self.one_centred(self.gp_weight, self._logits_of(known), real.detach(), fake.detach())

    def _logits_of(self, known: Tensor) -> Callable[[Tensor], Tensor]:
        """Images of this condition to logits."""
        return lambda x: self.discriminator(x, known)[0]

    def _generator_step(self, batch: Batch, optimizer: Optimizer) -> None:
        cond, n = self.condition(batch, ""), len(batch["image"])
        known = self.discriminator_embedder.vector(cond, n).detach()
        fake = self.seen(self._fake(cond, n))
        with no_weight_grads(self.discriminator):
            fake_logits, classes = self.discriminator(fake, known)
            real_logits = self.compared(self._logits_of(known), batch["image"])
        loss = self.loss.generator(real_logits, fake_logits)
        self.report("generator", loss)
        if classes is not None:
            loss = loss + self._classified(classes, batch["label"])
        self.step(optimizer, loss, "generator")

    def _classified(self, classes: Tensor, label: Tensor) -> Tensor:
        """How badly the discriminator tells labels (Odena et al. 2017, AC-GAN, L_C)."""
        loss = F.cross_entropy(classes, label)
        self.report("classifier", loss)
        return self.classifier_weight * loss

    def _shown(self, batch: Batch, penalise: bool, alone: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Real and generated images as the discriminator sees them, and what it knows of both.

        Gradients end at the augmented images: penalties are of the discriminator where it is used. Where penalties are
        `alone` and R1 is the only one, nothing is generated: real images stand in, once more augmented, so that the
        random numbers which follow are those that they were.
        """
        cond, n = self.condition(batch, ""), len(batch["image"])
        generate = not alone or self.r2_gamma > 0 or self.gp_weight > 0
        with torch.no_grad():
            real = self.seen(batch["image"])
            fake = self.seen(self._fake(cond, n)) if generate else self._drawn_alike(batch["image"])
        known = self.discriminator_embedder.vector(cond, n).float()
        real.requires_grad_(penalise and self.r1_gamma > 0)
        return real, fake.requires_grad_(penalise and self.r2_gamma > 0), known

    def _drawn_alike(self, x: Tensor) -> Tensor:
        """Images, for which as many numbers are drawn as for generated ones, and in the same order."""
        torch.randn(len(x), self.generator.noise_dim, device=self.device)
        return self.seen(x).detach()

    def _fake(self, cond: Cond, n: int) -> Tensor:
        z = self._coded(torch.randn(n, self.generator.noise_dim, device=self.device))
        return self.generator(z, self.generator_embedder.vector(cond, n))

    def _coded(self, z: Tensor) -> Tensor:
        """Noise (B, Z) with its first numbers as codes: of n numbers the largest becomes sqrt(n), the others 0."""
        *groups, rest = z.split([*self.categorical_codes, z.shape[1] - sum(self.categorical_codes)], dim=1)
        hot = [F.one_hot(group.argmax(1), group.shape[1]) * math.sqrt(group.shape[1]) for group in groups]
        return torch.cat([*hot, rest], dim=1)

    def sample_latents(self, rngs: ImageRngs, cond: Cond) -> Tensor:
        return self._coded(rngs.randn(self.generator.noise_dim, device=self.device))

    def generate(self, z: Tensor, cond: Cond, rngs: ImageRngs) -> Tensor:
        return self.generator(z, self.generator_embedder.vector(cond, len(z)))
