"""Translation learned from pairs (Isola et al. 2017, pix2pix)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from atelier.core.batch import Batch
from atelier.core.errors import UserError
from atelier.core.ranges import NonNegFloat, PositiveFloat
from atelier.core.rng import ImageRngs
from atelier.losses.adversarial import Adversarial
from atelier.models.base import Cond, Translator, at_rest
from atelier.nets.patch import PatchDiscriminator
from atelier.nets.pix2pix import UNetTranslator


class Pix2Pix(Translator):
    """An image from its source, near the true one and not to be told from it beside the source

    (Isola et al. 2017, Image-to-Image Translation with Conditional Adversarial Networks, eq. 1 to 4).

    Dropout is the noise (section 3.2.1): on at sampling too, image k's from its own generator.

    Args:
        generator: (source, masks) -> image.
        discriminator: source and image, stacked -> a map of logits.
        loss: of the two players; the discriminator's is halved (section 3.3).
        l1_weight: of the mean |x - G(source)|.
        generator_optimizer, discriminator_optimizer: parameters -> optimizer.
        grad_clip: global gradient norm of either player.

    Raises:
        UserError: the discriminator does not take a source and an image.
    """

    needs = frozenset({"source"})
    averaged = ("generator",)
    strategy = {"find_unused_parameters": True}
    limits: ClassVar[dict[str, float]] = {"real_logit": 1e4, "fake_logit": 1e4}

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
        super().__init__()
        both, takes = generator.in_channels + generator.image_channels, discriminator.layers[0].in_channels
        if takes != both:
            key, problem = "model.discriminator.in_channels", f"source and image have {both} channels"
            raise UserError(key, takes, problem, f"{key}={both}")
        self.automatic_optimization = False
        self.generator, self.discriminator, self.loss = generator, discriminator, loss
        self.multiple = generator.multiple
        self.l1_weight, self.grad_clip = l1_weight, grad_clip
        self.generator_optimizer, self.discriminator_optimizer = generator_optimizer, discriminator_optimizer

    def training_step(self, batch: Batch) -> None:
        ours, theirs = self.optimizers()
        source, image = batch["source"], batch["image"]
        made = self._made(source, partial(torch.rand, len(source), device=source.device))
        self.step(theirs, self._discriminator_loss(source, image, made.detach()), "discriminator")
        self.step(ours, self._generator_loss(source, image, made), "generator")

    def _made(self, source: Tensor, uniform: Callable[..., Tensor]) -> Tensor:
        """Images of sources; `uniform` gives (B, *shape) numbers in [0, 1)."""
        shapes = self.generator.mask_shapes(*source.shape[2:])
        return self.generator(source, [self.generator.kept(uniform(*shape)) for shape in shapes])

    def _discriminator_loss(self, source: Tensor, image: Tensor, made: Tensor) -> Tensor:
        real, fake = self._logits(source, image), self._logits(source, made)
        loss = self.loss.discriminator(real, fake) / 2
        self.report_game(loss, real, fake)
        return loss

    def _generator_loss(self, source: Tensor, image: Tensor, made: Tensor) -> Tensor:
        with at_rest(self.discriminator):
            fake = self._logits(source, made)
            real = self._logits(source, image) if self.loss.compares else None
        adversarial, l1 = self.loss.generator(real, fake), (made - image).abs().mean()
        self.report("generator", adversarial)
        self.report("l1", l1)
        return adversarial + self.l1_weight * l1

    def _logits(self, source: Tensor, image: Tensor) -> Tensor:
        return self.discriminator(torch.cat([source, image], dim=1))

    def configure_optimizers(self) -> list[Optimizer]:
        theirs = self.discriminator_optimizer(self.discriminator.parameters())
        return [self.generator_optimizer(self.generator.parameters()), theirs]

    def sample(self, cond: Cond, rngs: ImageRngs) -> Tensor:
        return self._made(cond["source"], partial(rngs.rand, device=self.device))
