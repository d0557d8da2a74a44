"""From noise to images: one loop, and a `step` from time t to time s < t for each sampler.

A sampler knows a denoiser (x_t, t) -> E[x | x_t], a schedule and its last steps, nothing of nets, guidance or targets.
Its state is float64; the denoiser is fed the type of the noise.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from atelier.core.ranges import PositiveInt, Probability
from atelier.core.rng import ImageRngs
from atelier.diffusion.guidance import Denoise
from atelier.diffusion.posterior import log_variance_of, posterior, transition
from atelier.diffusion.schedules import NoiseLevel, Schedule, Spacing

Grid = Literal["uniform", "karras"]
FAINTEST = 80.0  # sigma / alpha beyond which an image is lost in its noise (Karras et al. 2022, EDM, table 1)
Predict = Callable[[Tensor, NoiseLevel], Tensor]


class Step(NamedTuple):
    """A step that was taken: from which level, from where, and towards which denoised image; float64."""

    t: NoiseLevel
    x: Tensor
    denoised: Tensor


@dataclass(frozen=True)
class StepContext:
    """What a step may ask beside x: one for the whole way from noise to image.

    Args:
        estimate: (x, level) -> denoised, and v behind it where the variance is learned; float64.
        schedule: for levels between those of the grid.
        rngs: noise, one generator per image.
        past: steps before this one, the latest last; as many as the sampler `remembers`.
    """

    estimate: Predict
    schedule: Schedule
    rngs: ImageRngs
    past: deque[Step]

    def predict(self, x: Tensor, t: NoiseLevel) -> Tensor:
        """The denoised image alone."""
        return self.estimate(x, t)[:, : x.shape[1]]


@dataclass(frozen=True, kw_only=True)
class Sampler(ABC):
    """The loop. `steps`: number of steps from noise to image; with a table of levels, at most its length.

    `remembers`: how many of its last steps a step looks back at, as multistep rules do. `needs_grad`: whether a step
    enables gradients, as one does that corrects x by a gradient.
    """

    remembers: ClassVar[int] = 0
    needs_grad: ClassVar[bool] = False
    steps: PositiveInt

    @property
    def nfe(self) -> int:
        """Calls of the denoiser per image."""
        return self.steps

    def __call__(
        self, denoise: Denoise, noise: Tensor, schedule: Schedule, rngs: ImageRngs, first: float = 1.0
    ) -> Tensor:
        """Images (N, C, H, W) from standard normal noise (N, C, H, W), in its type.

        `denoise` gets x_t (N, C, H, W) and t (N,) float64; `rngs`, one per image, gives noise on the way. `first`
        takes the place of the times above it.
        """
        return last(self.trajectory(denoise, noise, schedule, rngs, first))

    def trajectory(
        self, denoise: Denoise, noise: Tensor, schedule: Schedule, rngs: ImageRngs, first: float = 1.0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """After each step, where it led and the denoised image that it aimed at; the last x is the result."""
        times = cut(self.times(schedule, noise.device), first)
        return self.along(times, denoise, schedule.prior_std(times[0]) * noise.double(), schedule, rngs, noise.dtype)

    def along(
        self,
        times: Tensor,
        denoise: Denoise,
        x: Tensor,
        schedule: Schedule,
        rngs: ImageRngs,
        dtype: torch.dtype = torch.float32,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The same from any x (N, C, H, W) float64 that stands at times[0], in the type `dtype`.

        Where a time is above the one before it, noise is added: x_t ~ q(x_t | x_s), s < t.
        """

        def estimate(x_t: Tensor, t: NoiseLevel) -> Tensor:
            return denoise(x_t.to(dtype), t.t.expand(len(x))).double()

        levels = [NoiseLevel(*row) for row in torch.stack(schedule.level(times), dim=1)]
        context = StepContext(estimate, schedule, rngs, deque(maxlen=self.remembers))
        for t, s in pairwise(levels):
            if s.t > t.t:
                factor, variance = transition(t, s)
                x = factor * x + variance.sqrt() * rngs.randn(*x.shape[1:], device=x.device)
                context.past.clear()
                continue
            next_x, denoised = self.step(x, t, s, context)
            context.past.append(Step(t, x, denoised))
            x = next_x
            yield x.to(dtype), denoised.to(dtype)

    @abstractmethod
    def times(self, schedule: Schedule, device: torch.device) -> Tensor:
        """(steps + 1,) float64, falling to 0."""

    @abstractmethod
    def step(self, x: Tensor, t: NoiseLevel, s: NoiseLevel, context: StepContext) -> tuple[Tensor, Tensor]:
        """x at level t -> (x at level s, denoised)."""


@dataclass(frozen=True, kw_only=True)
class Ancestral(Sampler):
    """Ancestral sampling: x_s ~ q(x_s | x_t, x = denoised)   (Ho et al. 2020, eq. 6-7, algorithm 2).

    `variance` of the step: "small" is the posterior's own, "large" that of q(x_t | x_s): beta with all steps,
    and costly with few; "learned" what the net says between them. The last step adds none.
    """

    variance: Literal["small", "large", "learned"] = "small"
    spacing: Spacing = "trailing"

    def times(self, schedule: Schedule, device: torch.device) -> Tensor:
        return schedule.times(self.steps, self.spacing).to(device)

    def step(self, x: Tensor, t: NoiseLevel, s: NoiseLevel, context: StepContext) -> tuple[Tensor, Tensor]:
        estimate = context.estimate(x, t)
        denoised, v = estimate[:, : x.shape[1]], estimate[:, x.shape[1] :]
        mean, variance = posterior(x, denoised, s, t)
        if self.variance == "large" and s.t > 0:
            _, variance = transition(s, t)
        elif self.variance == "learned" and s.t > 0:
            variance = log_variance_of(v, s, t, context.schedule).exp()
        return mean + variance.sqrt() * context.rngs.randn(*x.shape[1:], device=x.device), denoised


