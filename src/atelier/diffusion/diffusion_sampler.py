"""How a trained net is asked for images: its objective, conditions, guidance and a sampler put together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from atelier.core.batch import Cond
from atelier.core.condition import Embedder
from atelier.core.errors import UserError
from atelier.core.rng import ImageRngs
from atelier.diffusion.guidance import Asked, ClassifierFree, Guider, clipped
from atelier.diffusion.objective import Net, Objective
from atelier.diffusion.samplers import FAINTEST, Ancestral, Sampler, start


@dataclass(frozen=True)
class DiffusionSampler:
    """From noise to images, or to latents.

    Args:
        objective: objective that the net was trained by.
        net: (x_t, time, condition) -> target.
        embedder: embedder of its conditions.
        sampler: sampler used unless another is asked for.
        guider: guider used with its own guidance unless another number is asked for.
        clip: whether to cut what is denoised to [-1, 1], where pixels lie; never for latents.

    Raises:
        UserError: the sampler does not fit the schedule, the variance that it takes is not learned, or the guider does
            not fit the net.
    """

    objective: Objective
    net: Net
    embedder: Embedder
    sampler: Sampler
    guider: Guider
    clip: bool

    def __post_init__(self) -> None:
        self._fits(self.sampler)
        self.guider.fits(self.net)

    def __call__(
        self,
        cond: Cond,
        noise: Tensor,
        rngs: ImageRngs,
        sampler: Sampler | None = None,
        guidance: float | None = None,
        guider: Guider | None = None,
    ) -> Tensor:
        """Images (n, C, H, W) from standard normal noise (n, C, H, W); `rngs` gives the noise on the way."""
        n, schedule, guider = len(noise), self.objective.schedule, guider or self.guider
        guider.fits(self.net)
        guider = replace(guider, guidance=self._strength(guidance, guider))
        asked = Asked(self.embedder(cond, n), self.embedder.null(n), cond, schedule)
        denoise = guider(partial(self.objective.denoise, self.net), asked)
        if self.clip:
            denoise = clipped(denoise)
        if sampler is not None:
            self._fits(sampler)
        return (sampler or self.sampler)(denoise, noise, schedule, rngs, self._first(noise.device))

    def _first(self, device: torch.device) -> float:
        """The time to start at.

        Unclipped, an error of eps is sigma / alpha times as large in the image: 20,000 times where Cosine ends.
        """
        schedule, one = self.objective.schedule, torch.ones((), dtype=torch.float64, device=device)
        gain = self.objective.target.gain(schedule.alpha(one), schedule.sigma(one))
        return start(schedule, device) if gain > FAINTEST and not self.clip else 1.0

    def _strength(self, asked: float | None, guider: Guider) -> float:
        """Without conditions there is nothing to be guided by."""
        if not self.embedder.conditions and not guider.conditions:
            return 1.0
        return guider.guidance if asked is None else asked

    def _fits(self, sampler: Sampler) -> None:
        sampler.times(self.objective.schedule, torch.device("cpu"))
        if isinstance(sampler, Ancestral) and sampler.variance == "learned" and not self.objective.learned_variance:
            problem = "the net of this run has learned no variance"
            raise UserError(".sampler.variance", "learned", problem, ".sampler.variance=small")

    @property
    def conditions(self) -> frozenset[str]:
        """Names of what samples are asked by: those that the net takes, and those that the guider looks at."""
        return frozenset(self.embedder.conditions) | frozenset(self.guider.conditions)

    @property
    def needs_grad(self) -> bool:
        """Whether sampler or guider enable gradients."""
        return self.sampler.needs_grad or self.guider.needs_grad

    def protocol(self) -> dict[str, Any]:
        """What a printed number depends on; the guider goes without saying where it is the plain classifier-free."""
        guidance = self._strength(None, self.guider)
        usual = self.guider == ClassifierFree(guidance=self.guider.guidance) or not self.conditions
        found = {"sampler": str(self.sampler), "nfe": self.sampler.nfe, "guidance": guidance}
        return found if usual else found | {"guider": str(self.guider)}
