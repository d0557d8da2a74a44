"""Families that no page has: what they need of the house is tested with them (tests/models/test_base.py)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from atelier.core.batch import Batch
from atelier.core.condition import Embedder
from atelier.core.ranges import PositiveFloat, PositiveInt
from atelier.core.rng import ImageRngs
from atelier.diffusion.objective import Objective
from atelier.diffusion.samplers import Sampler
from atelier.losses.likelihood import Bernoulli, Gaussian
from atelier.models.base import Cond, Generator, Model
from atelier.nets.contracts import Denoiser, FirstStage, keeps
from atelier.nets.denoising import DenoisingNet
from atelier.nets.frozen import Frozen
from atelier.nets.vae import VAENet

MODULE = "atelier.models.toys"  # where a config finds them, while a test lets it


class MeanTeacher(Generator):
    """A denoiser that learns the image, and what its own average sees in other noise (Tarvainen & Valpola 2017)."""

    ema_nets = ("net",)

    def __init__(
        self, net: VAENet, likelihood: Gaussian | Bernoulli, optimizer: Callable, grad_clip: PositiveFloat | None
    ) -> None:
        super().__init__()
        self.net, self.optimizer, self.grad_clip = net, optimizer, grad_clip

    def training_step(self, batch: Batch) -> Tensor:
        x = batch["image"]
        first, second = (x + torch.randn_like(x) for _ in range(2))
        with torch.no_grad():
            taught = self.average("net")(second, None)[2]
        back = self.net(first, None)[2]
        loss = F.mse_loss(back, x) + F.mse_loss(back, taught)
        self.report("loss", loss)
        return loss

    def sample(self, cond: Cond, rngs: ImageRngs) -> Tensor:
        return self.net(rngs.randn(*self.net.image_shape, device=self.device), None)[2]


class Tuned(Generator):
    """The autoencoder of a finished run, whose decoder alone is trained further."""

    ema_nets = ("net",)

    def __init__(self, first_stage: FirstStage, optimizer: Callable, grad_clip: PositiveFloat | None) -> None:
        super().__init__()
        self.net, self.optimizer, self.grad_clip = first_stage.net, optimizer, grad_clip
        self.net.encoder.requires_grad_(False)

    def training_step(self, batch: Batch) -> Tensor:
        loss = F.l1_loss(self.net(batch["image"], None)[2], batch["image"])
        self.report("loss", loss)
        return loss

    def sample(self, cond: Cond, rngs: ImageRngs) -> Tensor:
        return self.net.decode(rngs.randn(*self.net.latent_shape, device=self.device))


class Distilled(Generator):
    """A net without guidance that learns what a finished one denoises under guidance 2 (Meng et al. 2023, eq. 2)."""

    ema_nets = ("net", "embedder")

    def __init__(
        self,
        teacher: Denoiser,
        objective: Objective,
        net: DenoisingNet,
        embedder: Embedder,
        sampler: Sampler,
        optimizer: Callable,
        grad_clip: PositiveFloat | None,
    ) -> None:
        super().__init__()
        keeps(teacher, Denoiser, ".teacher")
        self.teacher = Frozen(teacher)
        self.objective, self.net, self.embedder, self.sampler = objective, net, embedder, sampler
        self.needs, self.optimizer, self.grad_clip = frozenset(teacher.conditions), optimizer, grad_clip

    def training_step(self, batch: Batch) -> Tensor:
        teacher, cond, x = self.teacher.net, self.condition(batch, ""), batch["image"]
        t = self.objective.sample_times(len(x), x.device)
        alpha, sigma = teacher.schedule.pair(t, like=x)
        x_t = alpha * x + sigma * torch.randn_like(x)
        with torch.no_grad():
            free, known = teacher.denoise(x_t, t, None), teacher.denoise(x_t, t, cond)
        mine = self.objective.denoise(self.net, x_t, t, self.embedder(cond, len(x)))
        loss = F.mse_loss(mine, free + 2 * (known - free))
        self.report("loss", loss)
        return loss

    def sample(self, cond: Cond, rngs: ImageRngs) -> Tensor:
        noise, known = rngs.randn(*self.net.shape, device=self.device), self.embedder(cond, len(rngs))
        denoise = partial(self.objective.denoise, self.net, cond=known)
        return self.sampler(denoise, noise, self.objective.schedule, rngs)


class NoisyClassifier(Model):
    """Labels of noisy images: a model that makes none."""

    ema_nets = ("net",)

    needs = frozenset({"label"})

    def __init__(self, optimizer: Callable, n_inputs: PositiveInt = 4, n_classes: PositiveInt = 3) -> None:
        super().__init__()
        self.net, self.optimizer = torch.nn.Linear(n_inputs, n_classes), optimizer

    def training_step(self, batch: Batch) -> Tensor:
        x = batch["image"].flatten(1)
        loss = F.cross_entropy(self.net(x + torch.randn_like(x)), batch["label"])
        self.report("loss", loss)
        return loss


for toy in (MeanTeacher, Tuned, Distilled, NoisyClassifier):
    toy.__module__ = MODULE
