"""How a trained net is asked for images: its objective, conditions, guidance and a sampler put together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from atelier.core.condition import Condition
from atelier.core.rng import ImageRngs
from atelier.diffusion.guidance import clipped, guided
from atelier.diffusion.objective import Net, Objective
from atelier.diffusion.samplers import Sampler, start


class Embedder(Protocol):
    """What is asked of n images to what their net takes."""

    conditions: tuple[str, ...]

    def __call__(self, cond: dict[str, Tensor], n: int) -> Condition: ...

    def null(self, n: int) -> Condition:
        """The condition of n images of which nothing is known."""
        ...


@dataclass(frozen=True)
class Drawing:
    """From noise to images, or to latents.

    Args:
        objective: that the net was trained by.
        net: (x_t, time, condition) -> target.
        embedder: of its conditions.
        sampler: used unless another is asked for.
        guidance: used unless another is asked for: D_u + guidance (D_c - D_u), 1 = off, 0 = without condition.
        clip: cut what is denoised to [-1, 1], where pixels lie; never for latents.
    """

    objective: Objective
    net: Net
    embedder: Embedder
    sampler: Sampler
    guidance: float
    clip: bool

    def __call__(
        self,
        cond: dict[str, Tensor],
        noise: Tensor,
        rngs: ImageRngs,
        sampler: Sampler | None = None,
        guidance: float | None = None,
    ) -> Tensor:
        """Images (n, C, H, W) from standard normal noise (n, C, H, W); `rngs` gives the noise on the way."""
        known, null = self.embedder(cond, len(noise)), self.embedder.null(len(noise))
        denoise = guided(partial(self.objective.denoise, self.net), known, null, self._strength(guidance))
        if self.clip:
            denoise = clipped(denoise)
        schedule = self.objective.schedule
        # unclipped, an error of eps is sigma / alpha times as large in the image: 20,000 times where Cosine ends
        first = start(schedule, noise.device) if self.objective.target == "eps" and not self.clip else 1.0
        return (sampler or self.sampler)(denoise, noise, schedule, rngs, first)

    def _strength(self, asked: float | None) -> float:
        """Without conditions there is nothing to be guided by."""
        if not self.embedder.conditions:
            return 1.0
        return self.guidance if asked is None else asked

    def protocol(self) -> dict[str, Any]:
        """What a printed number depends on."""
        return {"sampler": str(self.sampler), "nfe": self.sampler.nfe, "guidance": self._strength(None)}
