"""What every family can be asked: the verbs, and no training logic."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from atelier.core.batch import Batch, Cond, each
from atelier.core.errors import UserError
from atelier.core.ranges import NonNegFloat
from atelier.core.rng import ImageRngs
from atelier.diffusion import diagnostics
from atelier.diffusion.diffusion_sampler import DiffusionSampler, noised
from atelier.diffusion.guidance import ClassifierFree, Guider
from atelier.diffusion.samplers import Sampler
from atelier.nets.contracts import FirstStage
from atelier.nets.denoising import DenoisingNet

UNGUIDED = {"guider": ClassifierFree(guidance=1.0)}  # options of a diffusion model: the condition alone
UNKNOWN = {"guider": ClassifierFree(guidance=0.0)}  # nothing is known of what is made


class Model(LightningModule, ABC):
    """Whatever is trained here; what also makes images is a `Generator`.

    `training_step` is the family. Everything else that entry points and callbacks ask of it is here: `needs` (Batch
    fields it trains on beside image), `ema_nets` (attribute names of the nets under EMA), `ddp_options` (arguments of
    DDPStrategy), `divergence_limits` (reported name -> size beyond which training has diverged and is stopped),
    `needs_double_backward` (whether training goes backward through a gradient of an averaged net, which no compiled net
    can), `grad_clip` (global norm, None = off), `optimizer` (parameters -> optimizer).
    """

    needs: frozenset[str] = frozenset()
    ema_nets: ClassVar[tuple[str, ...]]
    ddp_options: ClassVar[dict[str, bool]] = {}
    divergence_limits: ClassVar[dict[str, float]] = {}
    needs_double_backward: ClassVar[bool] = False
    grad_clip: float | None = None
    optimizer: Callable
    images_seen: int = 0  # the clock writes it before each batch: what scheduled weights are functions of

    def __init__(self) -> None:
        super().__init__()
        self.reported: dict[str, Tensor] = {}
        self.averages: dict[str, nn.Module] = {}  # the EMA's, of the first half-life; in a dict they are no submodules

    def average(self, name: str) -> nn.Module:
        """The average of a net, as it was after the last batch: in eval mode, its weights without gradients.

        Raises:
            UserError: the run keeps no averages.
        """
        if name not in self.averages:
            problem = f"{type(self).__name__} learns from an average of its own weights"
            raise UserError("callbacks.ema.half_lives", [], problem, "callbacks.ema.half_lives=[2000]")
        return self.averages[name]

    def trained(self, *parts: str) -> dict[str, nn.Parameter]:
        """Name in the state dict -> weight that training changes: one that takes gradients.

        These alone are optimised, averaged and saved a second time with the averages.

        Args:
            parts: attribute names of the nets to look in, in this order; none: the whole model.
        """
        nets = {name: getattr(self, name) for name in parts} or {"": self}
        named = (pair for name, net in nets.items() for pair in net.named_parameters(prefix=name))
        return {name: weight for name, weight in named if weight.requires_grad}

    def configure_optimizers(self) -> Optimizer | list[Optimizer]:
        return self.optimizer(list(self.trained().values()))

    def part(self) -> nn.Module:
        """What of it a model gets that stands on a finished run of it (`nets/contracts.py`)."""
        return getattr(self, self.ema_nets[0])

    def report(self, name: str, value: Tensor) -> None:
        """Log a scalar of this batch under `train/<name>`."""
        self.reported[name] = value.detach()

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        if self.grad_clip is not None:
            self.clip(optimizer)

    def clip(self, optimizer: Optimizer) -> Tensor:
        """Bring the global norm of this optimizer's gradients, which are not scaled here, down to `grad_clip`.

        Returns:
            The norm that they had, a scalar.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.grad_clip is not None:
            clip_grads_with_norm_(parameters, self.grad_clip, norm)
        return norm

    def validation_step(self, batch: Batch) -> None:
        """Opens Lightning's validation loop; the evaluation callback does the work."""


