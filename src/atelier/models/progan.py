"""Progressive GAN (Karras et al. 2018, Progressive Growing of GANs)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from atelier.core.ranges import Levels, NonNegFloat, NonNegInt, PositiveFloat, PositiveInt
from atelier.core.rng import ImageRngs
from atelier.losses.adversarial import Adversarial
from atelier.models.base import Cond, takes
from atelier.models.growing import Growing
from atelier.nets.conditioning import ConditionEmbedder
from atelier.nets.progan import ProDiscriminator, ProGenerator


class ProGAN(Growing):
    """Noise on a sphere through convolutions. Each batch is a discriminator step and a generator step at one level.

    Args:
        generator: latents to images of a level.
        discriminator: (image, condition, level) -> logits (B,).
        generator_embedder, discriminator_embedder: conditions to a vector, one for each player; None: there are none.
        loss: losses of the two players.
        r1_gamma: weight of the discriminator's squared gradient at real images, halved.
        gp_weight: weight of the penalty for a gradient whose length is not 1 (WGAN-GP).
        drift: weight of E D(x)^2, which keeps logits near 0 (Karras et al. 2018, appendix A.1).
        stable_images, fade_images, microbatches: growth and parts of a batch, see `Growing`.
        generator_optimizer, discriminator_optimizer: parameters -> optimizer.
        grad_clip: global gradient norm of either player.

    Raises:
        UserError: the generator is of another family.
    """

    idea = (
        "Generator and discriminator begin with images of 4 px, and each further size fades in. "
        "What is large in an image is learned first and cheaply, its details later."
    )
    formula = "L_D = E l_D(D(x), D(G(z))) + penalty of dD/dx, at the size of the moment\nL_G = E l_G(D(G(z)))"
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
        takes(generator, ProGenerator, ".generator", type(self))
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

    def _fake(self, cond: Cond, n: int, level: float) -> Tensor:
        z = torch.randn(n, self.generator.noise_dim, device=self.device)
        return self.generator(z, self.generator_embedder.vector(cond, n), level)

    def generate(self, z: Tensor, cond: Cond, rngs: ImageRngs) -> Tensor:
        return self.enlarged(self.generator(z, self.generator_embedder.vector(cond, len(z)), self.at.item()))
