"""The training objective of every diffusion model, and the denoiser that its net becomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from atelier.core.condition import Condition
from atelier.core.errors import UserError
from atelier.core.ranges import PositiveFloat, PositiveInt, Probability
from atelier.diffusion.schedules import Schedule
from atelier.diffusion.targets import Target, Weighting, denoised, target, weight

Net = Callable[[Tensor, Tensor, Condition | None], Tensor]


class Objective(nn.Module):
    """E over t, eps of w_t mean((net(x_t, t, cond) - target)^2)   (after Ho et al. 2020, DDPM, eq. 14).

    Args:
        schedule: alpha_t and sigma_t.
        target: what the net predicts; "flow" is eps - x.
        weighting: "plain" is the squared error, "min_snr" see `targets.weight`.
        density: of t; "uniform", or "logit_normal": t = sigmoid(n), n ~ N(mean, deviation^2) (Esser et al. 2024, eq.
            19).
        space: the target whose error a plain loss measures, see `targets.weight`; None: the net's own answer.
        floor: times below it are weighted as it is; keeps the weight of the last bit of noise finite.
        mean, deviation: of the logit of t.
        mean_end: where the mean moves, linearly, within `mean_images` images: from much noise, which shows what is
            where, to little, which shows how it is drawn; None: it stays.
        mean_images: see there.

    Raises:
        UserError: eps on a schedule that ends in pure noise (Flow), where sampling would divide by alpha = 0; a space
            beside min_snr, which names its own.
    """

    def __init__(
        self,
        schedule: Schedule,
        target: Target,
        weighting: Weighting = "plain",
        density: Literal["uniform", "logit_normal"] = "uniform",
        space: Target | None = None,
        floor: Probability = 0.0,
        mean: float = 0.0,
        deviation: PositiveFloat = 1.0,
        mean_end: float | None = None,
        mean_images: PositiveInt = 1,
    ) -> None:
        super().__init__()
        if target == "eps" and schedule.alpha(torch.ones(())) == 0:
            problem = f"{type(schedule).__name__} ends in pure noise, where eps tells nothing of the image"
            raise UserError("model.objective.target", target, problem, "model.objective.target=flow")
        if space is not None and weighting != "plain":
            problem = f"weighting {weighting} says itself what error it weighs"
            raise UserError("model.objective.space", space, problem, "model.objective.space=null")
        self.schedule, self.target, self.weighting = schedule, target, weighting
        self.density, self.mean, self.deviation = density, mean, deviation
        self.mean_end, self.mean_images = mean_end, mean_images
        self.space, self.floor = space, floor

    def forward(self, net: Net, x: Tensor, cond: Condition | None = None, images_seen: int = 0) -> Tensor:
        """The loss of each image, (B,) float32, for x (B, C, H, W) float32; draws from torch's generator."""
        t = self.draw(len(x), x.device, images_seen)                       # (B,)
        eps = torch.randn_like(x)                                          # (B, C, H, W)
        alpha, sigma = self.schedule.pair(t, like=x)                       # (B, 1, 1, 1)
        output = net(alpha * x + sigma * eps, self.schedule.net_time(t), cond).float()
        error = output - target(self.target, x, eps, alpha, sigma)
        return (self.weight(t, like=x) * error**2).flatten(1).mean(1)

    def weight(self, t: Tensor, like: Tensor) -> Tensor:
        """Of the squared error at times t (B,), (B, 1, 1, 1)."""
        alpha, sigma = self.schedule.pair(t.clamp(min=self.floor), like)
        return weight(self.target, self.weighting, alpha, sigma, self.space)

    def draw(self, n: int, device: torch.device, images_seen: int = 0) -> Tensor:
        """Training times, (n,) float64 in (0, 1], on the schedule's grid where it has one."""
        if self.density == "uniform":
            t = 1 - torch.rand(n, device=device, dtype=torch.float64)
        else:
            end = self.mean if self.mean_end is None else self.mean_end
            mean = self.mean + min(1.0, images_seen / self.mean_images) * (end - self.mean)
            t = (mean + self.deviation * torch.randn(n, device=device, dtype=torch.float64)).sigmoid()
        return self.schedule.snap(t)

    def denoise(self, net: Net, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """The net's estimate of E[x | x_t], float32: x_t (B, C, H, W) float32, t (B,) in (0, 1]."""
        output = net(x_t, self.schedule.net_time(t), cond).float()
        alpha, sigma = self.schedule.pair(t, like=x_t)
        return denoised(self.target, output, x_t, alpha, sigma)
