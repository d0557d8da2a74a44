"""What every family can be asked: the verbs, and no training logic."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from atelier.core.batch import Batch, Cond, each
from atelier.core.errors import UserError
from atelier.core.ranges import NonNegFloat
from atelier.core.rng import ImageRngs
from atelier.nets.contracts import FirstStage
from atelier.nets.frozen import Frozen, halved
from atelier.nets.widening import widened


class Model(LightningModule, ABC):
    """Whatever is trained here; what also makes images is a `Generator`.

    `training_step` is the family. Everything else that entry points and callbacks ask of it is here: `idea` (the family
    in two sentences), `formula` (its loss, a line for each player, whose losses l_G and l_D are those of `loss`),
    `needs` (Batch fields it trains on beside image), `ema_nets` (attribute names of the nets under EMA), `ddp_options`
    (arguments of DDPStrategy), `divergence_limits` (reported name -> size beyond which training has diverged and is
    stopped), `needs_double_backward` (whether training goes backward through a gradient of an averaged net, which no
    compiled net can), `takes_pieces` (whether its loss is a mean over images, so that a batch may be taken in pieces),
    `grad_clip` (global norm, None = off), `optimizer` (parameters -> optimizer).
    """

    idea: ClassVar[str]
    formula: ClassVar[str]
    needs: frozenset[str] = frozenset()
    ema_nets: ClassVar[tuple[str, ...]]
    ddp_options: ClassVar[dict[str, bool]] = {}
    divergence_limits: ClassVar[dict[str, float]] = {}
    needs_double_backward: ClassVar[bool] = False
    takes_pieces: ClassVar[bool] = False
    grad_clip: float | None = None
    optimizer: Callable
    given: frozenset[str] = frozenset()  # names of weights that adapters are trained on, which no checkpoint holds
    takes_adapters: ClassVar[bool] = False  # whether `adapt` puts some on its `net` and its `embedder`
    calibrated: bool = False  # whether what `calibrate` measures came with weights that it began with
    images_seen: int = 0  # the clock writes it before each batch: what scheduled weights are functions of

    def __init__(self) -> None:
        super().__init__()
        self.reported: dict[str, Tensor] = {}
        self.averages: dict[str, nn.Module] = {}  # the EMA's, of the first half-life; in a dict they are no submodules

    @property
    def kind(self) -> str:
        """What it is called where a run is announced."""
        return type(self).__name__

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

    def halve_frozen(self) -> list[str]:
        """Hold in bf16 what training does not change: encoders of the condition, nets below adapters; gives the layers.

        The first stage stays in float32: in bf16 taef2's images are off by half a grey level, some pixels by 14.
        """
        return [name for net in self._nets_and_encoders() for name in halved(net)]

    def frozen_weights(self) -> list[Tensor]:
        """The weights that `halve_frozen` is about: of those nets and encoders, the ones without gradients."""
        return [weight for net in self._nets_and_encoders() for weight in net.parameters() if not weight.requires_grad]

    def _nets_and_encoders(self) -> list[nn.Module]:
        nets = [getattr(self, name) for name in self.ema_nets]
        return nets + [part.net for net in nets for part in net.modules() if isinstance(part, Frozen)]

    def configure_optimizers(self) -> Optimizer | list[Optimizer]:
        return self.optimizer(list(self.trained().values()))

    def refuse_long(self, name: str, texts: list[str], key: str) -> None:
        """Raises UserError where texts of a Batch field, from the option `key`, are longer than what is read of them.

        What reads none passes.
        """

    def begin_with(self, state: dict[str, Tensor], key: str) -> None:
        """Take the weights of a model that is like this one, but for planes that its net did not see: those begin at 0.

        Raises:
            UserError: it is not, `key` being the option that named it.
        """
        self.load_state_dict(widened(state, self, key))
        self.calibrated = True

    def kept_state(self) -> dict[str, Tensor]:
        """All weights and buffers but those that are `given`."""
        return {name: value for name, value in self.state_dict().items() if name not in self.given}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Load what `kept_state` gave. Raises RuntimeError where it is of another model."""
        self.load_state_dict(self._with_given(state))

    def _with_given(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        own = self.state_dict() if self.given else {}
        return {name: own[name] for name in self.given} | state

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = self.kept_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = self._with_given(checkpoint["state_dict"])

    def to_full_size(self) -> bool:
        """Have training go on with images of full size where it begins with smaller ones; gives whether it does."""
        return False

    def part(self) -> nn.Module:
        """What of it a model gets that stands on a finished run of it (`nets/contracts.py`)."""
        return getattr(self, self.ema_nets[0])

    def calibrate(self, images: Callable[[int], Iterable[Tensor]]) -> str:
        """Set what is measured of training images, before the first batch, and then kept; gives a line about it, or "".

        Args:
            images: number of training images -> this rank's share of so many, in batches (B, C, H, W), not augmented.
        """
        return ""

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


@runtime_checkable
class SeesAttributes(Protocol):
    """A model that tells what attributes an image has."""

    def attributes_of(self, x: Tensor) -> Tensor:
        """(B, A) float32, 0 or 1, of images (B, C, H, W) in [-1, 1] of the size that it was trained on."""
        ...


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
        """What is known of each image by name, (B, ...); all noise from `rngs`."""

    def concluded(self, facts: dict[str, Tensor]) -> dict[str, float]:
        """Figure -> its value, of what `examined` said of all images, (N, ...) by name, in their order.

        It is the mean of what has the name of the figure, unless a family compares images with one another.
        """
        return {name: facts[name].double().mean().item() for name in self.figures}


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
