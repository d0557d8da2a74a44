"""How well a net takes noise out of given images, at five strengths of noise that stay the same.

The error of the denoised image is told beside that of the best straight line through each pixel alone, so 1 means that
the net knows nothing but the mean and variance of each pixel, whatever schedule, target and weighting it learned by.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atelier.core.condition import Condition
from atelier.core.rng import ImageRngs
from atelier.diffusion.objective import Net, Objective
from atelier.diffusion.schedules import Schedule

CENTRES, WIDTH = (8, 4, 0, -4, -8), 4  # of the bins of log-SNR: from a grey level of noise to hardly an image


def bins(schedule: Schedule, device: torch.device) -> dict[int, tuple[float, float]]:
    """Centre -> lowest and highest log-SNR of a bin, as far as training goes; bins out of its reach are left out."""
    low, high = schedule.logsnr(schedule.levels(device)[[-1, 0]]).tolist()
    cut = {centre: (max(centre - WIDTH / 2, low), min(centre + WIDTH / 2, high)) for centre in CENTRES}
    return {centre: ends for centre, ends in cut.items() if ends[0] < ends[1]}


def errors(objective: Objective, net: Net, x: Tensor, cond: Condition | None, rngs: ImageRngs) -> tuple[Tensor, Tensor]:
    """Mean squared error of the denoised image in each bin, and the log-SNR that it was seen at; (B, bins) float64.

    Image k has the place in each bin and the noise of `rngs`, in any batch and whatever is known of it.

    Args:
        x: images or latents (B, C, H, W).
        cond: condition of the net for each of them.
        rngs: a generator for each image, nothing drawn yet.
    """
    ranges, shape = bins(objective.schedule, x.device), x.shape[1:]
    places = rngs.rand(len(ranges), device=x.device).double()  # (B, bins)
    found, levels = [], []
    for k, (low, high) in enumerate(ranges.values()):
        wanted = low + (high - low) * places[:, k]  # (B,)
        t = objective.schedule.snap(objective.schedule.time(wanted).clamp(max=1))
        alpha, sigma = objective.schedule.pair(t, like=x)  # (B, 1, 1, 1)
        x_t = alpha * x + sigma * rngs.randn(*shape, device=x.device)  # (B, C, H, W)
        denoised = objective.denoise(net, x_t, t, cond)[:, : shape[0]]  # a learned variance stands behind
        found.append((denoised.double() - x.double()).square().flatten(1).mean(1))
        levels.append(objective.schedule.logsnr(t))
    return torch.stack(found, 1), torch.stack(levels, 1)


def linear_error(variance: Tensor, logsnr: Tensor) -> Tensor:
    """Mean squared error of the best linear guess of each pixel from itself, s^2 / (1 + s^2 SNR), averaged over pixels.

    That is the least error that a net can have of Gaussian images with independent pixels (Wiener 1949).

    Args:
        variance: s^2 of each pixel over images, (C, H, W).
        logsnr: any shape, which the answer has.
    """
    spread, snr = variance.double().flatten(), logsnr.double().exp()
    guesses = [(spread / (1 + spread * one)).mean() for one in snr.flatten()]
    return torch.stack(guesses).view_as(logsnr).clamp(min=1e-12)
