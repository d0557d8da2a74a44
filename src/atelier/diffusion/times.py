"""How the times that a net is trained at are distributed over (0, 1]."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from atelier.core.ranges import PositiveFloat, PositiveInt


class TimeDistribution(ABC):
    """Distribution of the training times t in (0, 1]."""

    @abstractmethod
    def __call__(self, n: int, device: torch.device, images_seen: int) -> Tensor:
        """Times (n,) float64, from torch's generator, after `images_seen` images of training."""


class Uniform(TimeDistribution):
    """t ~ U(0, 1]   (Ho et al. 2020, DDPM, algorithm 1)."""

    def __call__(self, n: int, device: torch.device, images_seen: int) -> Tensor:
        return 1 - torch.rand(n, device=device, dtype=torch.float64)


class LogitNormal(TimeDistribution):
    """t = sigmoid(n), n ~ N(logit_mean, logit_std^2)   (Esser et al. 2024, Stable Diffusion 3, eq. 19).

    Args:
        logit_mean: mean of the logit of t.
        logit_std: deviation of the logit of t.
        logit_mean_end: value to which the mean moves, linearly, within `logit_mean_images` images: from much noise,
            which shows what is where, to little, which shows how it is drawn; None: it stays.
        logit_mean_images: images that the move takes.
    """

    def __init__(
        self,
        logit_mean: float = 0.0,
        logit_std: PositiveFloat = 1.0,
        logit_mean_end: float | None = None,
        logit_mean_images: PositiveInt = 1,
    ) -> None:
        self.logit_mean, self.logit_std = logit_mean, logit_std
        self.logit_mean_end, self.logit_mean_images = logit_mean_end, logit_mean_images

    def __call__(self, n: int, device: torch.device, images_seen: int) -> Tensor:
        end = self.logit_mean if self.logit_mean_end is None else self.logit_mean_end
        mean = self.logit_mean + min(1.0, images_seen / self.logit_mean_images) * (end - self.logit_mean)
        return (mean + self.logit_std * torch.randn(n, device=device, dtype=torch.float64)).sigmoid()
