"""Translation learned from pairs (Isola et al. 2017, pix2pix)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from atelier.core.batch import Batch
from atelier.core.errors import UserError
from atelier.core.ranges import NonNegFloat, PositiveFloat
from atelier.core.rng import ImageRngs
from atelier.losses.adversarial import Adversarial
from atelier.models.base import Cond, Translator
from atelier.models.two_players import TwoPlayers, no_weight_grads
from atelier.nets.patch import PatchDiscriminator
from atelier.nets.pix2pix import UNetTranslator


class Pix2Pix(TwoPlayers, Translator):
    """A translator that learns from pairs: L1 and a discriminator that sees the source too.

    Isola et al. 2017, Image-to-Image Translation with Conditional Adversarial Networks, eq. 1 to 4.

    Dropout is the noise (section 3.2.1): on at sampling too, image k's from its own generator.

    Args:
        generator: (source, masks) -> image.
        discriminator: source and image, stacked -> a map of logits.
        loss: losses of the two players; the discriminator's is halved (section 3.3).
        l1_weight: weight of the mean |x - G(source)|.
        generator_optimizer, discriminator_optimizer: parameters -> optimizer.
        grad_clip: global gradient norm of either player.

    Raises:
        UserError: the discriminator does not take a source and an image.
    """

    idea = (
        "A net turns a source into an image, learned from pairs of both. "
        "Beside the distance to the true answer, a discriminator that sees the source judges each patch."
    )
    formula = (
        "L_G = E l_G(D(source, G(source))) + weight |x - G(source)|\n"
        "L_D = E l_D(D(source, x), D(source, G(source))) / 2"
    )

    needs = frozenset({"source"})
    ema_nets = ("generator",)

    def __init__(
        self,
        generator: UNetTranslator,
        discriminator: PatchDiscriminator,
        loss: Adversarial,
        l1_weight: NonNegFloat,
        generator_optimizer: Callable,
        discriminator_optimizer: Callable,
        grad_clip: PositiveFloat | None,
    ) -> None:
        super().__init__(loss, generator_optimizer, discriminator_optimizer, grad_clip)
        both, takes = generator.in_channels + generator.image_channels, discriminator.layers[0].in_channels
        if takes != both:
            key, problem = ".discriminator.in_channels", f"source and image have {both} channels"
            raise UserError(key, takes, problem, f"{key}={both}")
        self.generator, self.discriminator = generator, discriminator
        self.size_divisor, self.l1_weight = generator.size_divisor, l1_weight

    def training_step(self, batch: Batch) -> None:
        generator_optimizer, discriminator_optimizer = self.optimizers()
        source, image = batch["source"], batch["image"]
        made = self._made(source, partial(torch.rand, len(source), device=source.device))
        self.step(discriminator_optimizer, self._discriminator_loss(source, image, made.detach()), "discriminator")
        self.step(generator_optimizer, self._generator_loss(source, image, made), "generator")

    def _made(self, source: Tensor, uniform: Callable[..., Tensor]) -> Tensor:
        """Images of sources; `uniform` gives (B, *shape) numbers in [0, 1)."""
        shapes = self.generator.mask_shapes(*source.shape[2:])
        return self.generator(source, [self.generator.kept(uniform(*shape)) for shape in shapes])

    def _discriminator_loss(self, source: Tensor, image: Tensor, made: Tensor) -> Tensor:
        real, fake = self._logits(source, image), self._logits(source, made)
        loss = self.loss.discriminator(real, fake) / 2
        self.report_adversarial(loss, real, fake)
        return loss

    def _generator_loss(self, source: Tensor, image: Tensor, made: Tensor) -> Tensor:
        with no_weight_grads(self.discriminator):
            fake = self._logits(source, made)
            real = self.compared(partial(self._logits, source), image)
        adversarial, l1 = self.loss.generator(real, fake), (made - image).abs().mean()
        self.report("generator", adversarial)
        self.report("l1", l1)
        return adversarial + self.l1_weight * l1

    def _logits(self, source: Tensor, image: Tensor) -> Tensor:
        return self.discriminator(torch.cat([source, image], dim=1))

    def sample(self, cond: Cond, rngs: ImageRngs) -> Tensor:
        return self._made(cond["source"], partial(rngs.rand, device=self.device))
