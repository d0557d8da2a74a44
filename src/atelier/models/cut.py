"""CUT: one way between two domains without pairs, each patch like its own place (Park et al. 2020)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atelier.core.batch import Batch
from atelier.core.ranges import NonNegFloat, PositiveFloat, PositiveInt
from atelier.core.rng import ImageRngs
from atelier.losses.adversarial import Adversarial
from atelier.losses.contrastive import patch_nce
from atelier.models.base import Cond, Translator
from atelier.models.two_players import TwoPlayers, no_weight_grads
from atelier.nets.patch import PatchDiscriminator
from atelier.nets.resnet_translator import ResNetTranslator, check_divides


class CUT(TwoPlayers, Translator):
    """Unpaired translation one way, by contrast between patches.

    The result must look like the other domain, and each patch of it more like the source there than elsewhere (Park et
    al. 2020, Contrastive Learning for Unpaired Image-to-Image Translation, eq. 1 to 3 and 5). There is no way back, so
    half the weights of CycleGAN do. Each batch is a step of the discriminator, then one of the generator.
    Images are compared by what the generator's own first half sees in them, through a small net for each depth, which
    learns with the generator. Where the paper sums over depths and places, this takes means, as its code does; that
    code also halves both contrasts where images of the target domain are to stay.

    Args:
        generator: images to images of the other domain.
        discriminator: images to a map of logits.
        direction: "a2b" makes images of domain b from those of domain a.
        loss: losses of the players; least squares has a factor 1/2 for both.
        adversarial_weight: weight of the generator's part of it.
        patch_weight: weight of the contrast between patches of the result and of the source; published: 1 (FastCUT 10).
        identity_weight: weight of the same for images of the target domain, which are to stay; published: 1 (FastCUT 0,
            and mirrored images besides, which are not here).
        n_patches: places of an image that are contrasted, or as many as a map has; published: 256.
        patch_dim: size of what stands for a patch; published: 256.
        temperature: divisor of the logits of the contrast; published: 0.07.
        generator_optimizer, discriminator_optimizer: parameters -> optimizer.
        grad_clip: global gradient norm of either player.

    Raises:
        UserError: the images do not divide as often as the net halves them.
    """

    idea = (
        "One net translates one way between two kinds of images, learned without pairs. "
        "Each patch of the result must be more like its own place in the source than like any other."
    )
    formula = (
        "L_G = w E l_G(D(G(a))) + c contrast(a, G(a)) + c_id contrast(b, G(b))\n"
        "L_D = E l_D(D(b), D(G(a))); contrast: -log softmax(q k_own / tau)"
    )

    needs = frozenset({"image_a", "image_b"})
    same_domain = True
    ema_nets = ("generator",)
    players = ("generator", "heads"), ("discriminator",)
    source_fields: ClassVar[dict[str, str]] = {"a2b": "image_a", "b2a": "image_b"}
    real_fields: ClassVar[dict[str, str]] = {"a2b": "image_b", "b2a": "image_a"}
    answer_fields: ClassVar[dict[str, str]] = {"a2b": "answer_a", "b2a": "answer_b"}

    def __init__(
        self,
        generator: ResNetTranslator,
        discriminator: PatchDiscriminator,
        direction: Literal["a2b", "b2a"],
        loss: Adversarial,
        adversarial_weight: NonNegFloat,
        patch_weight: NonNegFloat,
        identity_weight: NonNegFloat,
        n_patches: PositiveInt,
        patch_dim: PositiveInt,
        temperature: PositiveFloat,
        generator_optimizer: Callable,
        discriminator_optimizer: Callable,
        grad_clip: PositiveFloat | None,
    ) -> None:
        super().__init__(loss, generator_optimizer, discriminator_optimizer, grad_clip)
        self.generator, self.discriminator = generator, discriminator
        self.heads = nn.ModuleList(_head(n, patch_dim) for n in generator.looked_at.values())
        self.cases, self.size_divisor = (direction,), generator.size_divisor
        check_divides(discriminator.image_size, self.size_divisor)
        self.adversarial_weight, self.patch_weight = adversarial_weight, patch_weight
        self.identity_weight = identity_weight
        self.n_patches, self.temperature = n_patches, temperature

    def training_step(self, batch: Batch) -> None:
        generator_optimizer, discriminator_optimizer = self.optimizers()
        (case,) = self.cases
        source, real = batch[self.source_fields[case]], batch[self.real_fields[case]]
        fake = self.generator(source)
        self.step(discriminator_optimizer, self._discriminator_loss(real, fake.detach()), "discriminator")
        self.step(generator_optimizer, self._generator_loss(source, real, fake), "generator")

    def _discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        real_logits, fake_logits = self.discriminator(real), self.discriminator(fake)
        loss = self.loss.discriminator(real_logits, fake_logits)
        self.report_adversarial(loss, real_logits, fake_logits)
        return loss

    def _generator_loss(self, source: Tensor, real: Tensor, fake: Tensor) -> Tensor:
        """Eq. 5."""
        with no_weight_grads(self.discriminator):
            real_logits = self.compared(self.discriminator, real)
            adversarial = self.loss.generator(real_logits, self.discriminator(fake))
        self.report("generator", adversarial)
        loss = self.adversarial_weight * adversarial
        if self.patch_weight > 0:
            patches = self._apart(source, fake)
            self.report("patches", patches)
            loss = loss + self.patch_weight * patches
        if self.identity_weight > 0:
            same = self._apart(real, self.generator(real))
            self.report("identity", same)
            loss = loss + self.identity_weight * same
        return loss

    def _apart(self, source: Tensor, result: Tensor) -> Tensor:
        """How badly patches of the result find their own place in the source, mean over depths: scalar (eq. 3)."""
        with torch.no_grad():
            known = self.generator.features(source)
        asked, losses = self.generator.features(result), []
        for head, before, after in zip(self.heads, known, asked, strict=True):
            size = after.shape[2] * after.shape[3]
            places = torch.randperm(size, device=after.device)[: self.n_patches]  # (S,)
            query, key = (_vectors(head, x.flatten(2)[:, :, places]) for x in (after, before))
            losses.append(patch_nce(query, key.detach(), self.temperature))
        return torch.stack(losses).mean()

    def sample(self, cond: Cond, rngs: ImageRngs) -> Tensor:
        (source,) = cond.values()
        return self.generator(source)


def _head(channels: int, dim: int) -> nn.Sequential:
    """Two layers, the same for all patches of a depth."""
    return nn.Sequential(nn.Linear(channels, dim), nn.ReLU(), nn.Linear(dim, dim))


def _vectors(head: nn.Module, x: Tensor) -> Tensor:
    """Of length 1, (B, S, D) float32, of patches (B, C, S)."""
    return F.normalize(head(x.transpose(1, 2)).float(), dim=2)
