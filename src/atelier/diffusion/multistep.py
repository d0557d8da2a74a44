"""Samplers that keep what was denoised before, and so follow its change with one call of the denoiser a step.

All but PLMS live in lambda = log(alpha / sigma), in which the probability-flow ODE has the exact solution, for
h = lambda_s - lambda_t and the mean of D on the way from t to s, weighted by exp(lambda):

    x_s = sigma_s / sigma_t x_t + alpha_s (1 - e^-h) mean(D)

(Lu et al. 2022, DPM-Solver++, eq. 8). With D taken as constant it is DDIM. The first step has no past and is that step,
as is one from noise without signal, whose h is infinite; the last, to sigma = 0, returns D.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from atelier.diffusion.samplers import Sampler, Step, StepContext, slope
from atelier.diffusion.schedules import NoiseLevel


@dataclass(frozen=True, kw_only=True)
class DPMSolver2M(Sampler):
    """DPM-Solver++ of order 2: D extrapolated to the middle of the step, D + h/2 dD/dlambda.

    (Lu et al. 2022, DPM-Solver++, algorithm 2.) `stochastic`: the reverse SDE in place of the ODE, SDE-DPM-Solver++
    (2M), whose first step is DDIM with eta 1.
    """

    remembers: ClassVar[int] = 1
    stochastic: bool = False

    @property
    def always_draws(self) -> bool:
        return self.stochastic

    def step(self, x: Tensor, t: NoiseLevel, s: NoiseLevel, context: StepContext) -> tuple[Tensor, Tensor]:
        denoised = mean = context.predict(x, t)
        if s.sigma > 0:
            mean = middle(denoised, changes(denoised, t, context), s.half_logsnr - t.half_logsnr)
        return exponential_step(x, mean, t, s, context, self.stochastic), denoised


@dataclass(frozen=True, kw_only=True)
class DPMSolver3M(Sampler):
    """DPM-Solver++ with two steps of the past: a parabola through the last three D, the second step as in 2M.

    `form`: "exact" is the mean of that parabola, and of order 3. "parity" is what was published and what others
    compute: it takes D'' / 2 for D'', so that its order is 2 (Lu et al. 2022, DPM-Solver++, appendix). `stochastic`:
    the reverse SDE in place of the ODE.
    """

    remembers: ClassVar[int] = 2
    form: Literal["exact", "parity"] = "exact"
    stochastic: bool = False

    @property
    def always_draws(self) -> bool:
        return self.stochastic

    def step(self, x: Tensor, t: NoiseLevel, s: NoiseLevel, context: StepContext) -> tuple[Tensor, Tensor]:
        denoised = mean = context.predict(x, t)
        if s.sigma > 0:
            h, past = s.half_logsnr - t.half_logsnr, changes(denoised, t, context)
            mean = self.parabola(denoised, past, h) if len(past) == 2 else middle(denoised, past, h)
        return exponential_step(x, mean, t, s, context, self.stochastic), denoised

    def parabola(self, denoised: Tensor, past: list[tuple[Tensor, Tensor]], h: Tensor) -> Tensor:
        """Mean of D + D' u + D'' u^2 / 2 over u in [0, h], weighted by exp(k u), k = 2 for the SDE, 1 for the ODE."""
        (h_0, d_0), (h_1, d_1) = past
        bend = (d_0 - d_1) / (h_0 + h_1)  # D'' / 2
        first = d_0 + h_0 * bend  # D'
        kh = h * (1 + self.stochastic)
        p_1 = torch.expm1(-kh)
        p_2 = p_1 / kh + 1
        p_3 = p_2 / kh - 0.5
        second = 2 * bend if self.form == "exact" else bend
        return denoised - (p_2 * h * first - p_3 * h**2 * second) / p_1


