"""The variational bound of a diffusion model: -log p(x) <= L_T + sum over t of L_t + L_0, in nats.

(Sohl-Dickstein et al. 2015, section 2.4; Ho et al. 2020, DDPM, eq. 5.) It is taken on the levels of a schedule, from
each to the one below. Divide by C H W ln 2 for bits per dimension.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from atelier.core.rng import ImageRngs
from atelier.diffusion.guidance import Denoise
from atelier.diffusion.posterior import log_variance_of, posterior, transition
from atelier.diffusion.schedules import NoiseLevel, Schedule

BIN = 1 / 127.5  # width of a grey level in [-1, 1]


def snapped(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """The level of the bound that t (B,) in (0, 1] stands for and the one below, 0 below the first; float64."""
    levels = schedule.levels(t.device)  # (T,)
    level = levels[(t.double() * len(levels)).ceil().long().clamp(1, len(levels)) - 1]
    return level, below(schedule, level)


def below(schedule: Schedule, level: Tensor) -> Tensor:
    """The level of the bound before one of them, (B,) float64; 0 below the first."""
    levels = schedule.levels(level.device)  # (T,)
    i = torch.searchsorted(levels, level - 1e-9)
    return torch.where(i > 0, levels[(i - 1).clamp(min=0)], torch.zeros_like(level))


def prior_term(x: Tensor, schedule: Schedule) -> Tensor:
    """L_T = KL(q(x_T | x), what sampling starts from) of images (B, C, H, W), (B,)."""
    one = torch.ones(1, device=x.device)
    level, std = _column(schedule, one, x), schedule.prior_std(one)
    mean, variance = level.alpha * x.double() / std, (level.sigma / std) ** 2
    return ((mean**2 + variance - 1 - variance.log()) / 2).flatten(1).sum(1)


def step_term(x: Tensor, denoised: Tensor, v: Tensor | None, s: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """L_t = KL(q(x_s | x_t, x), p(x_s | x_t)), and L_0 = -log p(x | x_t) where s is 0; (B,).

    Args:
        x: images (B, C, H, W), on the 256 levels where s is 0.
        denoised: estimate of them at t.
        v: place of the variance's logarithm between the least (-1) and the largest (1); None: the posterior's variance.
        s: level below, (B,).
        t: level, (B,) in (0, 1].
        schedule: schedule of the levels.
    """
    x, denoised = x.double(), denoised.double()
    low, high = _column(schedule, s, x), _column(schedule, t, x)
    log_variance = log_variance_of(v, low, high, schedule)
    _, own = posterior(x, x, low, high)
    factor = low.alpha * transition(low, high)[1] / high.sigma**2  # of the mean's error, of the image's
    own = torch.where(low.t > 0, own, torch.ones_like(own))  # a step to the image has a term of its own
    divergence = log_variance - own.log() + (own + (factor * (x - denoised)) ** 2) / log_variance.exp() - 1
    term = torch.where(low.t > 0, divergence / 2, -log_bin(x, denoised, log_variance / 2))
    return term.flatten(1).sum(1)


def strata(n_levels: int, draws: int) -> Tensor:
    """Ends of the parts that the levels 2 .. n_levels fall into, (K + 1,) int64 from 1 to n_levels.

    Part k holds the levels above end k up to end k + 1. Parts grow evenly from one level where there is little noise,
    whose terms are the largest, and hold one level each where K is n_levels - 1.

    Args:
        n_levels: number of levels.
        draws: number of parts K; no more than there are levels to share.
    """
    n = min(draws, n_levels - 1)
    places = torch.arange(n + 1, dtype=torch.float64)
    return (1 + places + (n_levels - 1 - n) * (places / max(n, 1)) ** 2).round().long()


def bound_terms(denoise: Denoise, x: Tensor, schedule: Schedule, rngs: ImageRngs, draws: int) -> dict[str, Tensor]:
    """An unbiased estimate of the bound of images (B, C, H, W) by its terms, in nats, float64.

    Of the levels of each part of `strata` one is drawn, alike for each, and its term stands for all of them; L_T and
    L_0 are there for every image. What is denoised is cut to [-1, 1], as published.

    Args:
        denoise: (x_t, t) -> denoised, and v behind it in as many channels where the variance is learned.
        x: images on the 256 levels in [-1, 1].
        schedule: schedule of the levels.
        rngs: noise, one generator per image.
        draws: number of parts K.

    Returns:
        `prior` L_T (B,), `image` L_0 (B,), `steps` the sum of L_t of each part (B, K), `above` what of that sum stands
        above the level that was drawn (B, K), and of L_0's level and those that were drawn `time` t (B, K + 1) and
        `error`, the mean squared error of the denoised image in grey levels (B, K + 1).
    """
    x, channels = x.double(), x.shape[1]
    levels = torch.cat([x.new_zeros(1), schedule.levels(x.device)])  # (T + 1,)
    ends = strata(len(levels) - 1, draws).to(x.device)  # (K + 1,)
    widths = ends.diff()  # (K,)
    drawn = (rngs.rand(len(widths), device=x.device).double() * widths).long()  # (B, K)
    places = torch.cat([torch.ones_like(drawn[:, :1]), ends[:-1] + 1 + drawn], dim=1)  # (B, K + 1)
    terms, errors = [], []
    for place in places.T:
        s, t = levels[place - 1], levels[place]  # (B,)
        alpha, sigma = schedule.pair(t, like=x)
        x_t = alpha * x + sigma * rngs.randn(*x.shape[1:], device=x.device)
        estimate = denoise(x_t.float(), t).double()  # (B, C or 2 C, H, W)
        denoised, v = estimate[:, :channels].clamp(-1, 1), estimate[:, channels:]
        terms.append(step_term(x, denoised, v if v.shape[1] else None, s, t, schedule))
        errors.append((denoised - x).square().flatten(1).mean(1) / BIN**2)
    image, *steps = terms
    steps = torch.stack(steps, dim=1)  # (B, K)
    return {
        "prior": prior_term(x, schedule),
        "image": image,
        "steps": steps * widths,
        "above": steps * (widths - 1) / 2,
        "time": levels[places],
        "error": torch.stack(errors, dim=1),
    }


def log_bin(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """ln of the probability of a grey level under a normal distribution   (Ho et al. 2020, DDPM, eq. 13).

    The first and the last level reach to infinity.
    """
    low, high = ((x - mean + side * BIN / 2) / log_std.exp() for side in (-1, 1))
    above = torch.where(x > 1 - BIN / 4, torch.ones_like(x), torch.special.ndtr(high))
    below = torch.where(x < -1 + BIN / 4, torch.zeros_like(x), torch.special.ndtr(low))
    return (above - below).clamp(min=1e-12).log()


def bits(nats: Tensor, x: Tensor) -> Tensor:
    """Bits per dimension of nats per image."""
    return nats / (x[0].numel() * math.log(2))


def _column(schedule: Schedule, t: Tensor, like: Tensor) -> NoiseLevel:
    """The level of times (B,) beside images, (B, 1, 1, 1), float64."""
    return schedule.level(t.double().view(-1, *[1] * (like.ndim - 1)))
