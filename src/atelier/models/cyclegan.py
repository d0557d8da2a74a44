"""CycleGAN: two domains without pairs (Zhu et al. 2017, Unpaired Image-to-Image Translation ... Networks)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from atelier.core.batch import Batch
from atelier.core.ranges import NonNegFloat, PositiveFloat, PositiveInt
from atelier.core.rng import ImageRngs
from atelier.losses.adversarial import Adversarial
from atelier.models.base import Cond, Translator
from atelier.models.two_players import TwoPlayers, no_weight_grads
from atelier.nets.patch import PatchDiscriminator
from atelier.nets.pool import ImagePool
from atelier.nets.resnet_translator import ResNetTranslator, check_divides


class CycleGAN(TwoPlayers, Translator):
    """Each batch is a step of both generators, then one of both discriminators, who see generated images of the past.

    Args:
        generator_a2b, generator_b2a: images to images of the other domain.
        discriminator_a, discriminator_b: images to a map of logits.
        pool_a, pool_b: generated images of each domain.
        loss: losses of the players; least squares has its factor 1/2 for both, the published code for
            discriminators alone.
        adversarial_weight: weight of the generators' part of it; 2 undoes that factor.
        cycle_weight: weight of mean |F(G(a)) - a| + |G(F(b)) - b| (eq. 2).
        identity_weight: weight of mean |G(b) - b| + |F(a) - a|, beside `cycle_weight` (section 5.2, 0.5 there).
        identity_every: batches between two of these, which count as many times as much.
        generator_optimizer, discriminator_optimizer: parameters of both nets -> optimizer.
        grad_clip: global gradient norm of either pair.

    Raises:
        UserError: the images do not divide as often as the nets halve them.
    """

    idea = (
        "Two nets translate between two kinds of images, learned without pairs. "
        "Each result must pass for its kind, and the way there and back must end where it began."
    )
    formula = (
        "L_G = w E [l_G(D_B(F(a))) + l_G(D_A(G(b)))] + c (|G(F(a)) - a| + |F(G(b)) - b|)"
        " + c_id (|F(b) - b| + |G(a) - a|)\n"
        "L_D = E l_D(D_A(a), D_A(G(b))) + E l_D(D_B(b), D_B(F(a)))"
    )

    needs = frozenset({"image_a", "image_b"})
    cases = ("a2b", "b2a")
    source_fields: ClassVar[dict[str, str]] = {"a2b": "image_a", "b2a": "image_b"}
    real_fields: ClassVar[dict[str, str]] = {"a2b": "image_b", "b2a": "image_a"}
    answer_fields: ClassVar[dict[str, str]] = {"a2b": "answer_a", "b2a": "answer_b"}
    same_domain = True
    ema_nets = ("generator_a2b", "generator_b2a")
    players = ("generator_a2b", "generator_b2a"), ("discriminator_a", "discriminator_b")

    def __init__(
        self,
        generator_a2b: ResNetTranslator,
        generator_b2a: ResNetTranslator,
        discriminator_a: PatchDiscriminator,
        discriminator_b: PatchDiscriminator,
        pool_a: ImagePool,
        pool_b: ImagePool,
        loss: Adversarial,
        adversarial_weight: NonNegFloat,
        cycle_weight: NonNegFloat,
        identity_weight: NonNegFloat,
        identity_every: PositiveInt,
        generator_optimizer: Callable,
        discriminator_optimizer: Callable,
        grad_clip: PositiveFloat | None,
    ) -> None:
        super().__init__(loss, generator_optimizer, discriminator_optimizer, grad_clip)
        self.generator_a2b, self.generator_b2a = generator_a2b, generator_b2a
        self.discriminator_a, self.discriminator_b = discriminator_a, discriminator_b
        self.pool_a, self.pool_b = pool_a, pool_b
        self.adversarial_weight, self.cycle_weight = adversarial_weight, cycle_weight
        self.identity_weight, self.identity_every = identity_weight, identity_every
        self.size_divisor = max(generator_a2b.size_divisor, generator_b2a.size_divisor)
        check_divides(pool_a.images.shape[-1], self.size_divisor)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        generator_optimizer, discriminator_optimizer = self.optimizers()
        a, b = batch["image_a"], batch["image_b"]
        identity = self.identity_weight > 0 and (batch_idx + 1) % self.identity_every == 0
        fake_a, fake_b = self._generator_step(a, b, generator_optimizer, identity)
        fake_a, fake_b = (
            pool.swapped(x, self.images_seen) for pool, x in ((self.pool_a, fake_a), (self.pool_b, fake_b))
        )
        self._discriminator_step(a, b, fake_a, fake_b, discriminator_optimizer)

    def _generator_step(self, a: Tensor, b: Tensor, optimizer: Optimizer, identity: bool) -> tuple[Tensor, Tensor]:
        fake_b, fake_a = self.generator_a2b(a), self.generator_b2a(b)
        with no_weight_grads(self.discriminator_a, self.discriminator_b):
            adversarial = self._fooled(self.discriminator_a, a, fake_a) + self._fooled(self.discriminator_b, b, fake_b)
        cycle = _far(self.generator_b2a(fake_b), a) + _far(self.generator_a2b(fake_a), b)
        self.report("generator", adversarial)
        self.report("cycle", cycle)
        loss = self.adversarial_weight * adversarial + self.cycle_weight * cycle
        if identity:
            same = _far(self.generator_a2b(b), b) + _far(self.generator_b2a(a), a)
            self.report("identity", same)
            loss = loss + self.cycle_weight * self.identity_weight * self.identity_every * same
        self.step(optimizer, loss, "generator")
        return fake_a, fake_b

    def _fooled(self, discriminator: PatchDiscriminator, real: Tensor, fake: Tensor) -> Tensor:
        return self.loss.generator(self.compared(discriminator, real), discriminator(fake))

    def _discriminator_step(self, a: Tensor, b: Tensor, fake_a: Tensor, fake_b: Tensor, optimizer: Optimizer) -> None:
        pairs = (self.discriminator_a, a, fake_a), (self.discriminator_b, b, fake_b)
        logits = [(net(real), net(fake)) for net, real, fake in pairs]
        loss = torch.stack([self.loss.discriminator(real, fake) for real, fake in logits]).sum()
        self.report_adversarial(loss, *(torch.stack(side) for side in zip(*logits, strict=True)))
        self.step(optimizer, loss, "discriminator")

    def sample(self, cond: Cond, rngs: ImageRngs) -> Tensor:
        if "image_a" in cond:
            return self.generator_a2b(cond["image_a"])
        return self.generator_b2a(cond["image_b"])


def _far(x: Tensor, y: Tensor) -> Tensor:
    """mean |x - y|: scalar float32."""
    return (x.float() - y.float()).abs().mean()
