"""What GANs that grow from 4x4 share: the level of a batch, its losses, its images (Karras et al. 2018, section 2)."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from atelier.core.batch import Batch
from atelier.core.precision import float32
from atelier.core.ranges import Levels, NonNegFloat, NonNegInt, PositiveFloat, PositiveInt
from atelier.core.rng import ImageRngs
from atelier.losses.adversarial import Adversarial
from atelier.models.base import Cond, Latent
from atelier.models.two_players import TwoPlayers, no_weight_grads
from atelier.nets.conditioning import ConditionEmbedder, NoCondition
from atelier.nets.progan import ProDiscriminator, doubled, seen_at

Microbatch = tuple[Tensor, Cond]  # images (b, C, H, W) and their conditions


class Growing(TwoPlayers, Latent):
    """Two players at the level that `images_seen` says: each batch is a step of either.

    Level 0 is trained for `stable_images`, each later one fades in over `fade_images` and then has `stable_images` of
    its own. When a level begins to fade in, the optimizers forget their moments.

    Args:
        generator: latents to images of a level.
        discriminator: (image, condition, level) -> logits (B,).
        generator_embedder, discriminator_embedder: conditions to a vector, one for each player; None: there are none.
        loss: losses of the two players.
        r1_gamma: weight of the discriminator's squared gradient at real images, halved.
        gp_weight: weight of the penalty for a gradient whose length is not 1 (WGAN-GP).
        drift: weight of E D(x)^2, which keeps logits near 0 (Karras et al. 2018, appendix A.1).
        stable_images, fade_images: images shown at a level, and on the way to it.
        microbatches: number of parts that the batch is cut into at each level, the last for all further ones: memory
            for time.
        generator_optimizer, discriminator_optimizer: parameters -> optimizer.
        grad_clip: global gradient norm of either player.
    """

    players = ("generator", "generator_embedder"), ("discriminator", "discriminator_embedder")
    at: Tensor
    grown: Tensor

    def __init__(
        self,
        generator: nn.Module,
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
        super().__init__(loss, generator_optimizer, discriminator_optimizer, grad_clip)
        self.stable_images, self.fade_images, self.microbatches = stable_images, fade_images, microbatches
        self.register_buffer("at", torch.zeros(()))  # the level of the last batch
        self.register_buffer("grown", torch.zeros((), dtype=torch.int64))  # the largest level that has been trained
        self.generator, self.generator_embedder = generator, generator_embedder or NoCondition()
        self.discriminator, self.discriminator_embedder = discriminator, discriminator_embedder or NoCondition()
        self.needs = frozenset(self.generator_embedder.conditions)
        self.r1_gamma, self.gp_weight, self.drift = r1_gamma, gp_weight, drift
        self._grown: int | None = None  # what `grown` holds, so that no batch reads it off the device; None: not read
        self.register_load_state_dict_post_hook(_read_anew)

    def training_step(self, batch: Batch) -> None:
        generator_optimizer, discriminator_optimizer = self.optimizers()
        level = self.grow()
        parts = self.microbatches_of(batch, level)
        discriminator_loss = partial(self._discriminator_loss, level=level)
        penalised = self.r1_gamma > 0 or self.gp_weight > 0
        self.step_accumulated(discriminator_optimizer, parts, discriminator_loss, "discriminator", penalised)
        self.step_accumulated(generator_optimizer, parts, partial(self._generator_loss, level=level), "generator")

    def _discriminator_loss(self, x: Tensor, cond: Cond, level: float) -> Tensor:
        with torch.no_grad():
            real, fake = seen_at(x, level, self.discriminator.top), self._fake(cond, len(x), level)
        discriminator = self._logits_of(self.discriminator_embedder.vector(cond, len(x)).float(), level)
        real.requires_grad_(self.r1_gamma > 0)
        with float32(self.device, self.r1_gamma > 0):  # what a penalty is of, and no other pass
            real_logits = discriminator(real)
        fake_logits = discriminator(fake)
        loss = self.loss.discriminator(real_logits, fake_logits)
        self.report_adversarial(loss, real_logits, fake_logits)
        loss = loss + self.drift * real_logits.square().mean()
        loss = loss + self.zero_centred_penalty("r1", self.r1_gamma, real_logits, real)
        return loss + self.one_centred(self.gp_weight, discriminator, real.detach(), fake)

    def _generator_loss(self, x: Tensor, cond: Cond, level: float) -> Tensor:
        discriminator = self._logits_of(self.discriminator_embedder.vector(cond, len(x)).detach(), level)
        fake, real = self._fake(cond, len(x), level), seen_at(x, level, self.discriminator.top)
        with no_weight_grads(self.discriminator):
            fake_logits, real_logits = discriminator(fake), self.compared(discriminator, real)
        loss = self.loss.generator(real_logits, fake_logits)
        self.report("generator", loss)
        return loss

    def _logits_of(self, known: Tensor, level: float) -> Callable[[Tensor], Tensor]:
        """Images of the level's size and of this condition to logits."""
        return lambda x: self.discriminator(x, known, level)

    @abstractmethod
    def _fake(self, cond: Cond, n: int, level: float) -> Tensor:
        """Images (n, C, h, w) of fresh latents, of the level's size."""

    def to_full_size(self) -> bool:
        """From the second batch on."""
        self.stable_images, self.fade_images = 1, 0
        return True

    def level(self) -> float:
        """k where level k is trained, k + a with 0 < a < 1 on the way from it to the next."""
        k, rest = divmod(max(0, self.images_seen - self.stable_images), self.stable_images + self.fade_images)
        if self.images_seen < self.stable_images:
            return 0.0
        part = (rest + 1) / (self.fade_images + 1) if rest < self.fade_images else 1.0
        return min(float(self.discriminator.top), k + part)

    def grow(self) -> float:
        """The level of this batch, from now on also that of samples."""
        level = self.level()
        if self._grown is None:
            self._grown = int(self.grown)
        if math.ceil(level) > self._grown:
            for optimizer in self.optimizers():
                reset_optimizer_state(optimizer)
        self._grown = math.ceil(level)
        self.at.fill_(level)
        self.grown.fill_(self._grown)
        self.report("level", torch.tensor(level))
        return level

    def microbatches_of(self, batch: Batch, level: float) -> list[Microbatch]:
        """The batch in as many parts as the level asks for: part k of n holds each n-th image from the k-th on."""
        n = min(self.microbatches[min(math.ceil(level), len(self.microbatches) - 1)], len(batch["image"]))
        cond = self.condition(batch, "")
        return [(batch["image"][k::n], {name: value[k::n] for name, value in cond.items()}) for k in range(n)]

    def step_accumulated(
        self,
        optimizer: Optimizer,
        parts: list[Microbatch],
        loss: Callable[..., Tensor],
        name: str,
        penalised: bool = False,
    ) -> None:
        """One step down the mean of the losses (images, condition) -> scalar of all microbatches, see `step`."""
        n = sum(len(x) for x, _ in parts)
        optimizer.zero_grad()
        for x, cond in parts:
            self.descend(loss(x, cond) * (len(x) / n), penalised)
        self.take(optimizer, name)

    def sample_latents(self, rngs: ImageRngs, cond: Cond) -> Tensor:
        return rngs.randn(self.generator.noise_dim, device=self.device)

    def enlarged(self, image: Tensor) -> Tensor:
        """Images of the level of the last batch, as large as those of the top."""
        for _ in range(self.discriminator.top - self.grown.item()):
            image = doubled(image)
        return image


def _read_anew(model: Growing, _: object) -> None:
    """Other weights were loaded, which have grown as far as they say."""
    model._grown = None


def reset_optimizer_state(optimizer: Optimizer) -> None:
    """All moments and step counts to 0, as at the start."""
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()
