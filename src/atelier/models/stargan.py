"""One translator for many attributes (Choi et al. 2018, StarGAN)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from atelier.core.batch import Batch
from atelier.core.precision import float32
from atelier.core.ranges import NonNegFloat, PositiveFloat, PositiveInt
from atelier.core.rng import ImageRngs
from atelier.losses.adversarial import Adversarial
from atelier.models.base import Cond, Translator
from atelier.models.two_players import TwoPlayers, no_weight_grads
from atelier.nets.stargan import StarDiscriminator, StarGenerator


class StarGAN(TwoPlayers, Translator):
    """A translator that gives an image other attributes.

    A discriminator must find them in the image, and they can be taken back (Choi et al. 2018, StarGAN: Unified
    Generative Adversarial Networks for Multi-Domain Image-to-Image Translation, eq. 1 to 8).

    Each batch is a discriminator step, each n_critic-th also a generator step. Classification losses are summed over
    attributes and averaged over images. Penalties are of the mean logit of each image, as the loss is.

    Args:
        generator: (image, attributes) -> image.
        discriminator: image -> a map of logits, logits of the attributes.
        loss: losses of the two players.
        gp_weight: weight of the penalty for a gradient whose length is not 1 (WGAN-GP, as in the paper).
        r1_gamma: weight of the squared gradient at real images, halved: the cheaper penalty, for other losses.
        classifier_weight: weight of the loss of the attributes: those of real images for the discriminator,
            those asked for of translated images for the generator.
        exclusive: an image has exactly one attribute, its domain, and the classifier chooses one; else each attribute
            is there or not.
        reconstruction_weight: weight of the mean |x - G(G(x, target), attributes)|.
        identity_weight: weight of the mean |x - G(x, attributes)|; not in the paper (He et al. 2019, AttGAN, has it).
            Without it an image may come out scrambled in any way that the way back undoes.
        n_critic: discriminator steps per generator step.
        generator_optimizer, discriminator_optimizer: parameters -> optimizer.
        grad_clip: global gradient norm of either player.
    """

    idea = (
        "One net gives an image the attributes that it is asked for. "
        "A discriminator must find them in the result, and given back its own the image must be what it was."
    )
    formula = (
        "L_G = E l_G(D(y)) - w log p(target | y) + c |x - G(y, own)| + c_id |x - G(x, own)|, y = G(x, target)\n"
        "L_D = E l_D(D(x), D(y)) - w log p(own | x) + penalty of dD/dx"
    )

    needs = frozenset({"attributes", "target"})
    ema_nets = ("generator",)
    source_fields: ClassVar[dict[str, str]] = {"": "image"}
    answer_fields: ClassVar[dict[str, str]] = {"": "answer"}
    same_domain = True
    size_divisor = 4

    def __init__(
        self,
        generator: StarGenerator,
        discriminator: StarDiscriminator,
        loss: Adversarial,
        gp_weight: NonNegFloat,
        r1_gamma: NonNegFloat,
        classifier_weight: NonNegFloat,
        reconstruction_weight: NonNegFloat,
        identity_weight: NonNegFloat,
        n_critic: PositiveInt,
        generator_optimizer: Callable,
        discriminator_optimizer: Callable,
        grad_clip: PositiveFloat | None,
        exclusive: bool = False,
    ) -> None:
        super().__init__(loss, generator_optimizer, discriminator_optimizer, grad_clip)
        self.generator, self.discriminator = generator, discriminator
        self.gp_weight, self.r1_gamma = gp_weight, r1_gamma
        self.classifier_weight, self.reconstruction_weight = classifier_weight, reconstruction_weight
        self.exclusive = exclusive
        self.identity_weight, self.n_critic = identity_weight, n_critic

    def condition(self, batch: Batch, case: str) -> Cond:
        return {name: batch[name].to(self.device) for name in ("image", "target")}

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        generator_optimizer, discriminator_optimizer = self.optimizers()
        penalised = self.r1_gamma > 0 or self.gp_weight > 0
        self.step(discriminator_optimizer, self._discriminator_loss(batch), "discriminator", penalised)
        if (batch_idx + 1) % self.n_critic == 0:
            self.step(generator_optimizer, self._generator_loss(batch), "generator")

    def _discriminator_loss(self, batch: Batch) -> Tensor:
        """Eq. 5, with the penalty of eq. 8."""
        with torch.no_grad():
            made = self.generator(batch["image"], batch["target"])
        image = batch["image"].detach().requires_grad_(self.r1_gamma > 0)
        with float32(self.device, self.r1_gamma > 0):  # what a penalty is of, and no other pass
            real, attributes = self.discriminator(image)
        fake = self.discriminator(made)[0]
        loss, classified = self.loss.discriminator(real, fake), self._classified(attributes, batch["attributes"])
        self.report_adversarial(loss, real, fake)
        self.report("classifier_real", classified)
        return loss + self.classifier_weight * classified + self._penalty(image, made, real)

    def _penalty(self, image: Tensor, made: Tensor, real: Tensor) -> Tensor:
        """gamma / 2 R1 + weight times what WGAN-GP adds: scalar."""
        loss = self.zero_centred_penalty("r1", self.r1_gamma, real.flatten(1).mean(1), image)
        return loss + self.one_centred(self.gp_weight, self._mean_logits, image.detach(), made)

    def _mean_logits(self, x: Tensor) -> Tensor:
        """(B,) of images (B, C, H, W)."""
        return self.discriminator(x)[0].flatten(1).mean(1)

    def _generator_loss(self, batch: Batch) -> Tensor:
        """Eq. 6, and the identity loss of an image given its own attributes."""
        image, target = batch["image"], batch["target"]
        made = self.generator(image, target)
        back = self.generator(made, batch["attributes"])
        with no_weight_grads(self.discriminator):
            fake, attributes = self.discriminator(made)
            real = self.compared(lambda x: self.discriminator(x)[0], image)
        adversarial, classified = self.loss.generator(real, fake), self._classified(attributes, target)
        reconstruction = (image - back).abs().mean()
        self.report("generator", adversarial)
        self.report("classifier_fake", classified)
        self.report("reconstruction", reconstruction)
        loss = adversarial + self.classifier_weight * classified + self.reconstruction_weight * reconstruction
        if self.identity_weight > 0:
            same = (image - self.generator(image, batch["attributes"])).abs().mean()
            self.report("identity", same)
            loss = loss + self.identity_weight * same
        return loss

    def sample(self, cond: Cond, rngs: ImageRngs) -> Tensor:
        return self.generator(cond["image"], cond["target"])

    def attributes_of(self, x: Tensor) -> Tensor:
        """Attributes (B, A) that the discriminator's classifier sees in images (B, C, H, W)."""
        logits = self.discriminator(x.to(self.device))[1]
        return F.one_hot(logits.argmax(1), logits.shape[1]).float() if self.exclusive else (logits > 0).float()

    def _classified(self, logits: Tensor, attributes: Tensor) -> Tensor:
        """Cross-entropy of attributes (B, A), 0 or 1: scalar, the mean over images (eq. 2 and 3).

        Summed over attributes, or of the one that is 1 where they exclude each other.
        """
        if self.exclusive:
            return F.cross_entropy(logits, attributes.argmax(1))
        return F.binary_cross_entropy_with_logits(logits, attributes, reduction="sum") / len(logits)
