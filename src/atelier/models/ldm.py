"""Latent diffusion on a frozen autoencoder (Rombach et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from atelier.batch import Batch
from atelier.diffusion.drawing import Drawing
from atelier.diffusion.objective import Objective
from atelier.diffusion.samplers import Sampler
from atelier.errors import UserError
from atelier.models.base import Cond, Generator
from atelier.nets.codec import LatentCodec
from atelier.nets.conditioning import Condition
from atelier.nets.frozen import Frozen
from atelier.nets.unet import UNet
from atelier.ranges import NonNegFloat, PositiveFloat, Probability
from atelier.rng import ImageRngs


class LDM(Generator):
    """A denoising U-Net in the latent space of a first stage.

    Args:
        codec: frozen net -> LatentCodec.
        objective, net, embedder, drop, sampler, guidance, optimizer, grad_clip: as in DDPM, on latents.
        first_stage: net with encode(x) -> (mean, logvar) and decode(z).
    """

    averaged = ("net", "embedder")

    def __init__(
        self,
        codec: Callable,
        objective: Objective,
        net: UNet,
        embedder: Condition,
        drop: Probability,
        sampler: Sampler,
        guidance: NonNegFloat,
        optimizer: Callable,
        grad_clip: PositiveFloat | None,
        first_stage: nn.Module,
    ) -> None:
        super().__init__()
        if not hasattr(first_stage, "latent_shape"):
            fix = "model.first_stage.experiment=shapes_vae"
            raise UserError("model.first_stage", type(first_stage).__name__, "it is no autoencoder", fix)
        if net.shape != first_stage.latent_shape:
            size, fix = net.shape[-1], f"model.net.image_size={first_stage.latent_shape[-1]}"
            raise UserError("model.net.image_size", size, f"the latents are {first_stage.latent_shape}", fix)
        self.codec: LatentCodec = codec(Frozen(first_stage))
        self.objective, self.net, self.embedder, self.drop = objective, net, embedder, drop
        self.needs = frozenset(embedder.conditions)
        self.optimizer, self.grad_clip = optimizer, grad_clip
        self.drawing = Drawing(objective, net, embedder, sampler, guidance, clip=False)

    def training_step(self, batch: Batch) -> Tensor:
        x = batch["image"]
        self.codec.measure(x)
        drop = torch.rand(len(x), device=x.device) < self.drop
        cond = self.embedder(self.condition(batch, ""), len(x), drop)
        loss = self.objective(self.net, self.codec.encode(x), cond).mean()
        self.report("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer([*self.net.parameters(), *self.embedder.parameters()])

    def sample(
        self, cond: Cond, rngs: ImageRngs, *, sampler: Sampler | None = None, guidance: float | None = None
    ) -> Tensor:
        """Images (n, C, H, W); options as in DDPM."""
        noise = rngs.randn(*self.net.shape, device=self.device)
        return self.codec.decode(self.drawing(cond, noise, rngs, sampler, guidance))

    def protocol(self) -> dict[str, Any]:
        return self.drawing.protocol()
