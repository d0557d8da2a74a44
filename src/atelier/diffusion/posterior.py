"""What is known of x_s, s < t, once x_t and the image are: the Gaussians behind every stochastic step."""

from __future__ import annotations

import torch
from torch import Tensor

from atelier.diffusion.schedules import NoiseLevel, Schedule


def transition(s: NoiseLevel, t: NoiseLevel) -> tuple[Tensor, Tensor]:
    """Factor and variance of q(x_t | x_s), s < t (Kingma et al. 2021, VDM, eq. 20-21).

    alpha_ts = alpha_t / alpha_s,   variance_ts = sigma_t^2 - alpha_ts^2 sigma_s^2.
    """
    factor = t.alpha / s.alpha
    return factor, t.sigma**2 - factor**2 * s.sigma**2


def posterior(x_t: Tensor, x: Tensor, s: NoiseLevel, t: NoiseLevel) -> tuple[Tensor, Tensor]:
    """Mean and variance of q(x_s | x_t, x), s < t (Kingma et al. 2021, VDM, eq. 25-29).

    mean = alpha_ts sigma_s^2 / sigma_t^2 x_t + alpha_s variance_ts / sigma_t^2 x,
    variance = variance_ts sigma_s^2 / sigma_t^2.
    """
    factor, variance = transition(s, t)
    kept = s.sigma**2 / t.sigma**2
    return factor * kept * x_t + s.alpha * variance / t.sigma**2 * x, variance * kept


def log_variance_of(v: Tensor | None, s: NoiseLevel, t: NoiseLevel, schedule: Schedule) -> Tensor:
    """ln of the variance of the step from t to s: f ln beta + (1 - f) ln beta~, f = (v + 1) / 2.

    (Nichol & Dhariwal 2021, Improved DDPM, eq. 15.) beta is the variance of q(x_t | x_s), beta~ that of
    q(x_s | x_t, x). In the step to the image, where that is 0, the one of the step before it is the least; without v it
    is beta.
    """
    large, least = transition(s, t)[1], posterior(t.t, t.t, s, t)[1]
    if v is None:
        return torch.where(s.t > 0, least, large).log()
    first, second = (schedule.level(level) for level in schedule.levels(t.t.device)[:2])
    substitute = posterior(t.t, t.t, first, second)[1]
    small = torch.where(s.t > 0, least, substitute).log()
    return torch.lerp(small.expand_as(v), large.log().expand_as(v), (v.double() + 1) / 2)