@dataclass(frozen=True, kw_only=True)
class DDIM(Sampler):
    """x_s = alpha_s D + sqrt(sigma_s^2 - eta^2 v) eps_t + eta sqrt(v) z, v the posterior's variance.

    (Song et al. 2021, DDIM, eq. 12 and 16.) `eta` 0 is deterministic, 1 is DDPM with the small variance.
    """

    eta: Probability = 0.0
    spacing: Spacing = "trailing"

    def times(self, schedule: Schedule, device: torch.device) -> Tensor:
        return schedule.times(self.steps, self.spacing).to(device)

    def step(self, x: Tensor, t: NoiseLevel, s: NoiseLevel, context: StepContext) -> tuple[Tensor, Tensor]:
        denoised = context.predict(x, t)
        eps = (x - t.alpha * denoised) / t.sigma
        _, variance = posterior(x, denoised, s, t)
        added = self.eta**2 * variance
        x = s.alpha * denoised + (s.sigma**2 - added).sqrt() * eps
        if self.eta > 0:
            x = x + added.sqrt() * context.rngs.randn(*x.shape[1:], device=x.device)
        return x, denoised


@dataclass(frozen=True, kw_only=True)
class Euler(Sampler):
    """The probability-flow ODE by Euler's rule, see `slope`. `grid` of times: "uniform" in t, or "karras"."""

    grid: Grid = "uniform"

    def times(self, schedule: Schedule, device: torch.device) -> Tensor:
        return ode_times(schedule, self.steps, self.grid, device)

    def step(self, x: Tensor, t: NoiseLevel, s: NoiseLevel, context: StepContext) -> tuple[Tensor, Tensor]:
        denoised = context.predict(x, t)
        y, d = slope(x, denoised, t)
        return (y + (s.ratio - t.ratio) * d) * s.scale, denoised


@dataclass(frozen=True, kw_only=True)
class Heun(Sampler):
    """The same ODE by Heun's rule, the last step by Euler's (Karras et al. 2022, EDM, algorithm 1).

    It starts where `start` says, as a step from pure noise would weigh its two slopes alike.
    """

    grid: Grid = "karras"

    @property
    def nfe(self) -> int:
        return 2 * self.steps - 1

    def times(self, schedule: Schedule, device: torch.device) -> Tensor:
        return ode_times(schedule, self.steps, self.grid, device).clamp(max=start(schedule, device))

    def step(self, x: Tensor, t: NoiseLevel, s: NoiseLevel, context: StepContext) -> tuple[Tensor, Tensor]:
        denoised = context.predict(x, t)
        y, d = slope(x, denoised, t)
        stride = s.ratio - t.ratio
        x = (y + stride * d) * s.scale
        if s.t > 0:
            _, d_s = slope(x, context.predict(x, s), s)
            x = (y + stride * (d + d_s) / 2) * s.scale
        return x, denoised


def last(way: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """The result at the end of a trajectory."""
    return deque(way, maxlen=1)[0][0]


def cut(times: Tensor, first: float) -> Tensor:
    """Falling times from `first` on, which takes the place of those above it; none above: the times as they are."""
    if times[0] <= first:
        return times
    return torch.cat([times.new_tensor([first]), times[times < first]])


def slope(x_t: Tensor, denoised: Tensor, t: NoiseLevel) -> tuple[Tensor, Tensor]:
    """y = x_t / scale_t and dy/dr = (y - denoised) / r, r = sigma_t / scale_t: the probability-flow ODE.

    (Song et al. 2021, DDIM, eq. 14; Karras et al. 2022, EDM, eq. 3 with s(t) = scale_t.)
    """
    y = x_t / t.scale
    return y, (y - denoised) / t.ratio


def start(schedule: Schedule, device: torch.device) -> float:
    """The last training time at which an image is not lost in its noise: 1, or where sigma / scale reaches 80."""
    if schedule.level(torch.ones((), dtype=torch.float64, device=device)).ratio <= FAINTEST:
        return 1.0
    logsnr = torch.tensor(-2 * math.log(FAINTEST), dtype=torch.float64, device=device)
    return schedule.snap(schedule.time(logsnr)).item()


def ode_times(schedule: Schedule, steps: int, grid: Grid, device: torch.device) -> Tensor:
    """Times for an ODE solver, (steps + 1,) float64, falling to 0.

    "karras": sigma / alpha from 80 to 0.01, or the nearest levels trained on, with evenly spaced 7th roots,
    then 0 (Karras et al. 2022, EDM, eq. 5).
    """
    if grid == "uniform":
        return schedule.times(steps).to(device)
    trained = schedule.snap(torch.tensor([1.0, 1e-9], dtype=torch.float64, device=device))
    high, low = (-schedule.logsnr(trained) / 2).exp().clamp(0.01, FAINTEST) ** (1 / 7)
    places = torch.linspace(0, 1, steps, dtype=torch.float64, device=device)
    times = schedule.time(-14 * torch.lerp(high, low, places).log())
    return torch.cat([times, torch.zeros_like(times[:1])])
