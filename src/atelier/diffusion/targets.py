"""What a net is asked to predict, the way back to the image, and the weight of its squared error.

Every target is a x + b eps. Together with x_t = alpha x + sigma eps that is all there is to know:

    eps   a = 0        b = 1        Ho et al. 2020, DDPM, eq. 14
    x0    a = 1        b = 0
    v     a = -sigma   b = alpha    Salimans & Ho 2022, Progressive Distillation, appendix D
    flow  a = -1       b = 1        Lipman et al. 2023, Flow Matching; d x_t / dt of the straight path
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Target = Literal["eps", "x0", "v", "flow"]
Weighting = Literal["plain", "min_snr"]


def coefficients(kind: Target, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b) such that the target is a x + b eps."""
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    match kind:
        case "eps":
            return zero, one
        case "x0":
            return one, zero
        case "v":
            return -sigma, alpha
        case "flow":
            return -one, one


def target(kind: Target, x: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What the net should answer at x_t = alpha x + sigma eps."""
    a, b = coefficients(kind, alpha, sigma)
    return a * x + b * eps


def denoised(kind: Target, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The image that the answer stands for: x = (b x_t - sigma output) / (b alpha - a sigma); sigma > 0."""
    a, b = coefficients(kind, alpha, sigma)
    return (b * x_t - sigma * output) / (b * alpha - a * sigma)


def gain(kind: Target, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Error of the image per error of the answer: |d denoised / d output| = sigma / |b alpha - a sigma|."""
    a, b = coefficients(kind, alpha, sigma)
    return sigma / (b * alpha - a * sigma).abs()


def weight(
    kind: Target, weighting: Weighting, alpha: Tensor, sigma: Tensor, space: Target | None = None, gamma: float = 5.0
) -> Tensor:
    """Weight of the squared error of the answer.

    plain is the squared error of the answer, or of what it says of another target, `space`: the error of the image that
    the answer stands for, told as an error of that target (Li and He 2025, JiT, table 1). min_snr weighs the squared
    error of the *image* by min(snr, gamma), whatever the net predicts (Hang et al. 2023, Min-SNR, section 3.4). With
    alpha^2 + sigma^2 = 1 that is min(snr, gamma) for x0, / snr for eps, / (snr + 1) for v.
    """
    if weighting == "plain":
        if space in (None, kind):
            return torch.ones_like(alpha)
        return (gain(kind, alpha, sigma) / gain(space, alpha, sigma)) ** 2
    snr = (alpha / sigma) ** 2
    return snr.clamp(max=gamma) * gain(kind, alpha, sigma) ** 2
