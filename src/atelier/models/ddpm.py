"""Denoising diffusion and flow matching in pixel space (Ho et al. 2020; Song et al. 2021; Lipman et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from atelier.batch import Batch
from atelier.diffusion.guidance import clipped, guided
from atelier.diffusion.objective import Objective
from atelier.diffusion.samplers import Sampler
from atelier.models.base import Cond, Generator
from atelier.nets.conditioning import Condition
from atelier.nets.unet import UNet
from atelier.ranges import NonNegFloat, PositiveFloat, Probability
from atelier.rng import ImageRngs


class DDPM(Generator):
    """One U-Net that denoises.

    Args:
        objective: schedule, target, weighting and density of the training loss.
        net: (x_t, time, embedding) -> target.
        embedder: conditions to one vector.
        drop: share of training images whose condition is left out, for guidance.
        sampler: used unless another is asked for.
        guidance: used unless another is asked for; 1 = off.
        optimizer: parameters -> optimizer.
        grad_clip: global gradient norm; None = off.
    """

    averaged = ("net", "embedder")

    def __init__(
        self,
        objective: Objective,
        net: UNet,
        embedder: Condition,
        drop: Probability,
        sampler: Sampler,
        guidance: NonNegFloat,
        optimizer: Callable,
        grad_clip: PositiveFloat | None,
    ) -> None:
        super().__init__()
        self.objective, self.net, self.embedder, self.drop = objective, net, embedder, drop
        self.needs = frozenset(embedder.conditions)
        self.sampler, self.guidance = sampler, guidance
        self.optimizer, self.grad_clip = optimizer, grad_clip

    def training_step(self, batch: Batch) -> Tensor:
        x = batch["image"]
        drop = torch.rand(len(x), device=x.device) < self.drop
        cond = self.embedder(self.condition(batch, ""), len(x), drop)
        loss = self.objective(self.net, x, cond).mean()
        self.report("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer([*self.net.parameters(), *self.embedder.parameters()])

    def sample(
        self, cond: Cond, rngs: ImageRngs, *, sampler: Sampler | None = None, guidance: float | None = None
    ) -> Tensor:
        """Images (n, C, H, W).

        Args:
            sampler: instead of the model's own.
            guidance: D_u + guidance (D_c - D_u); 1 = off, 0 = without condition.
        """
        noise = rngs.randn(*self.net.shape, device=self.device)
        known, null = self.embedder(cond, len(rngs)), self.embedder.null(len(rngs))
        strength = (self.guidance if guidance is None else guidance) if self.needs else 1.0
        denoise = clipped(guided(self._denoise, known, null, strength))
        return (sampler or self.sampler)(denoise, noise, self.objective.schedule, rngs)

    def _denoise(self, x_t: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        return self.objective.denoise(self.net, x_t, t, cond)

    def protocol(self) -> dict[str, Any]:
        return {"sampler": str(self.sampler), "nfe": self.sampler.nfe, "guidance": self.guidance if self.needs else 1.0}
