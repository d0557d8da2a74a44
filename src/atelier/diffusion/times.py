"""How the times that a net is trained at are distributed over (0, 1]."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from atelier.core.ranges import PositiveFloat, PositiveInt


class TimeDistribution(ABC):
    """Of t, from 0 (data) to 1 (noise)."""

    @abstractmethod
    def __call__(self, n: int, device: torch.device, images_seen: int) -> Tensor:
        """Times (n,) float64, from torch's generator, after `images_seen` images of training."""


class Uniform(TimeDistribution):
    """t ~ U(0, 1]   (Ho et al. 2020, DDPM, algorithm 1)."""

    def __call__(self, n: int, device: torch.device, images_seen: int) -> Tensor:
        return 1 - torch.rand(n, device=device, dtype=torch.float64)


class LogitNormal(TimeDistribution):
    """t = sigmoid(n), n ~ N(mean, deviation^2)   (Esser et al. 2024, Stable Diffusion 3, eq. 19).

    Args:
        mean: of the logit of t.
        deviation: of the same.
        mean_end: where the mean moves, linearly, within `mean_images` images: from much noise, which shows what is
            where, to little, which shows how it is drawn; None: it stays.
        mean_images: images that the move takes.
    """

    def __init__(
        self,
        mean: float = 0.0,
        deviation: PositiveFloat = 1.0,
        mean_end: float | None = None,
        mean_images: PositiveInt = 1,
    ) -> None:
        self.mean, self.deviation = mean, deviation
        self.mean_end, self.mean_images = mean_end, mean_images

    def __call__(self, n: int, device: torch.device, images_seen: int) -> Tensor:
        end = self.mean if self.mean_end is None else self.mean_end
        mean = self.mean + min(1.0, images_seen / self.mean_images) * (end - self.mean)
        return (mean + self.deviation * torch.randn(n, device=device, dtype=torch.float64)).sigmoid()
