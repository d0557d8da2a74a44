"""How the times that a net is trained at are distributed over (0, 1]."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from atelier.core.ranges import PositiveFloat, PositiveInt
from atelier.diffusion.schedules import Schedule


class TimeDistribution(ABC):
    """Distribution of the training times t in (0, 1]."""

    @abstractmethod
    def __call__(self, n: int, schedule: Schedule, device: torch.device, images_seen: int) -> Tensor:
        """Times (n,) float64 of a schedule, from torch's generator, after `images_seen` images of training."""


class Uniform(TimeDistribution):
    """t ~ U(0, 1]   (Ho et al. 2020, DDPM, algorithm 1)."""

    def __call__(self, n: int, schedule: Schedule, device: torch.device, images_seen: int) -> Tensor:
        return 1 - torch.rand(n, device=device, dtype=torch.float64)


class LogitNormal(TimeDistribution):
    """t = sigmoid(n), n ~ N(logit_mean, logit_std^2)   (Esser et al. 2024, Stable Diffusion 3, eq. 19).

    Args:
        logit_mean: mean of the logit of t.
        logit_std: deviation of the logit of t.
        logit_mean_end: value to which the mean moves, linearly, within `logit_mean_images` images: from much noise,
            which shows what is where, to little, which shows how it is drawn; None: it stays.
        logit_mean_images: images that the move takes.
        shift: factor s of t -> s t / (1 + (s - 1) t), more noise for larger images (eq. 23); 1: none.
    """

    def __init__(
        self,
        logit_mean: float = 0.0,
        logit_std: PositiveFloat = 1.0,
        logit_mean_end: float | None = None,
        logit_mean_images: PositiveInt = 1,
        shift: PositiveFloat = 1.0,
    ) -> None:
        self.logit_mean, self.logit_std = logit_mean, logit_std
        self.logit_mean_end, self.logit_mean_images, self.shift = logit_mean_end, logit_mean_images, shift

    def __call__(self, n: int, schedule: Schedule, device: torch.device, images_seen: int) -> Tensor:
        end = self.logit_mean if self.logit_mean_end is None else self.logit_mean_end
        mean = self.logit_mean + min(1.0, images_seen / self.logit_mean_images) * (end - self.logit_mean)
        t = (mean + self.logit_std * torch.randn(n, device=device, dtype=torch.float64)).sigmoid()
        return t if self.shift == 1 else self.shift * t / (1 + (self.shift - 1) * t)


class LogNormal(TimeDistribution):
    """The time at which ln(sigma / alpha) is n ~ N(log_mean, log_std^2)   (Karras et al. 2022, EDM, table 1).

    What the schedule does not reach counts as its noisiest level.

    Args:
        log_mean: mean of ln(sigma / alpha).
        log_std: deviation of it.
    """

    def __init__(self, log_mean: float = -1.2, log_std: PositiveFloat = 1.2) -> None:
        self.log_mean, self.log_std = log_mean, log_std

    def __call__(self, n: int, schedule: Schedule, device: torch.device, images_seen: int) -> Tensor:
        logs = self.log_mean + self.log_std * torch.randn(n, device=device, dtype=torch.float64)
        return schedule.time(-2 * logs).clamp(max=1.0)
