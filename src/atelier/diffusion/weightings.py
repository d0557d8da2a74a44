"""Weights of the squared error of a net's answer, at each noise level."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from atelier.core.ranges import PositiveFloat, Probability
from atelier.diffusion.targets import Target


class Weighting(ABC):
    """Weight of the squared error at each noise level.

    Times below `time_floor` are weighted as it is, which keeps the weight of the last bit of noise finite.
    """

    time_floor: float = 0.0

    @abstractmethod
    def __call__(self, target: Target, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The weight at x_t = alpha x + sigma eps, in the shape of alpha."""


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
        if type(self.loss_space) is type(target):
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
