"""The training objective of every diffusion model, and the denoiser that its net becomes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from atelier.core.batch import Cond
from atelier.core.condition import Condition
from atelier.core.errors import UserError
from atelier.diffusion.schedules import Schedule
from atelier.diffusion.targets import Target
from atelier.diffusion.times import TimeDistribution
from atelier.diffusion.weightings import Weighting

Net = Callable[[Tensor, Tensor, Condition | None], Tensor]


class Objective(nn.Module):
    """E over t, eps of w_t mean((net(x_t, t, cond) - target)^2)   (after Ho et al. 2020, DDPM, eq. 14).

    Args:
        schedule: alpha_t and sigma_t.
        target: quantity that the net predicts.
        weighting: w_t.
        time_distribution: distribution of t.

    Raises:
        UserError: a target that tells nothing of the image where the schedule ends, as eps where it ends in pure noise:
            sampling would divide by 0.
    """

    def __init__(
        self, schedule: Schedule, target: Target, weighting: Weighting, time_distribution: TimeDistribution
    ) -> None:
        super().__init__()
        one = torch.ones((), dtype=torch.float64)
        if not target.gain(schedule.alpha(one), schedule.sigma(one)).isfinite():
            name = type(target).__name__
            problem = f"{type(schedule).__name__} ends in pure noise, where {name} tells nothing of the image"
            raise UserError(".target", name, problem, "target@.target=flow")
        self.schedule, self.target = schedule, target
        self.weighting, self.time_distribution = weighting, time_distribution

    def forward(self, net: Net, x: Tensor, cond: Condition | None = None, images_seen: int = 0) -> Tensor:
        """The loss of each image, (B,) float32, for x (B, C, H, W) float32; draws from torch's generator."""
        t = self.sample_times(len(x), x.device, images_seen)               # (B,)
        eps = torch.randn_like(x)                                          # (B, C, H, W)
        alpha, sigma = self.schedule.pair(t, like=x)                       # (B, 1, 1, 1)
        output = net(alpha * x + sigma * eps, self.schedule.net_time(t), cond).float()
        error = output - self.target(x, eps, alpha, sigma)
        return (self.weight(t, like=x) * error**2).flatten(1).mean(1)

    def weight(self, t: Tensor, like: Tensor) -> Tensor:
        """Of the squared error at times t (B,), (B, 1, 1, 1)."""
        alpha, sigma = self.schedule.pair(t.clamp(min=self.weighting.time_floor), like)
        return self.weighting(self.target, alpha, sigma)

    def sample_times(self, n: int, device: torch.device, images_seen: int = 0) -> Tensor:
        """Training times, (n,) float64 in (0, 1], on the schedule's grid where it has one."""
        return self.schedule.snap(self.time_distribution(n, device, images_seen))

    def denoise(self, net: Net, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """The net's estimate of E[x | x_t], float32: x_t (B, C, H, W) float32, t (B,) in (0, 1]."""
        output = net(x_t, self.schedule.net_time(t), cond).float()
        alpha, sigma = self.schedule.pair(t, like=x_t)
        return self.target.denoised(output, x_t, alpha, sigma)


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
        return self.objective.denoise(self.net, x_t, t, known)
