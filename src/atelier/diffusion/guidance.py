"""Wrappers around a denoiser that make (x_t, t) -> denoised of it: with a condition, cut to the range of pixels."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from atelier.core.batch import Cond
from atelier.core.classifier import GuidingClassifier
from atelier.core.condition import Condition
from atelier.core.errors import UserError
from atelier.core.precision import float32
from atelier.core.ranges import NonNegFloat, Probability, Span
from atelier.diffusion.schedules import FAINTEST, Schedule

Denoise = Callable[[Tensor, Tensor], Tensor]
ConditionalDenoise = Callable[[Tensor, Tensor, Condition], Tensor]


@dataclass(frozen=True, eq=False)
class Asked:
    """What B samples are asked for, and what a guider may look at.

    Args:
        known: condition of each, as the net takes it.
        null: condition of B samples of which nothing is known.
        named: condition by name, as a request gives it.
        schedule: for the noise level of a time.
    """

    known: Condition
    null: Condition
    named: Cond
    schedule: Schedule


@dataclass(frozen=True, kw_only=True)
class Guider(ABC):
    """How a condition enters sampling. `guidance`: how strongly; what 0 and 1 mean, each guider says.

    `needs_grad`: whether its denoiser enables gradients, as that of a classifier's guidance does. `conditions`: names
    that it looks at itself, whether or not the net takes them.
    """

    needs_grad: ClassVar[bool] = False
    conditions: ClassVar[tuple[str, ...]] = ()
    guidance: NonNegFloat = field(repr=False)  # a protocol gives the one that was asked for beside it

    @abstractmethod
    def __call__(self, denoise: ConditionalDenoise, asked: Asked) -> Denoise:
        """The denoiser of the B samples that are asked for.

        A guider may also ask with some fields of the condition alone, as `replace(null, planes=known.planes)`.

        Args:
            denoise: (x_t, t, cond) -> denoised, and v behind it in as many channels where the variance is learned.
            asked: conditions of the samples.
        """

    def fits(self, net: Any) -> None:  # noqa: B027
        """Raises UserError where it cannot guide a net, which says its `shape`."""


@dataclass(frozen=True, kw_only=True)
class ClassifierFree(Guider):
    """D = D_u + g (D_c - D_u)   (Ho & Salimans 2022, eq. 6, g = 1 + w).

    Guidance 1 is off: the net is called with the condition alone; otherwise once with both halves. 0 is without
    condition. Where the variance is learned, v goes from that of D_u to that of D_c, which it has from guidance 1 on.

    Args:
        interval: sigma / alpha above the first and up to the second, where guidance is on; elsewhere D = D_c in one
            plain call (Kynkäänniemi et al. 2024, eq. 5); None: everywhere.
        rescale: share phi of the way to a deviation of the guided v, over all values of an image, that is D_c's own
            (Lin et al. 2024, Common Diffusion Noise Schedules are Flawed, eq. 15-16); 0: none.

    Raises:
        UserError: the interval is empty.
    """

    interval: Span | None = None
    rescale: Probability = 0.0

    def __post_init__(self) -> None:
        if self.interval is not None and self.interval[0] >= self.interval[1]:
            low, high = self.interval
            fix = ".interval=null" if low == high else f".interval=[{high:g},{low:g}]"
            raise UserError(".interval", self.interval, "no noise level lies in it", fix)

    def __call__(self, denoise: ConditionalDenoise, asked: Asked) -> Denoise:
        if self.guidance == 1:
            return lambda x_t, t: denoise(x_t, t, asked.known)
        if self.guidance == 0 and self.interval is None and self.rescale == 0:
            return lambda x_t, t: denoise(x_t, t, asked.null)
        both = asked.null.cat(asked.known)

        def guided(x_t: Tensor, t: Tensor) -> Tensor:
            inside = self._inside(t, asked.schedule)
            if inside is not None and not inside.any():
                return denoise(x_t, t, asked.known)
            free, known = denoise(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
            made = self._between(free, known, x_t, t, asked.schedule)
            return made if inside is None else torch.where(inside.view(-1, 1, 1, 1), made, known)

        return guided

    def _inside(self, t: Tensor, schedule: Schedule) -> Tensor | None:
        """Whether guidance is on at times (B,), (B,) bool; None: it always is."""
        if self.interval is None:
            return None
        noise = (-schedule.logsnr(t) / 2).exp()  # (B,), sigma / alpha
        return (noise > self.interval[0]) & (noise <= self.interval[1])

    def _between(self, free: Tensor, known: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
        """What both answers (B, C or 2 C, H, W) make together."""
        n = x_t.shape[1]
        image = free[:, :n] + self.guidance * (known - free)[:, :n]  # (B, C, H, W)
        if self.rescale > 0:
            image = rescaled(image, known[:, :n], x_t, schedule.pair(t, like=x_t), self.rescale)
        return torch.cat([image, torch.lerp(free[:, n:], known[:, n:], min(self.guidance, 1.0))], dim=1)


@dataclass(frozen=True, kw_only=True)
class Dual(Guider):
    """D = D(0, 0) + g_I (D(I, 0) - D(0, 0)) + g_T (D(I, T) - D(I, 0))   (Brooks et al. 2023, InstructPix2Pix, eq. 3).

    I are the planes, `image_guidance` is g_I; T is all else, `guidance` is g_T. Both 1: off, one plain call. Where the
    variance is learned, v is that of D(I, T).

    Raises:
        UserError: the net sees no planes.
    """

    image_guidance: NonNegFloat

    def fits(self, net: Any) -> None:
        if "planes" not in net.cond_sizes:
            problem = f"{type(net).__name__} of this run sees no image beside what it denoises"
            raise UserError(".guider.image_guidance", self.image_guidance, problem, "guider=classifier_free")

    def __call__(self, denoise: ConditionalDenoise, asked: Asked) -> Denoise:
        if self.guidance == self.image_guidance == 1:
            return lambda x_t, t: denoise(x_t, t, asked.known)
        shown = replace(asked.null, planes=asked.known.planes)
        all_three = asked.null.cat(shown).cat(asked.known)

        def guided(x_t: Tensor, t: Tensor) -> Tensor:
            free, image, both = denoise(torch.cat([x_t] * 3), torch.cat([t] * 3), all_three).chunk(3)
            n = x_t.shape[1]
            towards_image, towards_both = (image - free)[:, :n], (both - image)[:, :n]
            made = free[:, :n] + self.image_guidance * towards_image + self.guidance * towards_both
            return torch.cat([made, both[:, n:]], dim=1)

        return guided


def rescaled(image: Tensor, like: Tensor, x_t: Tensor, level: tuple[Tensor, Tensor], share: float) -> Tensor:
    """A guided image (B, C, H, W) whose v is brought towards the deviation that the v of `like` has.

    v is that of Salimans & Ho 2022 with x_t divided so that alpha^2 + sigma^2 = 1, which makes it the same on every
    schedule: v = (alpha x_t - D) / sigma, D = alpha x_t - sigma v. At pure noise it is -D.

    Args:
        image: denoised image that guidance gave.
        like: denoised image under the condition alone.
        x_t: noisy image.
        level: alpha and sigma, (B, 1, 1, 1) each.
        share: phi in [0, 1] of Lin et al. 2024, eq. 16.
    """
    length = (level[0] ** 2 + level[1] ** 2).sqrt()
    alpha, sigma, x_t = level[0] / length, level[1] / length, x_t / length
    v, wanted = ((alpha * x_t - denoised) / sigma for denoised in (image, like))
    ratio = wanted.std(dim=(1, 2, 3), keepdim=True) / v.std(dim=(1, 2, 3), keepdim=True)
    return alpha * x_t - sigma * v * (share * ratio + 1 - share)


@dataclass(frozen=True, kw_only=True)
class ByClassifier(Guider):
    """D = D(x_t, c) + g (sigma^2 / alpha) grad log p(label | x_t)   (Dhariwal & Nichol 2021, ADM, algorithm 2).

    Guidance 0 is off. With an unconditional net, 1 is the condition itself, as exactly as the classifier is; a
    conditional net has its condition and this comes on top. Where the variance is learned, v stays the net's.

    The classifier is asked about x_t at its own time of the same log-SNR, x_t scaled to its own schedule. Where x_t is
    noisier than anything that it was trained on, or sigma / alpha is above 80, it is not asked, and D is the net's.

    Args:
        classifier: judge of noisy images, trained on a schedule of its own.

    Raises:
        UserError: the part is no classifier.
    """

    needs_grad: ClassVar[bool] = True
    conditions: ClassVar[tuple[str, ...]] = ("label",)
    classifier: GuidingClassifier

    def __post_init__(self) -> None:
        if not isinstance(self.classifier, GuidingClassifier):
            name, fix = type(self.classifier).__name__, ".classifier.run=DIR of a run of model=noisy_classifier"
            raise UserError(".classifier", name, "it tells no labels of noisy images", fix)
        self.classifier.eval().requires_grad_(False)

    def fits(self, net: Any) -> None:
        if tuple(net.shape) != tuple(self.classifier.shape):
            seen, shape = "x".join(map(str, self.classifier.shape)), "x".join(map(str, net.shape))
            problem = f"it was trained on images {seen}, the model denoises {shape}"
            raise UserError(".guider.classifier", seen, problem, f"a classifier of {shape}, or guidance without one")

    def __call__(self, denoise: ConditionalDenoise, asked: Asked) -> Denoise:
        if self.guidance == 0:
            return lambda x_t, t: denoise(x_t, t, asked.known)

        label = asked.named["label"]
        classifier = self.classifier.to(label.device)

        def guided(x_t: Tensor, t: Tensor) -> Tensor:
            told, n = denoise(x_t, t, asked.known), x_t.shape[1]
            image = told[:, :n] + self.guidance * towards(classifier, x_t, t, label, asked.schedule)
            return torch.cat([image, told[:, n:]], dim=1)

        return guided


def towards(classifier: GuidingClassifier, x_t: Tensor, t: Tensor, label: Tensor, schedule: Schedule) -> Tensor:
    """(sigma^2 / alpha) grad log p(label | x_t), (B, C, H, W); 0 where the classifier cannot be asked.

    Args:
        classifier: judge of noisy images.
        x_t: noisy images (B, C, H, W) on `schedule`.
        t: times of them, (B,) float64.
        label: labels asked for, (B,) int64.
        schedule: schedule of x_t.
    """
    own, logsnr = classifier.schedule, schedule.logsnr(t)
    noisiest = own.logsnr(torch.ones_like(t)).clamp(min=-2 * math.log(FAINTEST))
    asked = logsnr >= noisiest - 1e-6  # (B,)
    time = own.time(torch.where(asked, logsnr, noisiest))  # (B,)
    (alpha, sigma), (alpha_own, sigma_own) = schedule.pair(t, like=x_t), own.pair(time, like=x_t)
    scale = ((alpha_own**2 + sigma_own**2) / (alpha**2 + sigma**2)).sqrt()
    with torch.enable_grad(), float32(x_t.device):
        x = (scale * x_t).detach().requires_grad_()
        (slope,) = torch.autograd.grad(classifier.log_probability(x, time, label).sum(), x)
    way = sigma**2 / alpha * scale * slope  # (B, C, H, W)
    return torch.where(asked.view(-1, 1, 1, 1), way, torch.zeros_like(way))


def logits_of(net: Callable[[Tensor, Tensor], Tensor], schedule: Schedule, x_t: Tensor, t: Tensor) -> Tensor:
    """What a classifier's net says of x_t (B, C, H, W) at times t (B,), (B, L) float32."""
    scale = schedule.input_scale(t).to(x_t.dtype).view(-1, 1, 1, 1)
    return net(scale * x_t, schedule.net_time(t)).float()


