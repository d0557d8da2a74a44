"""GANs that grow: Progressive GAN (Karras et al. 2018), and StyleGAN on it (Karras et al. 2019)."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from atelier.core import ranks
from atelier.core.batch import Batch
from atelier.core.errors import UserError
from atelier.core.precision import float32
from atelier.core.ranges import Levels, NonNegFloat, NonNegInt, PositiveFloat, PositiveInt, Probability
from atelier.core.rng import ImageRngs
from atelier.losses.adversarial import Adversarial
from atelier.losses.regularizers import lipschitz
from atelier.models.base import Cond, Latent, Styled, at_rest
from atelier.nets.conditioning import ConditionEmbedder, NoCondition
from atelier.nets.progan import ProDiscriminator, ProGenerator, doubled, seen_at
from atelier.nets.stylegan import StyleGenerator, mixed


class _Progressive(Latent):
    """Each batch is a discriminator step and a generator step at the level that `images_seen` says.

    Level 0 is trained for `stable_images`, each later one fades in over `fade_images` and then has `stable_images` of
    its own. When a level begins to fade in, the optimizers forget their moments.

    Args:
        generator: latents to images of a level.
        discriminator: (image, condition, level) -> logits (B,).
        generator_embedder, discriminator_embedder: conditions to a vector, one for each player; None: there are none.
        loss: of the two players.
        r1_gamma: weight of the discriminator's squared gradient at real images, halved.
        lipschitz_weight: of the penalty for a gradient whose length is not 1 (WGAN-GP).
        drift: weight of E D(x)^2, which keeps logits near 0 (Karras et al. 2018, appendix A.1).
        stable_images, fade_images: see above.
        pieces: into how many parts the batch is cut at each level, the last for all further ones: memory for time.
        generator_optimizer, discriminator_optimizer: parameters -> optimizer.
        grad_clip: global gradient norm of either player.

    Raises:
        UserError: the other member's generator.
    """

    averaged = ("generator", "generator_embedder")
    strategy = {"find_unused_parameters": True}
    limits: ClassVar[dict[str, float]] = {"real_logit": 1e4, "fake_logit": 1e4}
    takes: ClassVar[type]
    at: Tensor
    grown: Tensor

    def __init__(
        self,
        generator: ProGenerator | StyleGenerator,
        discriminator: ProDiscriminator,
        generator_embedder: ConditionEmbedder | None,
        discriminator_embedder: ConditionEmbedder | None,
        loss: Adversarial,
        r1_gamma: NonNegFloat,
        lipschitz_weight: NonNegFloat,
        drift: NonNegFloat,
        stable_images: PositiveInt,
        fade_images: NonNegInt,
        pieces: Levels,
        generator_optimizer: Callable,
        discriminator_optimizer: Callable,
        grad_clip: PositiveFloat | None,
    ) -> None:
        super().__init__()
        if not isinstance(generator, self.takes):
            problem = f"{type(self).__name__} takes another"
            fix = f"model.generator._target_={self.takes.__module__}.{self.takes.__name__}"
            raise UserError("model.generator._target_", type(generator).__name__, problem, fix)
        self.automatic_optimization = False
        self.generator, self.generator_embedder = generator, generator_embedder or NoCondition()
        self.discriminator, self.discriminator_embedder = discriminator, discriminator_embedder or NoCondition()
        self.needs = frozenset(self.generator_embedder.conditions)
        self.loss, self.r1_gamma, self.lipschitz_weight, self.drift = loss, r1_gamma, lipschitz_weight, drift
        self.stable_images, self.fade_images, self.pieces = stable_images, fade_images, pieces
        self.generator_optimizer, self.discriminator_optimizer = generator_optimizer, discriminator_optimizer
        self.grad_clip = grad_clip
        self.register_buffer("at", torch.zeros(()))  # the level of the last batch
        self.register_buffer("grown", torch.zeros((), dtype=torch.int64))  # the largest level that has been trained

    def level(self) -> float:
        """k where level k is trained, k + a with 0 < a < 1 on the way from it to the next."""
        k, rest = divmod(max(0, self.images_seen - self.stable_images), self.stable_images + self.fade_images)
        if self.images_seen < self.stable_images:
            return 0.0
        part = (rest + 1) / (self.fade_images + 1) if rest < self.fade_images else 1.0
        return min(float(self.discriminator.top), k + part)

    def training_step(self, batch: Batch) -> None:
        generator_optimizer, discriminator_optimizer = self.optimizers()
        level = self.level()
        if math.ceil(level) > self.grown:
            for optimizer in (generator_optimizer, discriminator_optimizer):
                forget(optimizer)
        self.at.fill_(level)
        self.grown.fill_(math.ceil(level))
        self.report("level", torch.tensor(level))
        n = min(self.pieces[min(math.ceil(level), len(self.pieces) - 1)], len(batch["image"]))
        pieces = [self._piece(batch, k, n) for k in range(n)]
        self._in_pieces(discriminator_optimizer, "discriminator", pieces, self._discriminator_loss, level)
        self._in_pieces(generator_optimizer, "generator", pieces, self._generator_loss, level)

    def _piece(self, batch: Batch, k: int, n: int) -> tuple[Tensor, Cond]:
        """Images and condition of each n-th image, from the k-th on."""
        return batch["image"][k::n], {name: value[k::n] for name, value in self.condition(batch, "").items()}

    def _in_pieces(
        self, optimizer: Optimizer, name: str, pieces: list[tuple[Tensor, Cond]], loss: Callable, level: float
    ) -> None:
        """One step down the mean of the pieces' losses."""
        n = sum(len(x) for x, _ in pieces)
        optimizer.zero_grad()
        for x, cond in pieces:
            self.descend(loss(x, cond, level) * (len(x) / n))
        self.take(optimizer, name)

    def _discriminator_loss(self, x: Tensor, cond: Cond, level: float) -> Tensor:
        with torch.no_grad():
            real, fake = seen_at(x, level, self.discriminator.top), self.made(cond, len(x), level)
        known = self.discriminator_embedder.vector(cond, len(x)).float()
        real.requires_grad_(self.r1_gamma > 0)
        with float32(self.device, self.r1_gamma > 0):
            real_logits, fake_logits = self.discriminator(real, known, level), self.discriminator(fake, known, level)
        loss = self.loss.discriminator(real_logits, fake_logits)
        self.report_game(loss, real_logits, fake_logits)
        loss = loss + self.drift * real_logits.square().mean()
        loss = loss + self.zero_centred("r1", self.r1_gamma, real_logits, real)
        if self.lipschitz_weight > 0:
            length = lipschitz(lambda x: self.discriminator(x, known, level), real.detach(), fake)
            self.report("lipschitz", length)
            loss = loss + self.lipschitz_weight * length
        return loss

    def _generator_loss(self, x: Tensor, cond: Cond, level: float) -> Tensor:
        known, fake = self.discriminator_embedder.vector(cond, len(x)).detach(), self.made(cond, len(x), level)
        real = seen_at(x, level, self.discriminator.top)
        with at_rest(self.discriminator):
            fake_logits = self.discriminator(fake, known, level)
            real_logits = self.discriminator(real, known, level) if self.loss.compares else None
        loss = self.loss.generator(real_logits, fake_logits)
        self.report("generator", loss)
        return loss

    @abstractmethod
    def made(self, cond: Cond, n: int, level: float) -> Tensor:
        """Images (n, C, h, w) of fresh latents, of the level's size."""

    def configure_optimizers(self) -> list[Optimizer]:
        players = [self.generator, self.generator_embedder], [self.discriminator, self.discriminator_embedder]
        ours, theirs = ([p for net in nets for p in net.parameters()] for nets in players)
        return [self.generator_optimizer(ours), self.discriminator_optimizer(theirs)]

    def draw(self, rngs: ImageRngs, cond: Cond) -> Tensor:
        return rngs.randn(self.generator.noise_dim, device=self.device)

    def enlarged(self, image: Tensor) -> Tensor:
        """Images of the level of the last batch, as large as those of the top."""
        for _ in range(self.discriminator.top - self.grown.item()):
            image = doubled(image)
        return image


