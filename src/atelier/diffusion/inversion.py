"""From an image to the noise that it comes from: DDIM's steps taken backwards."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from atelier.diffusion.guidance import Denoise
from atelier.diffusion.samplers import slope
from atelier.diffusion.schedules import NoiseLevel, Schedule

REFINEMENTS = 3  # calls of the denoiser in a step; where the map that a step repeats contracts, each brings it nearer


def inverted(denoise: Denoise, x: Tensor, times: Tensor, schedule: Schedule) -> Tensor:
    """x_t at times[0] from which DDIM's steps along `times` lead to the image x (N, C, H, W); float64.

    (Song et al. 2021, DDIM, section 4.3.) A step down from t to s goes by the slope at t, which is not known on the way
    up: y_t = y_s + (r_t - r_s) d(y_t, t) is solved by repetition, from the slope of the step before (Pan et al. 2023,
    AIDI, eq. 8). Times start where `samplers.start` says at the latest: beyond, r has no bound.
    """
    levels = [NoiseLevel(*row) for row in torch.stack(schedule.level(times.flip(0)), dim=1)]
    y, d = x.double() / levels[0].scale, torch.zeros_like(x, dtype=torch.float64)
    for s, t in pairwise(levels):
        before = y
        for _ in range(REFINEMENTS):
            x_t = (before + (t.ratio - s.ratio) * d) * t.scale
            denoised = denoise(x_t.to(x.dtype), t.t.expand(len(x)))[:, : x.shape[1]].double()
            y, d = slope(x_t, denoised, t)
        y = before + (t.ratio - s.ratio) * d
    return y * levels[-1].scale
