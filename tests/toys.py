"""Families that no page has: what they need of the house is tested with them (tests/models/test_base.py)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from atelier.core.batch import Batch
from atelier.core.ranges import PositiveFloat, PositiveInt
from atelier.core.rng import ImageRngs
from atelier.losses.likelihood import Bernoulli, Gaussian
from atelier.models.base import Cond, Generator, Model
from atelier.nets.contracts import FirstStage
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


for toy in (MeanTeacher, Tuned, NoisyClassifier):
    toy.__module__ = MODULE