class TrainedClassifier(nn.Module):
    """What a finished classifier of noisy images lends to guiders: schedule and net as one.

    Args:
        schedule: schedule that the net was trained on.
        net: (x, time) -> logits, with a `shape`, `n_classes` and `log_probability` of logits.
    """

    def __init__(self, schedule: Schedule, net: nn.Module) -> None:
        super().__init__()
        self.schedule, self.net, self.shape, self.n_classes = schedule, net, net.shape, net.n_classes

    def log_probability(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """log p(label | x_t), (B,) float32: x_t (B, C, H, W) on its schedule, t (B,) in (0, 1], label (B,) int64."""
        return self.net.log_probability(logits_of(self.net, self.schedule, x_t, t), label)

    def __repr__(self) -> str:
        """Which weights these are, as a protocol tells it."""
        content = hashlib.sha256()
        for name, weight in self.net.state_dict().items():
            content.update(name.encode() + weight.cpu().contiguous().numpy().tobytes())
        return f"{type(self).__name__}({content.hexdigest()[:12]})"


def clipped(denoise: Denoise) -> Denoise:
    """Denoised images cut to [-1, 1], where pixels lie (Ho et al. 2020, DDPM); never for latents."""

    def cut(x_t: Tensor, t: Tensor) -> Tensor:
        estimate, n = denoise(x_t, t), x_t.shape[1]
        return torch.cat([estimate[:, :n].clamp(-1, 1), estimate[:, n:]], dim=1)

    return cut