class Generator(Model):
    """Makes images, of nothing or of source images.

    `cases` (names judged one by one), `real_fields` (case -> Batch field of the true images that its samples are judged
    against), `needs_grad` (whether `sample` enables gradients, as one does that descends an energy or is guided by a
    classifier; of a family or, as a property, of what it was built with).

    What makes them of source images says `source_fields` and `answer_fields` (case -> Batch field of the source, and of
    what it should become, which a batch may lack), `same_domain` (whether sources are images of the same world as the
    results, so that what was kept can be measured), `size_divisor` (that the sides of a source divide by),
    `scale_factor` (how many times as wide as its source a result is), `receptive_radius` (how many pixels of the source
    around its own place a pixel of the result depends on; None: all).
    """

    cases: ClassVar[tuple[str, ...]] = ("",)
    real_fields: ClassVar[dict[str, str]] = {"": "image"}
    needs_grad: bool = False
    source_fields: dict[str, str] = {}
    answer_fields: dict[str, str] = {}
    same_domain: bool = False
    size_divisor: int = 1
    scale_factor: int = 1
    receptive_radius: int | None = None

    def condition(self, batch: Batch, case: str) -> Cond:
        """The condition of each image of the batch, as `sample` takes it."""
        return each({name: batch[name] for name in sorted(self.needs)}, lambda value: value.to(self.device))

    @abstractmethod
    def sample(self, cond: Cond, rngs: ImageRngs) -> Tensor:
        """Images (len(rngs), C, H, W) in about [-1, 1], all noise from `rngs`.

        A family adds keyword-only options, whose annotations are the types of the keys of that name in
        conf/sample.yaml and conf/evaluate.yaml; those that the user gave are passed on, others are refused.
        """

    def answer(self, batch: Batch, case: str) -> Tensor | None:
        """What the sources of a batch should become, (B, C, H, W); None where the set does not know it."""
        return batch.get(self.answer_fields[case])

    def protocol(self) -> dict[str, Any]:
        """What of the model a printed number depends on (sampler, NFE, guidance)."""
        return {}


def sampling_mode(model: Generator, options: dict[str, Any]) -> AbstractContextManager:
    """What `sample` is called under: no gradients of anything around it.

    That is inference mode, or `no_grad` where the model or an option `needs_grad`, which may enable them inside.

    Args:
        model: generator to sample from.
        options: arguments of `sample` that a request gives, as another sampler.
    """
    needed = model.needs_grad or any(getattr(option, "needs_grad", False) for option in options.values())
    return torch.no_grad() if needed else torch.inference_mode()


class Latent(Generator):
    """Makes images from a latent: `sample` is generate(sample_latents())."""

    @abstractmethod
    def sample_latents(self, rngs: ImageRngs, cond: Cond) -> Tensor:
        """Latents of the prior, (len(rngs), ...)."""

    @abstractmethod
    def generate(self, z: Tensor, cond: Cond, rngs: ImageRngs) -> Tensor:
        """Images (B, C, H, W) of latents (B, ...)."""

    def sample(self, cond: Cond, rngs: ImageRngs) -> Tensor:
        return self.generate(self.sample_latents(rngs, cond), cond, rngs)


class StyleBased(Latent):
    """Makes images from styles, one for each layer, that a latent is mapped to.

    Its `generator` has a `mapping` with the mean style and a `synthesis` with `n_styles`; `truncation` is the psi of
    samples unless another is asked for.
    """

    truncation: float

    def styles(self, z: Tensor, cond: Cond, truncation: float | None = None) -> Tensor:
        """Styles (B, L, W) of latents, truncated: mean + psi (w - mean)   (Karras et al. 2019, StyleGAN, appendix B).

        Args:
            truncation: psi; 1 = off; None: the model's.
        """
        w = self.generator.mapping(z, self.generator_embedder.vector(cond, len(z)))
        mean, psi = self.generator.mapping.mean, self.truncation if truncation is None else truncation
        return (mean + psi * (w - mean))[:, None].expand(-1, self.generator.synthesis.n_styles, -1)

    @abstractmethod
    def synthesize(self, styles: Tensor, rngs: ImageRngs) -> Tensor:
        """Images (B, C, H, W) of styles (B, L, W)."""

    def generate(self, z: Tensor, cond: Cond, rngs: ImageRngs, *, truncation: float | None = None) -> Tensor:
        """Images (B, C, H, W); `truncation` as in `styles`."""
        return self.synthesize(self.styles(z, cond, truncation), rngs)

    def sample(self, cond: Cond, rngs: ImageRngs, *, truncation: NonNegFloat | None = None) -> Tensor:
        """Images (n, C, H, W); `truncation` as in `styles`."""
        return self.generate(self.sample_latents(rngs, cond), cond, rngs, truncation=truncation)

    def protocol(self) -> dict[str, Any]:
        return {"truncation": self.truncation}


