"""Optimizers whose learning rate is a function of images_seen (the clock writes it before each batch)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn

from atelier.core.ranges import Betas, NonNegFloat, NonNegInt, PositiveFloat, PositiveInt

Decay = Literal["constant", "cosine", "linear"]


def lr_factor(images_seen: int, warmup_images: int, decay: Decay, from_images: int, to_images: int) -> float:
    """What the learning rate is multiplied by: a linear warm-up from 0, then a decay to 1 % (cosine) or 0 (linear)."""
    warm = min(1.0, (images_seen + 1) / (warmup_images + 1))
    if decay == "constant":
        return warm
    part = min(1.0, max(0.0, (images_seen - from_images) / max(1, to_images - from_images)))
    if decay == "linear":
        return warm * (1 - part)
    return warm * (0.01 + 0.99 * (1 + math.cos(math.pi * part)) / 2)


def adamw(
    params: Iterable[nn.Parameter],
    *,
    lr: PositiveFloat,
    betas: Betas,
    weight_decay: NonNegFloat,
    warmup_images: NonNegInt,
    decay: Decay,
    decay_from: NonNegInt,
    decay_to: PositiveInt,
    lazy_every: NonNegInt = 0,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019); with weight_decay 0 it is Adam (Kingma & Ba 2015).

    Args:
        lr: peak learning rate, for the global batch.
        warmup_images: images over which the rate rises linearly.
        decay: fall of the rate between `decay_from` and `decay_to` images.
        lazy_every: k where each k-th batch has a second step of its own for a penalty: rate and moments then forget
            as much a batch as with one step, c = k / (k + 1), lr c, betas^c (Karras et al. 2020, StyleGAN2, appendix
            B). 0 or 1: there is none.
    """
    params = list(params)
    if lazy_every > 1:
        part = lazy_every / (lazy_every + 1)
        lr, betas = part * lr, [beta**part for beta in betas]
    fused = one_pass(params)
    optimizer = torch.optim.AdamW(params, lr=lr, betas=tuple(betas), weight_decay=weight_decay, fused=fused)
    optimizer._step_supports_amp_scaling = False  # or float16's gradients would reach clipping as they were scaled
    optimizer.register_load_state_dict_pre_hook(_keep_pass)
    factor: Callable[[int], float] = lambda n: lr_factor(n, warmup_images, decay, decay_from, decay_to)  # noqa: E731
    optimizer.lr_factor = factor
    return optimizer


def one_pass(params: list[nn.Parameter]) -> bool | None:
    """`fused` of torch's optimizers: one pass over memory where there are kernels for it; None: as torch chooses.

    False would also forbid the loop over all tensors at once (`foreach`), and of 304 tensors on a GPU each step would
    take 28 ms to launch in place of 4.
    """
    return all(p.device.type in ("cpu", "cuda") for p in params) or None


def _keep_pass(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint brings rates and moments, and not the pass of the device that it was written on."""
    own = {key: optimizer.param_groups[0][key] for key in ("fused", "foreach")}
    return state | {"param_groups": [group | own for group in state["param_groups"]]}
