"""StyleGAN2 (Karras et al. 2020, Analyzing and Improving the Image Quality of StyleGAN)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from atelier.core import ranks
from atelier.core.batch import Batch
from atelier.core.precision import float32
from atelier.core.ranges import NonNegFloat, PositiveFloat, PositiveInt, Probability
from atelier.core.rng import ImageRngs
from atelier.losses.adversarial import Adversarial
from atelier.losses.regularizers import path_lengths, r1_penalty
from atelier.models.base import Cond, StyleBased
from atelier.models.two_players import TwoPlayers, no_weight_grads
from atelier.nets.augment import ADA, DiffAugment
from atelier.nets.conditioning import ConditionEmbedder, NoCondition
from atelier.nets.stylegan import mixed
from atelier.nets.stylegan2 import StyleGAN2Discriminator, StyleGAN2Generator


class StyleGAN2(TwoPlayers, StyleBased):
    """Each batch is a discriminator step and a generator step; now and then each has a second one for its penalty.

    Where it has, its optimizer is corrected (Karras et al. 2020, appendix B).

    Args:
        generator: (z, condition) -> styles -> image.
        discriminator: (image, condition) -> logits (B,).
        generator_embedder, discriminator_embedder: conditions to a vector, one for each player; None: there are none.
        loss: losses of the two players.
        augment: change of all that the discriminator sees; None: nothing.
        r1_gamma: weight of its squared gradient at real images, halved; every `r1_every`-th batch.
        path_weight: weight of the penalty for styles whose small steps move images unequally far; every `path_every`-th
            batch on half of it (appendix B).
        path_ema_decay: decay of the mean path length, per penalty.
        style_mixing_prob: share of images that take the styles of a second latent from a random layer on.
        style_ema_decay: decay of the mean style, per batch.
        truncation: psi of samples, unless another is asked for; 1 = off (Karras et al. 2019, appendix B).
        generator_optimizer, discriminator_optimizer: parameters -> optimizer.
        grad_clip: global gradient norm of either player.
    """

    idea = (
        "A style scales the weights of each convolution, in place of the maps that they make. "
        "Images of all sizes add up, so nothing has to grow, and equal steps of a style move images equally far."
    )
    formula = (
        "L_D = E l_D(D(x), D(G(w))) + gamma/2 E |dD/dx|^2, w = mapping(z)\n"
        "L_G = E l_G(D(G(w))) + weight E (|J_w^T y| - a)^2, J_w = dG/dw, y: noise, a: the mean length so far"
    )
    ema_nets = ("generator", "generator_embedder")
    players = ("generator", "generator_embedder"), ("discriminator", "discriminator_embedder")
    needs_double_backward = True
    path_length: Tensor

    def __init__(
        self,
        generator: StyleGAN2Generator,
        discriminator: StyleGAN2Discriminator,
        generator_embedder: ConditionEmbedder | None,
        discriminator_embedder: ConditionEmbedder | None,
        loss: Adversarial,
        augment: DiffAugment | ADA | None,
        r1_gamma: NonNegFloat,
        r1_every: PositiveInt,
        path_weight: NonNegFloat,
        path_every: PositiveInt,
        path_ema_decay: Probability,
        style_mixing_prob: Probability,
        style_ema_decay: Probability,
        truncation: NonNegFloat,
        generator_optimizer: Callable,
        discriminator_optimizer: Callable,
        grad_clip: PositiveFloat | None,
    ) -> None:
        super().__init__(loss, generator_optimizer, discriminator_optimizer, grad_clip, augment)
        self.generator, self.generator_embedder = generator, generator_embedder or NoCondition()
        self.discriminator, self.discriminator_embedder = discriminator, discriminator_embedder or NoCondition()
        self.needs = frozenset(self.generator_embedder.conditions)
        self.r1_gamma, self.r1_every = r1_gamma, r1_every
        self.path_weight, self.path_every, self.path_ema_decay = path_weight, path_every, path_ema_decay
        self.style_mixing_prob, self.style_ema_decay, self.truncation = style_mixing_prob, style_ema_decay, truncation
        self.lazy_every = path_every if path_weight > 0 else 0, r1_every if r1_gamma > 0 else 0
        self.register_buffer("path_length", torch.zeros(()))

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        generator_optimizer, discriminator_optimizer = self.optimizers()
        self._discriminator_step(batch, discriminator_optimizer)
        if self.r1_gamma > 0 and batch_idx % self.r1_every == 0:
            self._r1_step(batch, discriminator_optimizer)
        self._generator_step(batch, generator_optimizer)
        if self.path_weight > 0 and batch_idx % self.path_every == 0:
            self._path_step(batch, generator_optimizer)

    def _discriminator_step(self, batch: Batch, optimizer: Optimizer) -> None:
        cond, n = self.condition(batch, ""), len(batch["image"])
        with torch.no_grad():
            real, fake = self.seen(batch["image"]), self.seen(self._fake(self._mixed(cond, n)))
        known = self.discriminator_embedder.vector(cond, n)
        real_logits, fake_logits = self.discriminator(real, known), self.discriminator(fake, known)
        loss = self.loss.discriminator(real_logits, fake_logits)
        self.report_adversarial(loss, real_logits, fake_logits)
        self.step(optimizer, loss, "discriminator")

    def _r1_step(self, batch: Batch, optimizer: Optimizer) -> None:
        cond, n = self.condition(batch, ""), len(batch["image"])
        real = self.seen(batch["image"]).detach().requires_grad_()
        with float32(self.device):
            r1 = r1_penalty(self.discriminator(real, self.discriminator_embedder.vector(cond, n)), real)
        self.report("r1", r1)
        self.step(optimizer, self.r1_every * self.r1_gamma / 2 * r1, "r1", True)

    def _generator_step(self, batch: Batch, optimizer: Optimizer) -> None:
        cond, n = self.condition(batch, ""), len(batch["image"])
        styles = self._mixed(cond, n)
        mean = ranks.mean(styles.detach()[:, 0].mean(0))
        self.generator.mapping.mean.lerp_(mean, 1 - self.style_ema_decay)
        known, fake = self.discriminator_embedder.vector(cond, n).detach(), self.seen(self._fake(styles))
        with no_weight_grads(self.discriminator):
            fake_logits = self.discriminator(fake, known)
            real_logits = self.compared(lambda x: self.discriminator(x, known), batch["image"])
        loss = self.loss.generator(real_logits, fake_logits)
        self.report("generator", loss)
        self.step(optimizer, loss, "generator")

    def _path_step(self, batch: Batch, optimizer: Optimizer) -> None:
        """E (|J^T y| - a)^2, a the running mean of |J^T y| (eq. 4)."""
        n = max(1, len(batch["image"]) // 2)
        cond = {name: value[:n] for name, value in self.condition(batch, "").items()}
        with float32(self.device):
            styles = self._mixed(cond, n)
            lengths = path_lengths(self._fake(styles), styles)
        self.path_length.lerp_(ranks.mean(lengths.detach().mean()), 1 - self.path_ema_decay)
        penalty = (lengths - self.path_length).square().mean()
        self.report("path_length", self.path_length)
        self.report("path_penalty", penalty)
        self.step(optimizer, self.path_every * self.path_weight * penalty, "path", True)

    def _mixed(self, cond: Cond, n: int) -> Tensor:
        """Styles (n, L, W) of fresh latents, some of them of two."""
        known, layers = self.generator_embedder.vector(cond, n), self.generator.synthesis.n_styles
        z = torch.randn(2, n, self.generator.noise_dim, device=self.device)
        first, second = (self.generator.mapping(one, known) for one in z)
        return mixed(first, second, layers, self.style_mixing_prob)

    def _fake(self, styles: Tensor) -> Tensor:
        sizes = self.generator.synthesis.noise_sizes
        noises = [torch.randn(len(styles), 1, size, size, device=self.device) for size in sizes]
        return self.generator.synthesis(styles, noises)

    def sample_latents(self, rngs: ImageRngs, cond: Cond) -> Tensor:
        return rngs.randn(self.generator.noise_dim, device=self.device)

    def synthesize(self, styles: Tensor, rngs: ImageRngs) -> Tensor:
        noises = [rngs.randn(1, size, size, device=self.device) for size in self.generator.synthesis.noise_sizes]
        return self.generator.synthesis(styles, noises)