@dataclass(frozen=True, kw_only=True)
class UniPC(Sampler):
    """A polynomial through the last `order` D, and the new D to correct the step that led to it.

    (Zhao et al. 2023, UniPC, algorithms 1 and 2, in terms of D.) The D at the predicted point serves the correction
    and the next step, so that each step costs one call; the last point is not corrected.

    Args:
        order: number of D that the prediction uses; it has this order, and with the correction one more.
        solver: B, which is h for "bh1" and 1 - e^-h for "bh2"; it counts where one D beside that at t is used, with
            weight 1/2, and cancels where there are more.
        corrector: whether to correct; without, order 2 with bh2 is DPM-Solver++ 2M.
    """

    remembers: ClassVar[int] = 3
    order: Literal[1, 2, 3] = 2
    solver: Literal["bh1", "bh2"] = "bh2"
    corrector: bool = True

    def step(self, x: Tensor, t: NoiseLevel, s: NoiseLevel, context: StepContext) -> tuple[Tensor, Tensor]:
        denoised = context.predict(x, t)
        here, past = Step(t, x, denoised), with_signal(context)[: self.order]
        if self.corrector and past:
            last, *earlier = past
            x = x - t.alpha * (self.bend(last, [here, *earlier], t) - self.bend(last, earlier, t))
        x_s = exponential_step(x, denoised, t, s, context)
        if s.sigma > 0 and t.alpha > 0:
            x_s = x_s - s.alpha * self.bend(here, past[: self.order - 1], s)
        return x_s, denoised

    def bend(self, t: Step, others: list[Step], s: NoiseLevel) -> Tensor:
        """What a change of D takes from x_s / alpha_s: sum of c_k (D_k - D_t) / r_k, r_k = (lambda_k - lambda_t) / h.

        For i = 1, 2, ...: sum of r_k^(i - 1) c_k = i! phi_i, where phi_1 = (e^-h - 1) / (-h) - 1 and phi_(i + 1) =
        -phi_i / h - 1 / (i + 1)!; one D alone has c = -B / 2   (Zhao et al. 2023, UniPC, theorem 3.1, data form).
        """
        if not others:
            return torch.zeros_like(t.x)
        h = s.half_logsnr - t.t.half_logsnr
        r = torch.stack([other.t.half_logsnr - t.t.half_logsnr for other in others]) / h
        if len(others) == 1:
            weights = (torch.expm1(-h) if self.solver == "bh2" else -h).view(1) / 2
        else:
            phi, moments = torch.expm1(-h) / -h - 1, []
            for i in range(1, len(others) + 1):
                moments.append(math.factorial(i) * phi)
                phi = -phi / h - 1 / math.factorial(i + 1)
            weights = torch.linalg.solve(torch.stack([r**i for i in range(len(others))]), torch.stack(moments))
        changes = torch.stack([other.denoised - t.denoised for other in others])
        return torch.tensordot(weights / r, changes, dims=1)


@dataclass(frozen=True, kw_only=True)
class PLMS(Sampler):
    """Pseudo linear multistep: Euler's step along a mean of the last four slopes (Liu et al. 2022, PNDM, eq. 9, 12).

    The weights are those of Adams and Bashforth for as many slopes as there are, as if steps were even; on tables of
    levels a slope is eps. The first step takes the mean of the slopes at both of its ends, which costs one more call of
    the denoiser, as Stable Diffusion does in place of Runge-Kutta steps. It starts where `start` says.
    """

    remembers: ClassVar[int] = 3
    needs_signal: ClassVar[bool] = True
    WEIGHTS: ClassVar[tuple[tuple[float, ...], ...]] = (
        (1.0,),
        (3 / 2, -1 / 2),
        (23 / 12, -16 / 12, 5 / 12),
        (55 / 24, -59 / 24, 37 / 24, -9 / 24),
    )

    @property
    def nfe(self) -> int:
        return self.steps + 1

    def step(self, x: Tensor, t: NoiseLevel, s: NoiseLevel, context: StepContext) -> tuple[Tensor, Tensor]:
        denoised = context.predict(x, t)
        steps = [Step(t, x, denoised), *reversed(context.past)]
        slopes = [slope(one.x, one.denoised, one.t)[1] for one in steps]
        d = sum(weight * one for weight, one in zip(self.WEIGHTS[len(slopes) - 1], slopes, strict=True))
        y, stride = x / t.scale, s.ratio - t.ratio
        if not context.past and s.sigma > 0:
            x_s = (y + stride * d) * s.scale
            d = (d + slope(x_s, context.predict(x_s, s), s)[1]) / 2
        return (y + stride * d) * s.scale, denoised


def exponential_step(
    x: Tensor, mean: Tensor, t: NoiseLevel, s: NoiseLevel, context: StepContext, stochastic: bool = False
) -> Tensor:
    """x_s for a mean of D, alpha = 0 at t or sigma = 0 at s included.

    ODE: see the module. SDE: x_s = sigma_s / sigma_t e^-h x + alpha_s (1 - e^-2h) mean + sigma_s sqrt(1 - e^-2h) z
    (Lu et al. 2022, DPM-Solver++, SDE-DPM-Solver++1).
    """
    decay = s.sigma * t.alpha / (t.sigma * s.alpha)  # e^-h
    if not stochastic:
        return s.sigma / t.sigma * x + s.alpha * (1 - decay) * mean
    z = context.noise()
    gone = 1 - decay**2
    return s.sigma / t.sigma * decay * x + s.alpha * gone * mean + s.sigma * gone.sqrt() * z


def with_signal(context: StepContext) -> list[Step]:
    """Steps before this one, the latest first, but for one from noise without signal: its lambda is -inf."""
    return [step for step in reversed(context.past) if step.t.alpha > 0]


def changes(denoised: Tensor, t: NoiseLevel, context: StepContext) -> list[tuple[Tensor, Tensor]]:
    """Between the last points: how far they lie apart in lambda, and the slope of D; the latest first."""
    found = []
    for step in with_signal(context):
        stride = t.half_logsnr - step.t.half_logsnr
        found.append((stride, (denoised - step.denoised) / stride))
        denoised, t = step.denoised, step.t
    return found


def middle(denoised: Tensor, past: list[tuple[Tensor, Tensor]], h: Tensor) -> Tensor:
    """D in the middle of a step of length h, on the line through the last two."""
    return denoised + h / 2 * past[0][1] if past else denoised
