"""Progressive GAN (Karras et al. 2018, Progressive Growing of GANs)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from atelier.core.batch import Batch
from atelier.core.precision import float32
from atelier.core.ranges import Levels, NonNegFloat, NonNegInt, PositiveFloat, PositiveInt
from atelier.core.rng import ImageRngs
from atelier.losses.adversarial import Adversarial
from atelier.models.base import Cond, takes
from atelier.models.growing import Growing
from atelier.models.two_players import no_weight_grads
from atelier.nets.conditioning import ConditionEmbedder, NoCondition
from atelier.nets.progan import ProDiscriminator, ProGenerator, seen_at


class ProGAN(Growing):
    """Noise on a sphere through convolutions. Each batch is a discriminator step and a generator step at one level.

    Args:
        generator: latents to images of a level.
        discriminator: (image, condition, level) -> logits (B,).
        generator_embedder, discriminator_embedder: conditions to a vector, one for each player; None: there are none.
        loss: of the two players.
        r1_gamma: weight of the discriminator's squared gradient at real images, halved.
        gp_weight: of the penalty for a gradient whose length is not 1 (WGAN-GP).
        drift: weight of E D(x)^2, which keeps logits near 0 (Karras et al. 2018, appendix A.1).
        stable_images, fade_images, microbatches: as in `Growing`.
        generator_optimizer, discriminator_optimizer: parameters -> optimizer.
        grad_clip: global gradient norm of either player.

    Raises:
        UserError: the generator is of another family.
    """

    ema_nets = ("generator", "generator_embedder")

    def __init__(
        self,
        generator: ProGenerator,
        discriminator: ProDiscriminator,
        generator_embedder: ConditionEmbedder | None,
        discriminator_embedder: ConditionEmbedder | None,
        loss: Adversarial,
        r1_gamma: NonNegFloat,
        gp_weight: NonNegFloat,
        drift: NonNegFloat,
        stable_images: PositiveInt,
        fade_images: NonNegInt,
        microbatches: Levels,
        generator_optimizer: Callable,
        discriminator_optimizer: Callable,
        grad_clip: PositiveFloat | None,
    ) -> None:
        optimizers = generator_optimizer, discriminator_optimizer
        super().__init__(stable_images, fade_images, microbatches, loss, *optimizers, grad_clip)
        takes(generator, ProGenerator, ".generator", type(self))
        self.generator, self.generator_embedder = generator, generator_embedder or NoCondition()
        self.discriminator, self.discriminator_embedder = discriminator, discriminator_embedder or NoCondition()
        self.needs = frozenset(self.generator_embedder.conditions)
        self.r1_gamma, self.gp_weight, self.drift = r1_gamma, gp_weight, drift

    def training_step(self, batch: Batch) -> None:
        ours, theirs = self.optimizers()
        level = self.grow()
        pieces = self.cut(batch, level)
        self.step_in_pieces(theirs, pieces, partial(self._discriminator_loss, level=level), "discriminator")
        self.step_in_pieces(ours, pieces, partial(self._generator_loss, level=level), "generator")

    def _discriminator_loss(self, x: Tensor, cond: Cond, level: float) -> Tensor:
        with torch.no_grad():
            real, fake = seen_at(x, level, self.discriminator.top), self._fake(cond, len(x), level)
        judge = self._judge(self.discriminator_embedder.vector(cond, len(x)).float(), level)
        real.requires_grad_(self.r1_gamma > 0)
        with float32(self.device, self.r1_gamma > 0):
            real_logits, fake_logits = judge(real), judge(fake)
        loss = self.loss.discriminator(real_logits, fake_logits)
        self.report_adversarial(loss, real_logits, fake_logits)
        loss = loss + self.drift * real_logits.square().mean()
        loss = loss + self.zero_centred_penalty("r1", self.r1_gamma, real_logits, real)
        return loss + self.one_centred(self.gp_weight, judge, real.detach(), fake)

    def _generator_loss(self, x: Tensor, cond: Cond, level: float) -> Tensor:
        judge = self._judge(self.discriminator_embedder.vector(cond, len(x)).detach(), level)
        fake, real = self._fake(cond, len(x), level), seen_at(x, level, self.discriminator.top)
        with no_weight_grads(self.discriminator):
            fake_logits, real_logits = judge(fake), self.compared(judge, real)
        loss = self.loss.generator(real_logits, fake_logits)
        self.report("generator", loss)
        return loss

    def _judge(self, known: Tensor, level: float) -> Callable[[Tensor], Tensor]:
        """Images of the level's size and of this condition to logits."""
        return lambda x: self.discriminator(x, known, level)

    def _fake(self, cond: Cond, n: int, level: float) -> Tensor:
        """Images (n, C, h, w) of fresh latents, of the level's size."""
        z = torch.randn(n, self.generator.noise_dim, device=self.device)
        return self.generator(z, self.generator_embedder.vector(cond, n), level)

    def generate(self, z: Tensor, cond: Cond, rngs: ImageRngs) -> Tensor:
        return self.enlarged(self.generator(z, self.generator_embedder.vector(cond, len(z)), self.at.item()))
