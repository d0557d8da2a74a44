"""What GANs that grow from 4x4 share: the level of a batch, its pieces, its images (Karras et al. 2018, section 2)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from atelier.core.batch import Batch
from atelier.core.ranges import Levels, NonNegInt, PositiveFloat, PositiveInt
from atelier.core.rng import ImageRngs
from atelier.losses.adversarial import Adversarial
from atelier.models.base import Cond, Latent
from atelier.models.two_players import TwoPlayers
from atelier.nets.progan import doubled

Piece = tuple[Tensor, Cond]  # images (b, C, H, W) and their conditions


class Growing(TwoPlayers, Latent):
    """Two players at the level that `images_seen` says; a family has `generator` and `discriminator` with `top` levels.

    Level 0 is trained for `stable_images`, each later one fades in over `fade_images` and then has `stable_images` of
    its own. When a level begins to fade in, the optimizers forget their moments.

    Args:
        stable_images, fade_images: see above.
        microbatches: into how many parts the batch is cut at each level, the last for all further ones: memory for
            time.
        loss, generator_optimizer, discriminator_optimizer, grad_clip: as in `TwoPlayers`.
    """

    players = ("generator", "generator_embedder"), ("discriminator", "discriminator_embedder")
    at: Tensor
    grown: Tensor

    def __init__(
        self,
        stable_images: PositiveInt,
        fade_images: NonNegInt,
        microbatches: Levels,
        loss: Adversarial,
        generator_optimizer: Callable,
        discriminator_optimizer: Callable,
        grad_clip: PositiveFloat | None,
    ) -> None:
        super().__init__(loss, generator_optimizer, discriminator_optimizer, grad_clip)
        self.stable_images, self.fade_images, self.microbatches = stable_images, fade_images, microbatches
        self.register_buffer("at", torch.zeros(()))  # the level of the last batch
        self.register_buffer("grown", torch.zeros((), dtype=torch.int64))  # the largest level that has been trained

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
        if math.ceil(level) > self.grown:
            for optimizer in self.optimizers():
                reset_optimizer_state(optimizer)
        self.at.fill_(level)
        self.grown.fill_(math.ceil(level))
        self.report("level", torch.tensor(level))
        return level

    def cut(self, batch: Batch, level: float) -> list[Piece]:
        """The batch in as many pieces as the level asks for: piece k of n holds each n-th image from the k-th on."""
        n = min(self.microbatches[min(math.ceil(level), len(self.microbatches) - 1)], len(batch["image"]))
        cond = self.condition(batch, "")
        return [(batch["image"][k::n], {name: value[k::n] for name, value in cond.items()}) for k in range(n)]

    def step_in_pieces(self, optimizer: Optimizer, pieces: list[Piece], loss: Callable[..., Tensor], name: str) -> None:
        """One step down the mean of the losses (images, condition) -> scalar of all pieces."""
        n = sum(len(x) for x, _ in pieces)
        optimizer.zero_grad()
        for x, cond in pieces:
            self.descend(loss(x, cond) * (len(x) / n))
        self.take(optimizer, name)

    def sample_latents(self, rngs: ImageRngs, cond: Cond) -> Tensor:
        return rngs.randn(self.generator.noise_dim, device=self.device)

    def enlarged(self, image: Tensor) -> Tensor:
        """Images of the level of the last batch, as large as those of the top."""
        for _ in range(self.discriminator.top - self.grown.item()):
            image = doubled(image)
        return image


def reset_optimizer_state(optimizer: Optimizer) -> None:
    """All moments and step counts to 0, as at the start."""
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()