class ProGAN(_Progressive):
    """Noise on a sphere through convolutions; arguments as above."""

    takes = ProGenerator

    def made(self, cond: Cond, n: int, level: float) -> Tensor:
        z = torch.randn(n, self.generator.noise_dim, device=self.device)
        return self.generator(z, self.generator_embedder.vector(cond, n), level)

    def render(self, z: Tensor, cond: Cond, rngs: ImageRngs) -> Tensor:
        return self.enlarged(self.generator(z, self.generator_embedder.vector(cond, len(z)), self.at.item()))


class StyleGAN(_Progressive, Styled):
    """Noise through a mapping to styles, which set the mean and deviation of each map.

    Args:
        mixing: share of images that take the styles of a second latent from a random layer on.
        mean_memory: of the mean style, per call of the mapping: each player calls it once per piece of a batch.
        truncation: psi of samples, unless another is asked for; 1 = off (Karras et al. 2019, appendix B).
        generator and all others: as above.
    """

    takes = StyleGenerator

    def __init__(
        self,
        generator: ProGenerator | StyleGenerator,
        discriminator: ProDiscriminator,
        generator_embedder: ConditionEmbedder | None,
        discriminator_embedder: ConditionEmbedder | None,
        loss: Adversarial,
        r1_gamma: NonNegFloat,
        lipschitz_weight: NonNegFloat,
        drift: NonNegFloat,
        stable_images: PositiveInt,
        fade_images: NonNegInt,
        pieces: Levels,
        mixing: Probability,
        mean_memory: Probability,
        truncation: NonNegFloat,
        generator_optimizer: Callable,
        discriminator_optimizer: Callable,
        grad_clip: PositiveFloat | None,
    ) -> None:
        super().__init__(
            generator, discriminator, generator_embedder, discriminator_embedder, loss, r1_gamma, lipschitz_weight,
            drift, stable_images, fade_images, pieces, generator_optimizer, discriminator_optimizer, grad_clip,
        )  # fmt: skip
        self.mixing, self.mean_memory, self.truncation = mixing, mean_memory, truncation

    def made(self, cond: Cond, n: int, level: float) -> Tensor:
        known, net = self.generator_embedder.vector(cond, n), self.generator.synthesis
        z = torch.randn(2, n, self.generator.noise_dim, device=self.device)
        first = self.generator.mapping(z[0], known)
        self.generator.mapping.mean.lerp_(ranks.mean(first.detach().mean(0)), 1 - self.mean_memory)
        styles = mixed(first, self.generator.mapping(z[1], known), net.n_styles, self.mixing)
        noises = [torch.randn(n, 1, size, size, device=self.device) for size in net.noise_sizes]
        return net(styles, noises, level)

    def styles(self, z: Tensor, cond: Cond, truncation: float | None = None) -> Tensor:
        w = self.generator.mapping(z, self.generator_embedder.vector(cond, len(z)))
        mean, psi = self.generator.mapping.mean, self.truncation if truncation is None else truncation
        return (mean + psi * (w - mean))[:, None].expand(-1, self.generator.synthesis.n_styles, -1)

    def paint(self, styles: Tensor, rngs: ImageRngs) -> Tensor:
        noises = [rngs.randn(1, size, size, device=self.device) for size in self.generator.synthesis.noise_sizes]
        return self.enlarged(self.generator.synthesis(styles, noises, self.at.item()))

    def protocol(self) -> dict[str, Any]:
        return {"truncation": self.truncation}


def forget(optimizer: Optimizer) -> None:
    """All moments and step counts to 0, as at the start."""
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()
