"""How a trained net is asked for images: its objective, conditions, guidance and a sampler put together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from atelier.core.batch import Cond
from atelier.core.condition import Embedder
from atelier.core.errors import UserError
from atelier.core.rng import ImageRngs
from atelier.diffusion.guidance import Asked, ClassifierFree, Denoise, Dual, Guider, clipped
from atelier.diffusion.inpainting import knowing, resampled
from atelier.diffusion.inversion import inverted
from atelier.diffusion.objective import Net, Objective
from atelier.diffusion.samplers import DDIM, Ancestral, Sampler, cut, last, start
from atelier.diffusion.schedules import FAINTEST, Schedule


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

    def asked(
        self,
        sampler: Sampler | None = None,
        guidance: float | None = None,
        guider: Guider | None = None,
        image_guidance: float | None = None,
    ) -> DiffusionSampler:
        """This one with another sampler or guider, or other numbers for its guider; None leaves each as it is.

        Raises:
            UserError: the guider tells no images from other conditions, or as in the constructor.
        """
        guider = guider or self.guider
        if guidance is not None:
            guider = replace(guider, guidance=guidance)
        if image_guidance is not None:
            if not isinstance(guider, Dual):
                name = type(guider).__name__
                raise UserError(".image_guidance", image_guidance, f"guider {name} has none", "guider=dual")
            guider = replace(guider, image_guidance=image_guidance)
        return replace(self, sampler=sampler or self.sampler, guider=guider)

    def __call__(self, cond: Cond, noise: Tensor, rngs: ImageRngs) -> Tensor:
        """Images (n, C, H, W) from standard normal noise (n, C, H, W); `rngs` gives the noise on the way."""
        return last(self.trajectory(cond, noise, rngs))

    def trajectory(self, cond: Cond, noise: Tensor, rngs: ImageRngs) -> Iterator[tuple[Tensor, Tensor]]:
        """The same after each step: x_t and the denoised images, (n, C, H, W) each."""
        denoise, first = self._denoise(cond, len(noise)), self._first(noise.device)
        return self.sampler.trajectory(denoise, noise, self.objective.schedule, rngs, first)

    def edit(self, cond: Cond, x: Tensor, rngs: ImageRngs, strength: float) -> Tensor:
        """Images (n, C, H, W) near x (n, C, H, W): x noised to time `strength`, and the sampler's way from there.

        (Meng et al. 2022, SDEdit, algorithm 1.) The way is along those of its times that are left.
        """
        schedule, times = self.objective.schedule, self.times(x.device, strength)
        x_t = noised(x, rngs.randn(*x.shape[1:], device=x.device), times[:1], schedule)
        return last(self.sampler.along(times, self._denoise(cond, len(x)), x_t, schedule, rngs, x.dtype))

    def inpaint(self, cond: Cond, x: Tensor, mask: Tensor, rngs: ImageRngs, resamplings: int = 1) -> Tensor:
        """Images (n, C, H, W) that are x (n, C, H, W) where `mask` (n, 1, H, W), bool, is false.

        Each stride of the sampler is taken `resamplings` times (Lugmayr et al. 2022, RePaint, algorithm 1).
        """
        schedule, times = self.objective.schedule, self.times(x.device)
        noise = rngs.randn(*x.shape[1:], device=x.device)
        x_t = torch.where(mask, schedule.prior_std(times[0]) * noise, noised(x, noise, times[:1], schedule))
        denoise = knowing(self._denoise(cond, len(x)), x, mask)
        return last(self.sampler.along(resampled(times, resamplings), denoise, x_t, schedule, rngs, x.dtype))

    def invert(self, cond: Cond, x: Tensor) -> tuple[Tensor, Tensor]:
        """What DDIM makes images x (n, C, H, W) of, with the times at which it stands and goes back along.

        The sampler says the times alone. Without a condition: guidance 0.
        """
        schedule = self.objective.schedule
        times = self.times(x.device, start(schedule, x.device))
        return inverted(self._denoise(cond, len(x)), x, times, schedule), times

    def revert(self, cond: Cond, x_t: Tensor, times: Tensor) -> Tensor:
        """Images (n, C, H, W) float32 that DDIM makes of x_t (n, C, H, W) float64 along `times`."""
        n = len(x_t)
        denoise, undrawn = self._denoise(cond, n), ImageRngs(0, 0, n)
        return last(DDIM(steps=len(times) - 1).along(times, denoise, x_t, self.objective.schedule, undrawn))

    def times(self, device: torch.device, first: float = 1.0) -> Tensor:
        """The sampler's times from `first` on, or from the last training time before it that can be started at."""
        schedule = self.objective.schedule
        snapped = schedule.snap(torch.tensor(first, dtype=torch.float64, device=device)).item()
        return cut(self.sampler.times(schedule, device), min(snapped, self._first(device)))

    def _denoise(self, cond: Cond, n: int) -> Denoise:
        """(x_t, t) -> denoised, of n images under a condition."""
        asked = Asked(self.embedder(cond, n), self.embedder.null(n, cond), cond, self.objective.schedule)
        denoise = self._guider(partial(self.objective.denoise, self.net), asked)
        return clipped(denoise) if self.clip else denoise

    def _first(self, device: torch.device) -> float:
        """The time to start at.

        Unclipped, an error of eps is sigma / alpha times as large in the image: 20,000 times where Cosine ends.
        """
        schedule, one = self.objective.schedule, torch.ones((), dtype=torch.float64, device=device)
        gain = self.objective.target.gain(schedule.alpha(one), schedule.sigma(one))
        return start(schedule, device) if gain > FAINTEST and not self.clip else 1.0

    def _fits(self, sampler: Sampler) -> None:
        schedule = self.objective.schedule
        sampler.times(schedule, next(schedule.buffers(), torch.zeros(())).device)
        if isinstance(sampler, Ancestral) and sampler.variance == "learned" and not self.objective.learned_variance:
            problem = "the net of this run has learned no variance"
            raise UserError(".sampler.variance", "learned", problem, ".sampler.variance=small")

    @property
    def _guider(self) -> Guider:
        """The guider, off where nothing is known to be guided by."""
        return self.guider if self.conditions else replace(self.guider, guidance=1.0)

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
        guidance = self._guider.guidance
        usual = self.guider == ClassifierFree(guidance=self.guider.guidance) or not self.conditions
        found = {"sampler": str(self.sampler), "nfe": self.sampler.nfe, "guidance": guidance}
        return found if usual else found | {"guider": str(self.guider)}


def noised(x: Tensor, noise: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """alpha_t x + sigma_t noise at times t (1,) or (n,): images x (n, C, H, W), standard normal noise; float64."""
    alpha, sigma = schedule.pair(t, like=x.double())
    return alpha * x + sigma * noise
