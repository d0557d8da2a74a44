"""From noise to images: one loop, and a `step` from time t to time s < t for each sampler.

A sampler knows a denoiser (x_t, t) -> E[x | x_t], a schedule and its last steps, nothing of nets, guidance or targets.
Its state is float64; the denoiser is fed the type of the noise.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from itertools import pairwise
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from atelier.core.errors import UserError
from atelier.core.ranges import NonNegFloat, NonNegInt, PositiveInt, Probability
from atelier.core.rng import ImageRngs
from atelier.diffusion.guidance import Denoise
from atelier.diffusion.posterior import log_variance_of, posterior, transition
from atelier.diffusion.schedules import FAINTEST, NoiseLevel, Schedule, Spacing

Grid = Literal["uniform", "quadratic", "logsnr", "karras"]
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
        noise: standard normal numbers like x, float32, others at each call, image k's from its own generator.
        past: steps before this one, the latest last; as many as the sampler `remembers`.
    """

    estimate: Predict
    schedule: Schedule
    noise: Callable[[], Tensor]
    past: deque[Step]

    def predict(self, x: Tensor, t: NoiseLevel) -> Tensor:
        """The denoised image alone."""
        return self.estimate(x, t)[:, : x.shape[1]]


@dataclass(frozen=True, kw_only=True)
class Sampler(ABC):
    """The loop. `steps`: number of steps from noise to image; on a uniform grid over a table, at most its length.

    `grid`, `spacing`, `offset`: times of the steps, see `grid_times`. `to_image`: whether the last step leads to the
    image itself; else to the first level of noise, whose noise is too weak to be seen, as DDIM and PNDM of Stable
    Diffusion do (diffusers' set_alpha_to_one=False). `remembers`: how many of its last steps a step looks back
    at, as multistep rules do. `needs_grad`: whether a step enables gradients, as one does that corrects x by a
    gradient. `needs_signal`: whether times above `start` become it, as a step from pure noise would be a bad one.
    """

    remembers: ClassVar[int] = 0
    needs_grad: ClassVar[bool] = False
    needs_signal: ClassVar[bool] = False
    steps: PositiveInt
    grid: Grid = "uniform"
    spacing: Spacing = "trailing"
    offset: NonNegInt = 0
    to_image: bool = True

    def __str__(self) -> str:
        """As a call; `offset` and `to_image` go without saying where they are the default."""
        usual = {"offset": 0, "to_image": True}
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        shown = [f"{name}={value!r}" for name, value in values.items() if usual.get(name) != value]
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    def nfe(self) -> int:
        """Calls of the denoiser per image, from a start at the first time of the grid."""
        return self.steps

    @property
    def always_draws(self) -> bool:
        """Whether each step draws noise, once, so that it may be drawn for several at a time."""
        return False

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
        rises = [s > t for t, s in pairwise(times.tolist())]
        noise = self._noise(len(rises), rngs, x)
        context = StepContext(estimate, schedule, noise, deque(maxlen=self.remembers))
        for (t, s), rise in zip(pairwise(levels), rises, strict=True):
            if rise:
                factor, variance = transition(t, s)
                x = factor * x + variance.sqrt() * noise()
                context.past.clear()
                continue
            next_x, denoised = self.step(x, t, s, context)
            context.past.append(Step(t, x, denoised))
            x = next_x
            yield x.to(dtype), denoised.to(dtype)

    def _noise(self, n: int, rngs: ImageRngs, x: Tensor) -> Callable[[], Tensor]:
        """`StepContext.noise` of a way of n strides."""
        if not self.always_draws:
            return lambda: rngs.randn(*x.shape[1:], device=x.device)
        return partial(next, rngs.randns(n, *x.shape[1:], device=x.device))

    def times(self, schedule: Schedule, device: torch.device) -> Tensor:
        """(steps + 1,) float64, falling to 0, or to the time of the first level."""
        times = grid_times(schedule, self.steps, self.grid, self.spacing, device, self.offset)
        if not self.to_image:
            times = torch.cat([times[:-1], schedule.snap(torch.full_like(times[:1], 1e-9))])
        return times.clamp(max=start(schedule, device)) if self.needs_signal else times

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

    @property
    def always_draws(self) -> bool:
        return True

    def step(self, x: Tensor, t: NoiseLevel, s: NoiseLevel, context: StepContext) -> tuple[Tensor, Tensor]:
        estimate = context.estimate(x, t)
        denoised, v = estimate[:, : x.shape[1]], estimate[:, x.shape[1] :]
        mean, variance = posterior(x, denoised, s, t)
        if self.variance == "large" and s.t > 0:
            _, variance = transition(s, t)
        elif self.variance == "learned" and s.t > 0:
            variance = log_variance_of(v, s, t, context.schedule).exp()
        return mean + variance.sqrt() * context.noise(), denoised


