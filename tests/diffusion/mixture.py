"""Points in the plane from three Gaussians, whose best denoiser is known, and schedules that test samplers hard.

A pixel of an image (N, 2, H, W) is a point; its two channels are the coordinates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atelier.diffusion.guidance import Denoise
from atelier.diffusion.schedules import NoiseLevel, Schedule

WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MEANS = torch.tensor([[1.0, 0.5], [-0.8, -0.2], [0.1, -0.9]], dtype=torch.float64)
STDS = torch.tensor([0.5, 0.7, 0.6], dtype=torch.float64)
MEAN = WEIGHTS @ MEANS
COVARIANCE = torch.einsum("k,ki,kj->ij", WEIGHTS, MEANS - MEAN, MEANS - MEAN) + (WEIGHTS @ STDS**2) * torch.eye(2)


def best(schedule: Schedule) -> Denoise:
    """E[x | x_t]: of each Gaussian, weighted by how likely x_t is under it."""

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = schedule.pair(t, like=x_t.double()[:, None])  # (N, 1, 1, 1, 1)
        stds, means = STDS.view(1, -1, 1, 1, 1), MEANS.view(1, -1, 2, 1, 1)
        variance = alpha**2 * stds**2 + sigma**2
        away = x_t.double()[:, None] - alpha * means  # (N, 3, 2, H, W)
        log = WEIGHTS.log().view(1, -1, 1, 1) - (away**2).sum(2) / (2 * variance[:, :, 0]) - variance[:, :, 0].log()
        each = means + alpha * stds**2 / variance * away
        return (log.softmax(1)[:, :, None] * each).sum(1).to(x_t.dtype)

    return denoise


def transported(schedule: Schedule, x: Tensor, t: NoiseLevel, s: NoiseLevel, steps: int = 300) -> Tensor:
    """x at s on the probability-flow ODE, dy / dlambda = D - y for y = x / alpha, by the classical rule of order 4."""
    denoise, y = best(schedule), x / t.alpha
    stride = (s.half_logsnr - t.half_logsnr) / steps

    def slope(y: Tensor, half_logsnr: Tensor) -> Tensor:
        time = schedule.time(2 * half_logsnr)
        return denoise(schedule.alpha(time) * y, time.expand(len(y))) - y

    for i in range(steps):
        at = t.half_logsnr + i * stride
        a = slope(y, at)
        b = slope(y + stride / 2 * a, at + stride / 2)
        c = slope(y + stride / 2 * b, at + stride / 2)
        d = slope(y + stride * c, at + stride)
        y = y + stride / 6 * (a + 2 * b + 2 * c + d)
    return s.alpha * y
