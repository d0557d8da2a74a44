"""Images of which a part is known: the denoiser knows it, and steps are repeated so that the rest comes to fit."""

from __future__ import annotations

import torch
from torch import Tensor

from atelier.diffusion.guidance import Denoise


def knowing(denoise: Denoise, x: Tensor, mask: Tensor) -> Denoise:
    """Denoised images that are x (B, C, H, W) where mask (B, 1, H, W) is false; v behind them stays.

    There x_t is then x noised to every level of a sampler's way, whatever its steps (Lugmayr et al. 2022, RePaint,
    eq. 8): by the noise that it started from, and by what a stochastic step adds.
    """

    def denoise_rest(x_t: Tensor, t: Tensor) -> Tensor:
        denoised, v = denoise(x_t, t).tensor_split([x.shape[1]], dim=1)
        return torch.cat([torch.where(mask, denoised, x), v], dim=1)

    return denoise_rest


def resampled(times: Tensor, resamplings: int) -> Tensor:
    """Falling times with each stride but the last taken so often, as from t to s to t to s   (RePaint, algorithm 1)."""
    *strides, final = zip(times[:-1], times[1:], strict=True)
    repeated = [time for stride in strides for time in stride * resamplings]
    way = torch.stack([*repeated, *final])
    return way[torch.cat([way.new_ones(1, dtype=torch.bool), way[1:] != way[:-1]])]
