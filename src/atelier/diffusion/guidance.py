"""Wrappers around a denoiser that leave its signature (x_t, t) -> denoised as it is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from atelier.core.condition import Condition

Denoise = Callable[[Tensor, Tensor], Tensor]
ConditionalDenoise = Callable[[Tensor, Tensor, Condition], Tensor]


def guided(denoise: ConditionalDenoise, cond: Condition, null: Condition, guidance: float) -> Denoise:
    """Classifier-free guidance: D = D_u + g (D_c - D_u)   (Ho & Salimans 2022, eq. 6, g = 1 + w).

    Args:
        denoise: (x_t, t, cond) -> denoised.
        cond: of each of B images.
        null: that of B images of which nothing is known; not used with guidance 1.
        guidance: g; 1 = off: the net is called with `cond` alone. Otherwise one call holds both halves.
    """
    if guidance == 1:
        return lambda x_t, t: denoise(x_t, t, cond)
    both = null.cat(cond)

    def denoise_both(x_t: Tensor, t: Tensor) -> Tensor:
        free, asked = denoise(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return free + guidance * (asked - free)

    return denoise_both


def clipped(denoise: Denoise) -> Denoise:
    """Denoised images cut to [-1, 1], where pixels lie (Ho et al. 2020, DDPM); never for latents."""
    return lambda x_t, t: denoise(x_t, t).clamp(-1, 1)
