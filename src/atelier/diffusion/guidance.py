"""Wrappers around a denoiser that make (x_t, t) -> denoised of it: with a condition, cut to the range of pixels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from atelier.core.batch import Cond
from atelier.core.condition import Condition
from atelier.core.ranges import NonNegFloat
from atelier.diffusion.schedules import Schedule

Denoise = Callable[[Tensor, Tensor], Tensor]
ConditionalDenoise = Callable[[Tensor, Tensor, Condition], Tensor]


@dataclass(frozen=True, eq=False)
class Asked:
    """What B samples are asked for, and what a guider may look at.

    Args:
        known: condition of each, as the net takes it.
        null: condition of B samples of which nothing is known.
        named: condition by name, as a request gives it.
        schedule: for the noise level of a time.
    """

    known: Condition
    null: Condition
    named: Cond
    schedule: Schedule


@dataclass(frozen=True, kw_only=True)
class Guider(ABC):
    """How a condition enters sampling. `guidance`: how strongly; 1 = off, 0 = without condition.

    `needs_grad`: whether its denoiser enables gradients, as that of a classifier's guidance does. `conditions`: names
    that it looks at itself, whether or not the net takes them.
    """

    needs_grad: ClassVar[bool] = False
    conditions: ClassVar[tuple[str, ...]] = ()
    guidance: NonNegFloat = field(repr=False)  # a protocol gives the one that was asked for beside it

    @abstractmethod
    def __call__(self, denoise: ConditionalDenoise, asked: Asked) -> Denoise:
        """The denoiser of the B samples that are asked for.

        A guider may also ask with some fields of the condition alone, as `replace(null, planes=known.planes)`.

        Args:
            denoise: (x_t, t, cond) -> denoised, and v behind it in as many channels where the variance is learned.
            asked: conditions of the samples.
        """


@dataclass(frozen=True, kw_only=True)
class ClassifierFree(Guider):
    """D = D_u + g (D_c - D_u)   (Ho & Salimans 2022, eq. 6, g = 1 + w).

    With guidance 1 the net is called with `cond` alone, otherwise once with both halves.
    """

    def __call__(self, denoise: ConditionalDenoise, asked: Asked) -> Denoise:
        if self.guidance == 1:
            return lambda x_t, t: denoise(x_t, t, asked.known)
        both = asked.null.cat(asked.known)

        def denoise_both(x_t: Tensor, t: Tensor) -> Tensor:
            free, known = denoise(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
            return free + self.guidance * (known - free)

        return denoise_both


def clipped(denoise: Denoise) -> Denoise:
    """Denoised images cut to [-1, 1], where pixels lie (Ho et al. 2020, DDPM); never for latents."""
    return lambda x_t, t: denoise(x_t, t).clamp(-1, 1)