class DiffusionModel(Generator):
    """Makes images by a denoising net, of pixels or of latents, and changes images by it.

    `net` has the shape of what it denoises; `diffusion_sampler` asks it for images.
    """

    net: DenoisingNet
    diffusion_sampler: DiffusionSampler

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """What is denoised of images (B, C, H, W): (B, *net.shape), without noise of its own."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Images (B, C, H, W) of what was denoised, (B, *net.shape)."""

    @property
    def needs_grad(self) -> bool:
        return self.diffusion_sampler.needs_grad

    def protocol(self) -> dict[str, Any]:
        return self.diffusion_sampler.protocol()

    def sample(
        self,
        cond: Cond,
        rngs: ImageRngs,
        *,
        sampler: Sampler | None = None,
        guidance: NonNegFloat | None = None,
        guider: Guider | None = None,
    ) -> Tensor:
        """Images (n, C, H, W).

        Args:
            sampler: sampler in place of the model's own.
            guidance: number in place of the guider's own; classifier-free, D_u + guidance (D_c - D_u): 1 = off.
            guider: guider in place of the model's own.
        """
        how = self.diffusion_sampler.asked(sampler, guidance, guider)
        return self.decode(how(cond, self.noise(rngs), rngs))

    def noise(self, rngs: ImageRngs) -> Tensor:
        """Standard normal noise that samples start from, (len(rngs), *net.shape)."""
        return rngs.randn(*self.net.shape, device=self.device)

    def edit(
        self,
        x: Tensor,
        cond: Cond,
        rngs: ImageRngs,
        strength: float,
        *,
        sampler: Sampler | None = None,
        guidance: NonNegFloat | None = None,
        guider: Guider | None = None,
    ) -> Tensor:
        """SDEdit of images x (B, C, H, W): noised to time `strength` in (0, 1], then denoised under a condition."""
        how = self.diffusion_sampler.asked(sampler, guidance, guider)
        return self.decode(how.edit(cond, self.encode(x), rngs, strength))

    def inpaint(
        self,
        x: Tensor,
        mask: Tensor,
        cond: Cond,
        rngs: ImageRngs,
        resamplings: int,
        *,
        sampler: Sampler | None = None,
        guidance: NonNegFloat | None = None,
        guider: Guider | None = None,
    ) -> Tensor:
        """Images x (B, C, H, W) where the mask (B, 1, H, W), bool, is false; where it is true, pixels that fit.

        What is below the mask is not looked at. A latent is to be filled where it or one beside it has masked pixels.
        """
        known = x.masked_fill(mask, 0)
        z = self.encode(known)
        hole = mask
        if z.shape[2:] != x.shape[2:]:
            hole = F.max_pool2d(F.adaptive_max_pool2d(mask.float(), z.shape[2:]), 3, 1, 1) > 0
        how = self.diffusion_sampler.asked(sampler, guidance, guider)
        filled = self.decode(how.inpaint(cond, z, hole, rngs, resamplings))
        return torch.where(mask, filled, x)

    def invert(
        self,
        x: Tensor,
        own: Cond | None,
        cond: Cond,
        *,
        sampler: Sampler | None = None,
        guidance: NonNegFloat | None = None,
        guider: Guider | None = None,
    ) -> Tensor:
        """Images that DDIM makes, under a condition, of the noise that it inverts images x (B, C, H, W) to.

        Args:
            own: condition of x, under which it is inverted without guidance; None: nothing is known of it.
            cond: condition of the result.
            sampler: sampler whose times DDIM takes; None: the model's own.
            guidance: guidance on the way back, as in `sample`.
            guider: guider on the way back, as in `sample`.
        """
        known, unguided = (cond, UNKNOWN) if own is None else (own, UNGUIDED)
        x_t, times = self.diffusion_sampler.asked(sampler, **unguided).invert(known, self.encode(x))
        return self.decode(self.diffusion_sampler.asked(sampler, guidance, guider).revert(cond, x_t, times))

    def noising(self, x: Tensor, rngs: ImageRngs, n_frames: int) -> Iterator[Tensor]:
        """Images x (B, C, H, W) noised to evenly spaced times from 0 to 1, (B, C, H, W) each, as far as they show."""
        z, noise = self.encode(x), self.noise(rngs)
        schedule = self.diffusion_sampler.objective.schedule
        for t in torch.linspace(0, 1, n_frames, dtype=torch.float64, device=x.device):
            yield self._shown(noised(z, noise, t[None], schedule).float(), t)

    def denoising(
        self,
        cond: Cond,
        rngs: ImageRngs,
        n_frames: int,
        *,
        sampler: Sampler | None = None,
        guidance: NonNegFloat | None = None,
        guider: Guider | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """After so many of the steps of `sample`, or all if they are fewer: x_t, and the denoised images.

        They are (B, C, H, W) each; the last x_t are the samples.
        """
        how = self.diffusion_sampler.asked(sampler, guidance, guider)
        times = how.times(self.device)[1:]
        chosen = set(torch.linspace(0, len(times) - 1, min(n_frames, len(times))).round().int().tolist())
        way = how.trajectory(cond, self.noise(rngs), rngs)
        for k, (t, (z, denoised)) in enumerate(zip(times, way, strict=True)):
            if k in chosen:
                yield self._shown(z, t), self.decode(denoised)

    def noise_bins(self) -> list[int]:
        """Centres of the bins of log-SNR that training reaches."""
        return list(diagnostics.bins(self.diffusion_sampler.objective.schedule, self.device))

    def denoising_errors(self, z: Tensor, cond: Cond, rngs: ImageRngs) -> tuple[Tensor, Tensor]:
        """Squared error and log-SNR in each bin of what `encode` gave, (B, bins) each (`diffusion/diagnostics.py`)."""
        return diagnostics.errors(self.objective, self.net, z, self.embedder(cond, len(z)), rngs)

    def linear_errors(self, variance: Tensor, logsnr: Tensor) -> Tensor:
        """What those errors are for the best linear guess of each pixel from itself; as `logsnr`, of any shape.

        Args:
            variance: that of each number of a latent over images, (C, H, W).
        """
        return diagnostics.linear_error(variance, logsnr)

    def _shown(self, z: Tensor, t: Tensor) -> Tensor:
        """Images of z at time t, brought to the size of images where a schedule makes it larger."""
        level = self.diffusion_sampler.objective.schedule.level(t)
        return self.decode(z / (level.alpha**2 + level.sigma**2).sqrt().clamp(min=1).float())


@runtime_checkable
class TrainedOnLatents(Protocol):
    """A model whose training step takes `moments` of a batch in place of its `image`."""

    @property
    def first_stage(self) -> FirstStage:
        """The autoencoder that they are of, which training does not change."""
        ...

    def moments(self, x: Tensor) -> Tensor:
        """Mean and log-variance of the latents of images (B, C, H, W) in [-1, 1], (B, 2 Z, h, w) float32."""
        ...


class Autoencoder(Latent):
    """Maps images to latents and back; to generate from a latent is to decode it."""

    @abstractmethod
    def encode(self, x: Tensor, rngs: ImageRngs | None = None) -> Tensor:
        """Latents (B, ...) of images (B, C, H, W); the mode without rngs, a draw of the posterior with them."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Images (B, C, H, W) of latents."""

    def generate(self, z: Tensor, cond: Cond, rngs: ImageRngs) -> Tensor:
        return self.decode(z)


class DiscreteAutoencoder(Autoencoder):
    """An autoencoder whose latents are entries of a codebook."""

    n_codes: int

    @abstractmethod
    def codes(self, x: Tensor) -> Tensor:
        """Codes (B, h, w) int64 in [0, n_codes) of images (B, C, H, W)."""


class Translator(Generator):
    """Image-to-image translation: the condition holds the source under the name of a Batch field, and no more."""

    source_fields: ClassVar[dict[str, str]] = {"": "source"}
    answer_fields: ClassVar[dict[str, str]] = {"": "image"}

    def condition(self, batch: Batch, case: str) -> Cond:
        return {self.source_fields[case]: batch[self.source_fields[case]].to(self.device)}


class Likelihood(ABC):
    """Says how probable images are."""

    @abstractmethod
    def nll(self, x: Tensor, cond: Cond, rngs: ImageRngs) -> Tensor:
        """-log p(x) of 8-bit images in nats, or an upper bound of it, (B,) float32; dequantised by `rngs`.

        Args:
            x: (B, C, H, W) in [-1, 1], on the 256 levels of `pixels.to_float`.
            cond: condition of each image, as `sample` takes it.
        """


class Examined(ABC):
    """Is judged by what it says of test images; `figures` are the names of what that gives, in order."""

    figures: ClassVar[tuple[str, ...]]

    @abstractmethod
    def examined(self, batch: Batch, rngs: ImageRngs) -> dict[str, Tensor]:
        """Figure -> its value for each image, (B,), whose mean over all is told; all noise from `rngs`."""


class Bounded(Likelihood):
    """Bounds it by terms, one for each level of noise, of which `nll` draws `drawn_levels` for each image."""

    drawn_levels: ClassVar[int] = 20

    @property
    @abstractmethod
    def trained_by_bound(self) -> bool:
        """Whether training brings the bound down, so that every evaluation measures it."""

    @abstractmethod
    def bound_terms(self, x: Tensor, cond: Cond, rngs: ImageRngs, n_levels: int) -> dict[str, Tensor]:
        """What `diffusion.bound.bound_terms` gives of images, as `nll` takes them, by so many drawn levels."""

    def nll(self, x: Tensor, cond: Cond, rngs: ImageRngs) -> Tensor:
        terms = self.bound_terms(x, cond, rngs, self.drawn_levels)
        return (terms["prior"] + terms["steps"].sum(1) + terms["image"]).float()


def takes(part: object, kind: type, key: str, owner: type) -> None:
    """Raises UserError where the part that a family was given as `key` (`.generator`) is of another kind than its own.

    Args:
        part: object that was given.
        kind: class of what the family takes.
        key: name of the argument, relative to the family.
        owner: class of the family.
    """
    if not isinstance(part, kind):
        fix = f"{key}._target_={kind.__module__}.{kind.__name__}"
        raise UserError(f"{key}._target_", type(part).__name__, f"{owner.__name__} takes a {kind.__name__}", fix)
