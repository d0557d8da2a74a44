"""StyleGAN (Karras et al. 2019, A Style-Based Generator Architecture for Generative Adversarial Networks)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from atelier.core import ranks
from atelier.core.batch import Batch
from atelier.core.precision import float32
from atelier.core.ranges import Levels, NonNegFloat, NonNegInt, PositiveFloat, PositiveInt, Probability
from atelier.core.rng import ImageRngs
from atelier.losses.adversarial import Adversarial
from atelier.models.base import Cond, StyleBased, takes
from atelier.models.growing import Growing
from atelier.models.two_players import no_weight_grads
from atelier.nets.conditioning import ConditionEmbedder, NoCondition
from atelier.nets.progan import ProDiscriminator, seen_at
from atelier.nets.stylegan import StyleGenerator, mixed


class StyleGAN(Growing, StyleBased):
    """Noise through a mapping to styles, which set the mean and deviation of each map; grown as Progressive GAN is.

    Each batch is a discriminator step and a generator step at one level.

    Args:
        generator: latents to images of a level.
        discriminator: (image, condition, level) -> logits (B,).
        generator_embedder, discriminator_embedder: conditions to a vector, one for each player; None: there are none.
        loss: of the two players.
        r1_gamma: weight of the discriminator's squared gradient at real images, halved.
        gp_weight: of the penalty for a gradient whose length is not 1 (WGAN-GP).
        drift: weight of E D(x)^2, which keeps logits near 0 (Karras et al. 2018, appendix A.1).
        stable_images, fade_images, microbatches: as in `Growing`.
        style_mixing_prob: share of images that take the styles of a second latent from a random layer on.
        style_ema_decay: of the mean style, per call of the mapping: each player calls it once per piece of a batch.
        truncation: psi of samples, unless another is asked for; 1 = off (Karras et al. 2019, appendix B).
        generator_optimizer, discriminator_optimizer: parameters -> optimizer.
        grad_clip: global gradient norm of either player.

    Raises:
        UserError: the generator is of another family.
    """

    ema_nets = ("generator", "generator_embedder")

    def __init__(
        self,
        generator: StyleGenerator,
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
        style_mixing_prob: Probability,
        style_ema_decay: Probability,
        truncation: NonNegFloat,
        generator_optimizer: Callable,
        discriminator_optimizer: Callable,
        grad_clip: PositiveFloat | None,
    ) -> None:
        optimizers = generator_optimizer, discriminator_optimizer
        super().__init__(stable_images, fade_images, microbatches, loss, *optimizers, grad_clip)
        takes(generator, StyleGenerator, ".generator", type(self))
        self.generator, self.generator_embedder = generator, generator_embedder or NoCondition()
        self.discriminator, self.discriminator_embedder = discriminator, discriminator_embedder or NoCondition()
        self.needs = frozenset(self.generator_embedder.conditions)
        self.r1_gamma, self.gp_weight, self.drift = r1_gamma, gp_weight, drift
        self.style_mixing_prob, self.style_ema_decay, self.truncation = style_mixing_prob, style_ema_decay, truncation

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
        """Images (n, C, h, w) of fresh latents, of the level's size; the mean style follows them."""
        known, net = self.generator_embedder.vector(cond, n), self.generator.synthesis
        z = torch.randn(2, n, self.generator.noise_dim, device=self.device)
        first = self.generator.mapping(z[0], known)
        self.generator.mapping.mean.lerp_(ranks.mean(first.detach().mean(0)), 1 - self.style_ema_decay)
        styles = mixed(first, self.generator.mapping(z[1], known), net.n_styles, self.style_mixing_prob)
        noises = [torch.randn(n, 1, size, size, device=self.device) for size in net.noise_sizes]
        return net(styles, noises, level)

    def styles(self, z: Tensor, cond: Cond, truncation: float | None = None) -> Tensor:
        w = self.generator.mapping(z, self.generator_embedder.vector(cond, len(z)))
        mean, psi = self.generator.mapping.mean, self.truncation if truncation is None else truncation
        return (mean + psi * (w - mean))[:, None].expand(-1, self.generator.synthesis.n_styles, -1)

    def synthesize(self, styles: Tensor, rngs: ImageRngs) -> Tensor:
        noises = [rngs.randn(1, size, size, device=self.device) for size in self.generator.synthesis.noise_sizes]
        return self.enlarged(self.generator.synthesis(styles, noises, self.at.item()))

    def protocol(self) -> dict[str, Any]:
        return {"truncation": self.truncation}
