"""Denoising diffusion and flow matching in pixel space (Ho et al. 2020; Song et al. 2021; Lipman et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from atelier.core.batch import Batch
from atelier.core.condition import Embedder
from atelier.core.ranges import PositiveFloat, Probability
from atelier.core.rng import ImageRngs
from atelier.diffusion.bound import bound_terms
from atelier.diffusion.diffusion_sampler import DiffusionSampler
from atelier.diffusion.guidance import Guider
from atelier.diffusion.objective import Objective, TrainedDenoiser
from atelier.diffusion.samplers import Sampler
from atelier.models.base import Bounded, Cond
from atelier.models.diffusion_model import DiffusionModel
from atelier.nets.denoising import DenoisingNet, conditioned_by, denoises


class DDPM(DiffusionModel, Bounded):
    """One net that denoises.

    Args:
        objective: schedule, target, weighting and time distribution of the training loss.
        net: (x_t, time, condition) -> target.
        embedder: map from conditions by name to the `Condition` of the net.
        cond_dropout: share of training images whose condition is left out, for guidance.
        sampler: sampler used unless another is asked for.
        guider: guider used with its own guidance unless another is asked for; 1 = off.
        optimizer: parameters -> optimizer.
        grad_clip: global gradient norm; None = off.

    Raises:
        UserError: the net does not denoise, the embedder does not fit it, or the sampler does not fit the schedule.
    """

    idea = (
        "One net learns to take noise away from images, for every strength of noise. "
        "An image begins as noise and is denoised step by step; on straight ways there this is flow matching."
    )
    formula = "L = E_x,t,eps w(t) |net(alpha_t x + sigma_t eps, t, condition) - target|^2"
    ema_nets = ("net", "embedder")

    def __init__(
        self,
        objective: Objective,
        net: DenoisingNet,
        embedder: Embedder,
        cond_dropout: Probability,
        sampler: Sampler,
        guider: Guider,
        optimizer: Callable,
        grad_clip: PositiveFloat | None,
    ) -> None:
        super().__init__()
        denoises(net, ".net")
        conditioned_by(net, embedder, ".net")
        self.objective, self.net, self.embedder, self.cond_dropout = objective, net, embedder, cond_dropout
        self.optimizer, self.grad_clip = optimizer, grad_clip
        self.diffusion_sampler = DiffusionSampler(objective, net, embedder, sampler, guider, clip=True)
        self.needs = self.diffusion_sampler.conditions

    def training_step(self, batch: Batch) -> Tensor:
        x = batch["image"]
        cond = self.embedder(self.condition(batch, ""), len(x), self.cond_dropout)
        loss = self.objective(self.net, x, cond, self.images_seen).mean()
        self.report("loss", loss)
        for name, term in self.objective.terms.items():
            self.report(name, term)
        return loss

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, z: Tensor) -> Tensor:
        return z

    @property
    def trained_by_bound(self) -> bool:
        return self.objective.loss != "simple"

    def bound_terms(self, x: Tensor, cond: Cond, rngs: ImageRngs, n_levels: int) -> dict[str, Tensor]:
        known = self.embedder(cond, len(x))
        denoise = partial(self.objective.denoise, self.net, cond=known)
        return bound_terms(denoise, x, self.objective.schedule, rngs, n_levels)

    def part(self) -> TrainedDenoiser:
        return TrainedDenoiser(self.objective, self.net, self.embedder)
