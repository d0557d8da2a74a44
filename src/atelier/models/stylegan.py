"""StyleGAN (Karras et al. 2019, A Style-Based Generator Architecture for Generative Adversarial Networks)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from atelier.core import ranks
from atelier.core.ranges import Levels, NonNegFloat, NonNegInt, PositiveFloat, PositiveInt, Probability
from atelier.core.rng import ImageRngs
from atelier.losses.adversarial import Adversarial
from atelier.models.base import Cond, StyleBased, takes
from atelier.models.growing import Growing
from atelier.nets.conditioning import ConditionEmbedder
from atelier.nets.progan import ProDiscriminator
from atelier.nets.stylegan import StyleGenerator, mixed


class StyleGAN(Growing, StyleBased):
    """Noise through a mapping to styles, which set the mean and deviation of each map; grown as Progressive GAN is.

    Each batch is a discriminator step and a generator step at one level.

    Args:
        generator: latents to images of a level.
        discriminator: (image, condition, level) -> logits (B,).
        generator_embedder, discriminator_embedder: conditions to a vector, one for each player; None: there are none.
        loss: losses of the two players.
        r1_gamma: weight of the discriminator's squared gradient at real images, halved.
        gp_weight: weight of the penalty for a gradient whose length is not 1 (WGAN-GP).
        drift: weight of E D(x)^2, which keeps logits near 0 (Karras et al. 2018, appendix A.1).
        stable_images, fade_images, microbatches: growth and parts of a batch, see `Growing`.
        style_mixing_prob: share of images that take the styles of a second latent from a random layer on.
        style_ema_decay: decay of the mean style, per call of the mapping: each player calls it once per microbatch.
        truncation: psi of samples, unless another is asked for; 1 = off (Karras et al. 2019, appendix B).
        generator_optimizer, discriminator_optimizer: parameters -> optimizer.
        grad_clip: global gradient norm of either player.

    Raises:
        UserError: the generator is of another family.
    """

    idea = (
        "A mapping turns noise into a style, which sets the mean and deviation of every map of the generator. "
        "It grows as Progressive GAN does, and noise in every layer draws the details."
    )
    formula = "L_D = E l_D(D(x), D(G(w))) + gamma/2 E |dD/dx|^2, w = mapping(z)\nL_G = E l_G(D(G(w)))"
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
        takes(generator, StyleGenerator, ".generator", type(self))
        super().__init__(
            generator=generator,
            discriminator=discriminator,
            generator_embedder=generator_embedder,
            discriminator_embedder=discriminator_embedder,
            loss=loss,
            r1_gamma=r1_gamma,
            gp_weight=gp_weight,
            drift=drift,
            stable_images=stable_images,
            fade_images=fade_images,
            microbatches=microbatches,
            generator_optimizer=generator_optimizer,
            discriminator_optimizer=discriminator_optimizer,
            grad_clip=grad_clip,
        )
        self.style_mixing_prob, self.style_ema_decay, self.truncation = style_mixing_prob, style_ema_decay, truncation

    def _fake(self, cond: Cond, n: int, level: float) -> Tensor:
        """Images (n, C, h, w) of fresh latents, of the level's size; the mean style follows them."""
        known, net = self.generator_embedder.vector(cond, n), self.generator.synthesis
        z = torch.randn(2, n, self.generator.noise_dim, device=self.device)
        first = self.generator.mapping(z[0], known)
        self.generator.mapping.mean.lerp_(ranks.mean(first.detach().mean(0)), 1 - self.style_ema_decay)
        styles = mixed(first, self.generator.mapping(z[1], known), net.n_styles, self.style_mixing_prob)
        noises = [torch.randn(n, 1, size, size, device=self.device) for size in net.noise_sizes]
        return net(styles, noises, level)

    def synthesize(self, styles: Tensor, rngs: ImageRngs) -> Tensor:
        noises = [rngs.randn(1, size, size, device=self.device) for size in self.generator.synthesis.noise_sizes]
        return self.enlarged(self.generator.synthesis(styles, noises, self.at.item()))