@dataclass(frozen=True, kw_only=True)
class DDIM(Sampler):
    """x_s = alpha_s D + sqrt(sigma_s^2 - eta^2 v) eps_t + eta sqrt(v) z, v the posterior's variance.

    (Song et al. 2021, DDIM, eq. 12 and 16.) `eta` 0 is deterministic, 1 is DDPM with the small variance. What others
    call Euler ancestral is this step: in r = sigma / alpha it goes down to sqrt(r_s^2 - up^2) and adds up^2 =
    eta^2 r_s^2 (r_t^2 - r_s^2) / r_t^2. Only its grid differs.
    """

    eta: Probability = 0.0

    @property
    def always_draws(self) -> bool:
        return self.eta > 0

    def step(self, x: Tensor, t: NoiseLevel, s: NoiseLevel, context: StepContext) -> tuple[Tensor, Tensor]:
        denoised = context.predict(x, t)
        eps = (x - t.alpha * denoised) / t.sigma
        _, variance = posterior(x, denoised, s, t)
        added = self.eta**2 * variance
        x = s.alpha * denoised + (s.sigma**2 - added).sqrt() * eps
        if self.eta > 0:
            x = x + added.sqrt() * context.noise()
        return x, denoised


@dataclass(frozen=True, kw_only=True)
class Euler(Sampler):
    """The probability-flow ODE by Euler's rule, see `slope`: x_s / scale_s = y + (r_s - r_t) dy/dr.

    It is written so that scale_t may be 0, and is DDIM with eta 0   (Song et al. 2021, DDIM, eq. 13-14).
    """

    def step(self, x: Tensor, t: NoiseLevel, s: NoiseLevel, context: StepContext) -> tuple[Tensor, Tensor]:
        denoised = context.predict(x, t)
        kept = s.sigma / t.sigma
        return kept * x + (s.scale - kept * t.scale) * denoised, denoised


@dataclass(frozen=True, kw_only=True)
class Heun(Sampler):
    """The same ODE by Heun's rule, the last step by Euler's (Karras et al. 2022, EDM, algorithms 1 and 2).

    It starts where `start` says, as a step from pure noise would weigh its two slopes alike.

    Args:
        churn: noise added on the whole way, 0 = none; a step whose r = sigma / alpha lies in [s_min, s_max] first goes
            up to r (1 + min(churn / steps, sqrt(2) - 1)), but not above t = 1.
        s_min: least r with added noise.
        s_max: greatest r with added noise.
        s_noise: standard deviation of the added noise, as a factor.
    """

    needs_signal: ClassVar[bool] = True
    grid: Grid = "karras"
    churn: NonNegFloat = 0.0
    s_min: NonNegFloat = 0.05
    s_max: NonNegFloat = 50.0
    s_noise: NonNegFloat = 1.003

    @property
    def nfe(self) -> int:
        return 2 * self.steps - 1

    def step(self, x: Tensor, t: NoiseLevel, s: NoiseLevel, context: StepContext) -> tuple[Tensor, Tensor]:
        if self.churn > 0 and self.s_min <= (-t.half_logsnr).exp() <= self.s_max:
            x, t = self.churned(x, t, context)
        denoised = context.predict(x, t)
        y, d = slope(x, denoised, t)
        stride = s.ratio - t.ratio
        x = (y + stride * d) * s.scale
        if s.t > 0:
            _, d_s = slope(x, context.predict(x, s), s)
            x = (y + stride * (d + d_s) / 2) * s.scale
        return x, denoised

    def churned(self, x: Tensor, t: NoiseLevel, context: StepContext) -> tuple[Tensor, NoiseLevel]:
        """x at a noisier level, and the level: x ~ q(x_up | x_t), the noise times s_noise."""
        growth = 1 + min(self.churn / self.steps, math.sqrt(2) - 1)
        logsnr = 2 * (t.half_logsnr - math.log(growth))
        up = context.schedule.level(context.schedule.time(logsnr).clamp(max=1))
        factor, variance = transition(t, up)
        return factor * x + self.s_noise * variance.sqrt() * context.noise(), up


