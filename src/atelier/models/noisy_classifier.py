"""A classifier of noisy images, whose gradient guides diffusion models (Dhariwal & Nichol 2021, ADM, section 4)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from atelier.core.batch import Batch
from atelier.core.ranges import PositiveFloat
from atelier.core.rng import ImageRngs
from atelier.diffusion.guidance import TrainedClassifier, logits_of
from atelier.diffusion.schedules import Schedule
from atelier.diffusion.times import TimeDistribution
from atelier.models.base import Examined, Model
from atelier.nets.noisy_classifier import HalfUNet

LEVELS = (0.1, 0.3, 1.0, 3.0, 10.0)  # sigma / alpha at which test images are classified


class NoisyClassifier(Model, Examined):
    """One net that tells the label of x_t at every t; it makes no images.

    Args:
        schedule: alpha_t and sigma_t.
        time_distribution: distribution of t.
        net: (x, time) -> logits of labels.
        optimizer: parameters -> optimizer.
        grad_clip: global gradient norm; None = off.
    """

    idea = (
        "A net tells the label of an image under any strength of noise. "
        "It makes no images: its gradient leads a diffusion model towards a label."
    )
    formula = "L = -E_x,t,eps log p(label | alpha_t x + sigma_t eps, t)"
    ema_nets = ("net",)
    takes_pieces = True
    needs = frozenset({"label"})
    figures = ("accuracy", *(f"accuracy/{noise:g}" for noise in LEVELS), "nll")

    def __init__(
        self,
        schedule: Schedule,
        time_distribution: TimeDistribution,
        net: HalfUNet,
        optimizer: Callable,
        grad_clip: PositiveFloat | None,
    ) -> None:
        super().__init__()
        self.schedule, self.time_distribution, self.net = schedule, time_distribution, net
        self.optimizer, self.grad_clip = optimizer, grad_clip

    def training_step(self, batch: Batch) -> Tensor:
        x = batch["image"]
        t = self.schedule.snap(self.time_distribution(len(x), self.schedule, x.device, self.images_seen))
        logits = self.logits(x, torch.randn_like(x), t)
        loss = -self.net.log_probability(logits, batch["label"]).mean()
        self.report("loss", loss)
        self.report("accuracy", (self.net.likeliest(logits) == batch["label"]).float().mean())
        return loss

    def logits(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Logits (B, L) float32 of images x (B, C, H, W) with noise eps like x at times t (B,)."""
        alpha, sigma = self.schedule.pair(t, like=x)
        return logits_of(self.net, self.schedule, alpha * x + sigma * eps, t)

    def examined(self, batch: Batch, rngs: ImageRngs) -> dict[str, Tensor]:
        """How often the label is found, in all and at each of `LEVELS`, and -log p of it, a mean over them."""
        x, label = batch["image"].to(self.device), batch["label"].to(self.device)
        right, nll = [], []
        for noise in LEVELS:
            eps = rngs.randn(*x.shape[1:], device=x.device)
            logsnr = torch.full((len(x),), -2 * math.log(noise), dtype=torch.float64, device=x.device)
            logits = self.logits(x, eps, self.schedule.time(logsnr).clamp(max=1.0))
            right.append((self.net.likeliest(logits) == label).double())
            nll.append(-self.net.log_probability(logits, label).double())
        found = [torch.stack(right).mean(0), *right, torch.stack(nll).mean(0)]
        return dict(zip(self.figures, found, strict=True))

    def part(self) -> TrainedClassifier:
        return TrainedClassifier(self.schedule, self.net)
