"""The training objective of every diffusion model, and the denoiser that its net becomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from atelier.core.batch import Cond
from atelier.core.condition import Condition
from atelier.core.errors import UserError
from atelier.diffusion.bound import below, bits, prior_term, snapped, step_term
from atelier.diffusion.schedules import Schedule
from atelier.diffusion.targets import Target
from atelier.diffusion.times import TimeDistribution, Uniform
from atelier.diffusion.weightings import Plain, Weighting

Net = Callable[[Tensor, Tensor, Condition | None], Tensor]


class Objective(nn.Module):
    """What training brings down: E over t, eps of w_t mean((net(x_t, t, cond) - target)^2), or a bound of -log p(x).

    (After Ho et al. 2020, DDPM, eq. 14; the others: Nichol & Dhariwal 2021, Improved DDPM, section 3.1.)

    Args:
        schedule: alpha_t and sigma_t.
        target: quantity that the net predicts.
        weighting: w_t.
        time_distribution: distribution of t.
        loss: "simple", the weighted squared error; "vlb", the variational bound in bits per dimension; "hybrid", the
            first and a thousandth of the other, which then teaches the variance alone.
        learned_variance: whether the net tells the variance of a step too, in as many channels again.

    Raises:
        UserError: a target that tells nothing of the image where the schedule ends, as eps where it ends in pure noise:
            sampling would divide by 0. A learned variance that no loss teaches, or a bound that teaches nothing. A
            bound over times not uniform, or with weights. Two deviations of the images.
    """

    def __init__(
        self,
        schedule: Schedule,
        target: Target,
        weighting: Weighting,
        time_distribution: TimeDistribution,
        loss: Literal["simple", "vlb", "hybrid"] = "simple",
        learned_variance: bool = False,
    ) -> None:
        super().__init__()
        one = torch.ones((), dtype=torch.float64)
        if not target.gain(schedule.alpha(one), schedule.sigma(one)).isfinite():
            name = type(target).__name__
            problem = f"{type(schedule).__name__} ends in pure noise, where {name} tells nothing of the image"
            raise UserError(".target", name, problem, "target@.target=flow")
        if learned_variance and loss == "simple":
            problem = "the simple loss does not teach it, loss=hybrid does"
            raise UserError(".learned_variance", True, problem, ".learned_variance=false")
        if loss == "hybrid" and not learned_variance:
            problem = "its bound teaches the variance alone, which learned_variance=true would learn"
            raise UserError(".loss", loss, problem, ".loss=simple")
        if loss == "vlb" and type(weighting) is not Plain:
            name, problem = type(weighting).__name__, "the bound has weights of its own"
            raise UserError(".weighting", name, problem, "weighting@.weighting=plain")
        if loss != "simple" and type(time_distribution) is not Uniform:
            name, problem = type(time_distribution).__name__, "the bound is a mean over times that are equally likely"
            raise UserError(".time_distribution", name, problem, "time_distribution@.time_distribution=uniform")
        stds = [getattr(part, "sigma_data", None) for part in (schedule, target)]
        if None not in stds and stds[0] != stds[1]:
            problem = f"the schedule divides by {stds[0]:g}"
            raise UserError(".target.sigma_data", stds[1], problem, f".target.sigma_data={stds[0]:g}")
        self.schedule, self.target = schedule, target
        self.weighting, self.time_distribution = weighting, time_distribution
        self.loss, self.learned_variance = loss, learned_variance
        self.terms: dict[str, Tensor] = {}  # of the bound in the last loss, by name

    def forward(self, net: Net, x: Tensor, cond: Condition | None = None, images_seen: int = 0) -> Tensor:
        """The loss of each image, (B,) float32, for x (B, C, H, W) float32; draws from torch's generator."""
        t = self.sample_times(len(x), x.device, images_seen)               # (B,)
        eps = torch.randn_like(x)                                          # (B, C, H, W)
        alpha, sigma = self.schedule.pair(t, like=x)                       # (B, 1, 1, 1)
        x_t = alpha * x + sigma * eps                                      # (B, C, H, W)
        output, v = self.answer(net, x_t, t, cond)                         # (B, C, H, W), the same or None
        if self.loss == "simple":
            return self.squared_error(output, x, eps, t)                       # (B,)
        denoised = self.target.denoised(output, x_t, alpha, sigma)
        if self.loss == "vlb":
            return self.bound(x, denoised, v, t)
        return self.squared_error(output, x, eps, t) + self.bound(x, denoised.detach(), v, t) / 1000

    def squared_error(self, output: Tensor, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The weighted error of what the net answers at x_t = alpha x + sigma eps, (B,)."""
        alpha, sigma = self.schedule.pair(t, like=x)
        error = output - self.target(x, eps, alpha, sigma)                 # (B, C, H, W)
        loss = (self.weight(t, like=x) * error**2).flatten(1).mean(1)      # (B,)
        return self.weighting.total(loss, self.schedule.logsnr(t))

    def bound(self, x: Tensor, denoised: Tensor, v: Tensor | None, t: Tensor) -> Tensor:
        """An estimate of the bound by its term at t, (B,) float32 bits per dimension, without L_T, which stays."""
        s = below(self.schedule, t)
        term = len(self.schedule.levels()) * bits(step_term(x, denoised, v, s, t, self.schedule), x)
        self.terms = _named(term.detach(), s, bits(prior_term(x, self.schedule), x))
        return term.float()

    def weight(self, t: Tensor, like: Tensor) -> Tensor:
        """Of the squared error at times t (B,), (B, 1, 1, 1)."""
        alpha, sigma = self.schedule.pair(t.clamp(min=self.weighting.time_floor), like)
        return self.weighting(self.target, alpha, sigma)

    def sample_times(self, n: int, device: torch.device, images_seen: int = 0) -> Tensor:
        """Training times, (n,) float64 in (0, 1], on the schedule's grid where it has one."""
        t = self.time_distribution(n, self.schedule, device, images_seen)
        return self.schedule.snap(t) if self.loss == "simple" else snapped(self.schedule, t)[0]

    def answer(self, net: Net, x_t: Tensor, t: Tensor, cond: Condition | None) -> tuple[Tensor, Tensor | None]:
        """What the net says of the target, and of the variance where that is learned; float32, (B, C, H, W) each."""
        scale = self.schedule.input_scale(t).to(x_t.dtype).view(-1, *[1] * (x_t.ndim - 1))
        output = net(scale * x_t, self.schedule.net_time(t), cond).float()
        return tuple(output.chunk(2, dim=1)) if self.learned_variance else (output, None)

    def denoise(self, net: Net, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """The net's estimate of E[x | x_t], float32: x_t (B, C, H, W) float32, t (B,) in (0, 1].

        Where the variance is learned, v stands behind it in as many channels (`bound.log_variance_of`).
        """
        output, v = self.answer(net, x_t, t, cond)
        alpha, sigma = self.schedule.pair(t, like=x_t)
        denoised = self.target.denoised(output, x_t, alpha, sigma)
        return denoised if v is None else torch.cat([denoised, v], dim=1)


def _named(term: Tensor, s: Tensor, prior: Tensor) -> dict[str, Tensor]:
    """Estimates of the bound's three terms by a batch, scalars: the steps to an image are those whose s is 0."""
    image = torch.where(s > 0, 0.0, term).mean()
    return {"vlb_prior": prior.mean(), "vlb_steps": term.mean() - image, "vlb_image": image}


class TrainedDenoiser(nn.Module):
    """What a finished diffusion model lends to one that learns from it: objective, net and embedder as one.

    Args:
        objective: loss that the net was trained by.
        net: (x_t, time, condition) -> target, of a `shape`.
        embedder: names and values of conditions to the net's condition.
    """

    def __init__(self, objective: Objective, net: nn.Module, embedder: nn.Module) -> None:
        super().__init__()
        self.objective, self.net, self.embedder = objective, net, embedder
        self.shape, self.conditions, self.schedule = net.shape, embedder.conditions, objective.schedule

    def denoise(self, x_t: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
        """E[x | x_t], (B, C, H, W) float32: x_t (B, C, H, W) float32, t (B,) in (0, 1]; cond None: nothing is known."""
        known = self.embedder.null(len(x_t)) if cond is None else self.embedder(cond, len(x_t))
        return self.objective.denoise(self.net, x_t, t, known)[:, : x_t.shape[1]]
