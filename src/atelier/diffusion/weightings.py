"""Weights of the squared error of a net's answer, at each noise level."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from atelier.core.ranges import PositiveFloat, Probability, Width
from atelier.diffusion.targets import Target


class Weighting(ABC):
    """Weight of the squared error at each noise level.

    Times below `time_floor` are weighted as it is, which keeps the weight of the last bit of noise finite.
    """

    time_floor: float = 0.0

    @abstractmethod
    def __call__(self, target: Target, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The weight at x_t = alpha x + sigma eps, in the shape of alpha."""

    def total(self, loss: Tensor, logsnr: Tensor) -> Tensor:
        """What is minimised, (B,), of weighted losses (B,) at log-SNRs (B,)."""
        return loss


class Plain(Weighting):
    """1: the squared error of the answer itself   (Ho et al. 2020, DDPM, eq. 14)."""

    def __call__(self, target: Target, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.ones_like(alpha)


class ErrorOf(Weighting):
    """(gain / gain_s)^2: the squared error of what the answer says of another target, s.

    The error of the image that the answer stands for, measured as an error of that target (Li & He 2025, JiT, table 1).

    Args:
        loss_space: target whose error is measured.
        time_floor: time below which weights stay the same.
    """

    def __init__(self, loss_space: Target, time_floor: Probability = 0.0) -> None:
        self.loss_space, self.time_floor = loss_space, time_floor

    def __call__(self, target: Target, alpha: Tensor, sigma: Tensor) -> Tensor:
        if type(self.loss_space) is type(target) and vars(self.loss_space) == vars(target):
            return torch.ones_like(alpha)
        return (target.gain(alpha, sigma) / self.loss_space.gain(alpha, sigma)) ** 2


class MinSNR(Weighting):
    """min(snr, gamma) gain^2: the squared error of the image by min(snr, gamma), whatever the net predicts.

    (Hang et al. 2023, Min-SNR, section 3.4.) With alpha^2 + sigma^2 = 1 that is min(snr, gamma) for x0, / snr for eps,
    / (snr + 1) for v.

    Args:
        gamma: signal-to-noise ratio above which levels weigh the same.
        time_floor: time below which weights stay the same.
    """

    def __init__(self, gamma: PositiveFloat = 5.0, time_floor: Probability = 0.0) -> None:
        self.gamma, self.time_floor = gamma, time_floor

    def __call__(self, target: Target, alpha: Tensor, sigma: Tensor) -> Tensor:
        snr = (alpha / sigma) ** 2
        return snr.clamp(max=self.gamma) * target.gain(alpha, sigma) ** 2


class SoftMinSNR(Weighting):
    """gain^2 / (1 / snr + 1 / gamma): min-SNR's squared error of the image with a soft corner.

    (Crowson et al. 2024, Hourglass Diffusion Transformers, section 4.2.) With alpha = 1 and gamma = 1 / sigma_data^2 it
    is theirs.

    Args:
        gamma: signal-to-noise ratio around which the weight stops to rise.
        time_floor: time below which weights stay the same.
    """

    def __init__(self, gamma: PositiveFloat = 4.0, time_floor: Probability = 0.0) -> None:
        self.gamma, self.time_floor = gamma, time_floor

    def __call__(self, target: Target, alpha: Tensor, sigma: Tensor) -> Tensor:
        return target.gain(alpha, sigma) ** 2 * alpha**2 / (sigma**2 + alpha**2 / self.gamma)


class LearnedUncertainty(nn.Module, Weighting):
    """loss / e^u + u, with u learned as a function of the noise level   (Karras et al. 2024, EDM2, eq. 14).

    Where u has come to rest, e^u is the mean loss of its level, so every level weighs the same.

    Args:
        weighting: weights of the squared error beneath it.
        width: number of Fourier features of the log-SNR that u is a linear function of.
    """

    def __init__(self, weighting: Weighting, width: Width = 128) -> None:
        super().__init__()
        self.weighting, self.time_floor = weighting, weighting.time_floor
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(width))
        self.register_buffer("phases", 2 * math.pi * torch.rand(width))
        self.u = nn.Linear(width, 1)
        nn.init.zeros_(self.u.weight)
        nn.init.zeros_(self.u.bias)

    def __call__(self, target: Target, alpha: Tensor, sigma: Tensor) -> Tensor:
        return self.weighting(target, alpha, sigma)

    def total(self, loss: Tensor, logsnr: Tensor) -> Tensor:
        place = (logsnr.clamp(-20, 20) / 8).float()[:, None]  # (B, 1)
        with torch.autocast(loss.device.type, enabled=False):
            u = self.u((place * self.frequencies + self.phases).cos())[:, 0]  # (B,)
        return loss / u.exp() + u
