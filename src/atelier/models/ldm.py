"""Latent diffusion on a frozen autoencoder (Rombach et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from atelier.core.batch import Batch
from atelier.core.condition import Embedder
from atelier.core.errors import UserError, within
from atelier.core.ranges import PositiveFloat, Probability
from atelier.diffusion.diffusion_sampler import DiffusionSampler
from atelier.diffusion.guidance import Guider
from atelier.diffusion.objective import Objective
from atelier.diffusion.samplers import Sampler
from atelier.models.base import DiffusionModel
from atelier.nets.codec import LatentCodec
from atelier.nets.contracts import FirstStage, keeps
from atelier.nets.denoising import DenoisingNet, conditioned_by, denoises
from atelier.nets.frozen import Frozen


class LDM(DiffusionModel):
    """A denoising net in the latent space of a first stage.

    Args:
        codec: frozen net -> LatentCodec.
        net: image_size, image_channels -> denoising net, which get the size and the channels of the latents.
        objective, embedder, cond_dropout, sampler, guider, optimizer, grad_clip: arguments of DDPM, for latents.
        first_stage: images to latents and back.

    Raises:
        UserError: the first stage is no autoencoder, the loss is a bound of grey levels, or as in DDPM.
    """

    ema_nets = ("net", "embedder")

    def __init__(
        self,
        codec: Callable,
        objective: Objective,
        net: Callable | DenoisingNet,  # a built net: in configs stored before the first stage gave the sizes
        embedder: Embedder,
        cond_dropout: Probability,
        sampler: Sampler,
        guider: Guider,
        optimizer: Callable,
        grad_clip: PositiveFloat | None,
        first_stage: FirstStage,
    ) -> None:
        super().__init__()
        keeps(first_stage, FirstStage, ".first_stage")
        channels, _, size = first_stage.latent_shape
        with within(".net"):
            made = net if isinstance(net, nn.Module) else net(image_size=size, image_channels=channels)
        denoises(made, ".net")
        conditioned_by(made, embedder, ".net")
        self.net: DenoisingNet = made
        if objective.loss != "simple":
            problem = "the bound counts grey levels, which latents have not"
            raise UserError(".objective.loss", objective.loss, problem, ".objective.loss=simple")
        self.codec: LatentCodec = codec(Frozen(first_stage))
        self.objective, self.embedder, self.cond_dropout = objective, embedder, cond_dropout
        self.optimizer, self.grad_clip = optimizer, grad_clip
        self.diffusion_sampler = DiffusionSampler(objective, self.net, embedder, sampler, guider, clip=False)
        self.needs = self.diffusion_sampler.conditions

    def training_step(self, batch: Batch) -> Tensor:
        moments = batch["moments"] if "moments" in batch else self.moments(batch["image"])
        self.codec.measure_moments(moments)
        cond = self.embedder(self.condition(batch, ""), len(moments), self.cond_dropout)
        loss = self.objective(self.net, self.codec.draw(moments), cond, self.images_seen).mean()
        self.report("loss", loss)
        return loss

    @property
    def first_stage(self) -> FirstStage:
        return self.codec.autoencoder.net

    def moments(self, x: Tensor) -> Tensor:
        return self.codec.moments(x)

    def encode(self, x: Tensor) -> Tensor:
        return self.codec.centre(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.codec.decode(z)