@dataclass(frozen=True, kw_only=True)
class Midpoint(Sampler):
    """The same ODE by the midpoint rule, half-way in t; the last step by Euler's.

    On the straight path this is the midpoint rule in t (Lipman et al. 2023, Flow Matching, section 6.2). It starts
    where `start` says.
    """

    needs_signal: ClassVar[bool] = True

    @property
    def nfe(self) -> int:
        return 2 * self.steps - 1

    def step(self, x: Tensor, t: NoiseLevel, s: NoiseLevel, context: StepContext) -> tuple[Tensor, Tensor]:
        denoised = context.predict(x, t)
        y, d = slope(x, denoised, t)
        if s.t > 0:
            m = context.schedule.level((t.t + s.t) / 2)
            x_m = (y + (m.ratio - t.ratio) * d) * m.scale
            _, d = slope(x_m, context.predict(x_m, m), m)
        return (y + (s.ratio - t.ratio) * d) * s.scale, denoised


def last(way: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """The result at the end of a trajectory."""
    return deque(way, maxlen=1)[0][0]


def cut(times: Tensor, first: float) -> Tensor:
    """Falling times from `first` on, which takes the place of those above it; a time that comes twice counts once."""
    times = times.unique_consecutive()
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
    """The training time from which an image is not lost in its noise: 1, or the next from where sigma / scale is 80."""
    if schedule.level(torch.ones((), dtype=torch.float64, device=device)).ratio <= FAINTEST:
        return 1.0
    logsnr = torch.tensor(-2 * math.log(FAINTEST), dtype=torch.float64, device=device)
    return schedule.snap(schedule.time(logsnr)).item()


def grid_times(
    schedule: Schedule, steps: int, grid: Grid, spacing: Spacing, device: torch.device, offset: int = 0
) -> Tensor:
    """Times from noise to image, (steps + 1,) float64, falling to 0.

    uniform: evenly spaced in t, on the entries of a table as `spacing` says. quadratic: sqrt(t) evenly spaced
    (Song et al. 2021, DDIM, appendix D.2). logsnr: log(sigma / alpha) evenly spaced from 80 to 0.01, or between the
    nearest levels trained on, then 0 (Lu et al. 2022, DPM-Solver). karras: its exponential to the power
    1/7 evenly spaced, with the same ends (Karras et al. 2022, EDM, eq. 5). All but uniform may fall between the
    entries of a table. `offset`: entries of the table by which a leading spacing begins and ends nearer to noise, 1 in
    Stable Diffusion.

    Raises:
        UserError: a spacing or an offset that a grid does not have, or more uniform steps than the table has levels.
    """
    if offset and (grid, spacing) != ("uniform", "leading"):
        fix = ".sampler.offset=0, or .sampler.grid=uniform .sampler.spacing=leading"
        raise UserError(".sampler.offset", offset, "a leading spacing alone has one", fix)
    if grid == "uniform":
        return schedule.times(steps, spacing, offset).to(device)
    if spacing != "trailing":
        raise UserError(".sampler.spacing", spacing, f"a {grid} grid has none", ".sampler.grid=uniform")
    trained = schedule.snap(torch.tensor([1.0, 1e-9], dtype=torch.float64, device=device))
    places = torch.linspace(0, 1, steps, dtype=torch.float64, device=device)
    if grid == "quadratic":
        roots = torch.linspace(1, 1 / steps, steps, dtype=torch.float64, device=device)
        times = torch.lerp(trained[1], trained[0], roots**2)
    elif grid == "logsnr":
        high, low = (-schedule.logsnr(trained) / 2).exp().clamp(0.01, FAINTEST).log()
        times = schedule.time(-2 * torch.lerp(high, low, places))
    else:
        high, low = (-schedule.logsnr(trained) / 2).exp().clamp(0.01, FAINTEST) ** (1 / 7)
        times = schedule.time(-14 * torch.lerp(high, low, places).log())
    return torch.cat([times, torch.zeros_like(times[:1])])
