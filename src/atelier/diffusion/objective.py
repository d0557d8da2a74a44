"""The training objective of every diffusion model, and the denoiser that its net becomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from atelier.diffusion.schedules import Schedule
from atelier.diffusion.targets import Target, Weighting, denoised, target, weight
from atelier.errors import UserError

Net = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Objective(nn.Module):
    """E over t, eps of w_t mean((net(x_t, t, cond) - target)^2)   (after Ho et al. 2020, DDPM, eq. 14).

    Args:
        schedule: alpha_t and sigma_t.
        target: what the net predicts; "flow" is eps - x.
        weighting: "plain" is the squared error of the net's own answer, "min_snr" see `targets.weight`.
        density: of t; "uniform", or "logit_normal": t = sigmoid(n), n ~ N(0, 1) (Esser et al. 2024, eq. 19).

    Raises:
        UserError: eps on a schedule that ends in pure noise (Flow), where sampling would divide by alpha = 0.
    """

    def __init__(
        self,
        schedule: Schedule,
        target: Target,
        weighting: Weighting = "plain",
        density: Literal["uniform", "logit_normal"] = "uniform",
    ) -> None:
        super().__init__()
        if target == "eps" and schedule.alpha(torch.ones(())) == 0:
            problem = f"{type(schedule).__name__} ends in pure noise, where eps tells nothing of the image"
            raise UserError("model.objective.target", target, problem, "model.objective.target=flow")
        self.schedule = schedule
        self.target = target
        self.weighting = weighting
        self.density = density

    def forward(self, net: Net, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """The loss of each image, (B,) float32, for x (B, C, H, W) float32; draws from torch's generator."""
        t = self.draw(len(x), x.device)                                    # (B,)
        eps = torch.randn_like(x)                                          # (B, C, H, W)
        alpha, sigma = self.schedule.pair(t, like=x)                       # (B, 1, 1, 1)
        output = net(alpha * x + sigma * eps, self.schedule.net_time(t), cond).float()
        error = output - target(self.target, x, eps, alpha, sigma)
        return (weight(self.target, self.weighting, alpha, sigma) * error**2).flatten(1).mean(1)

    def draw(self, n: int, device: torch.device) -> Tensor:
        """Training times, (n,) float64 in (0, 1], on the schedule's grid where it has one."""
        if self.density == "uniform":
            t = 1 - torch.rand(n, device=device, dtype=torch.float64)
        else:
            t = torch.randn(n, device=device, dtype=torch.float64).sigmoid()
        return self.schedule.snap(t)

    def denoise(self, net: Net, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """The net's estimate of E[x | x_t], float32: x_t (B, C, H, W) float32, t (B,) in (0, 1]."""
        output = net(x_t, self.schedule.net_time(t), cond).float()
        alpha, sigma = self.schedule.pair(t, like=x_t)
        return denoised(self.target, output, x_t, alpha, sigma)
