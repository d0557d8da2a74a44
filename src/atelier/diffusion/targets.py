"""What a net is asked to predict, and the way back to the image.

Every target is a x + b eps. Together with x_t = alpha x + sigma eps that is all there is to know of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from atelier.core.ranges import PositiveFloat


class Target(ABC):
    """a x + b eps; alpha, sigma and what is made of them broadcast with images (B, C, H, W)."""

    @abstractmethod
    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) such that the target is a x + b eps."""

    def __call__(self, x: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What the net should answer at x_t = alpha x + sigma eps."""
        a, b = self.coefficients(alpha, sigma)
        return a * x + b * eps

    def denoised(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The image that the answer stands for: x = (b x_t - sigma output) / (b alpha - a sigma); sigma > 0."""
        a, b = self.coefficients(alpha, sigma)
        return (b * x_t - sigma * output) / (b * alpha - a * sigma)

    def gain(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Error of the image per error of the answer: |d denoised / d output| = sigma / |b alpha - a sigma|."""
        a, b = self.coefficients(alpha, sigma)
        return sigma / (b * alpha - a * sigma).abs()


class Epsilon(Target):
    """The noise: a = 0, b = 1   (Ho et al. 2020, DDPM, eq. 14)."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(alpha), torch.ones_like(alpha)


class X0(Target):
    """The image: a = 1, b = 0."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(alpha), torch.zeros_like(alpha)


class Velocity(Target):
    """v = alpha eps - sigma x: a = -sigma, b = alpha   (Salimans & Ho 2022, Progressive Distillation, appendix D)."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return -sigma, alpha


class VectorField(Target):
    """eps - x: a = -1, b = 1; d x_t / dt of the straight path   (Lipman et al. 2023, Flow Matching)."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones_like(alpha)
        return -one, one


class Preconditioned(Target):
    """F of D = c_skip x_t + c_out F, of unit deviation at every level   (Karras et al. 2022, EDM, eq. 7 and table 1).

    With s = sigma_data and r = sqrt(alpha^2 s^2 + sigma^2), the deviation of x_t: a = sigma / (s r), b = -alpha s / r.
    With alpha^2 + sigma^2 = 1 and s = 1 that is -v.

    Args:
        sigma_data: deviation of the images.
    """

    def __init__(self, sigma_data: PositiveFloat = 0.5) -> None:
        self.sigma_data = sigma_data

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        deviation = (alpha**2 * self.sigma_data**2 + sigma**2).sqrt()
        return sigma / (self.sigma_data * deviation), -alpha * self.sigma_data / deviation
