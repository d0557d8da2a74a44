"""What a diffusion model makes of held-out images beside training images: each number with its 95 % interval."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from atelier.core.ranks import many, summed
from atelier.core.rng import ImageRngs
from atelier.data.base import DataModule
from atelier.evaluation.gathering import Parts, Progress, read
from atelier.evaluation.reconstruction import Context
from atelier.images.pixels import to_uint8
from atelier.metrics.memorisation import Z, nearer, nearest, thumbnails
from atelier.models.diffusion_model import DiffusionModel

LOOKED_AT = 16  # training images of which thumbnails are made, for each image that is denoised


class Estimate(NamedTuple):
    """A number and half of its 95 % interval."""

    value: float
    half_width: float


def estimate(values: Tensor) -> Estimate:
    """The mean of what was found of each image, (N,)."""
    return Estimate(values.mean().item(), Z * (values.var() / len(values)).sqrt().item())


def logarithm(errors: Tensor) -> tuple[float, Tensor]:
    """ln of the geometric mean of all bins' mean errors (n, bins), and what each image adds to its deviation, (n,).

    So each bin counts alike, though errors are a thousand times as large in one as in another. The second is the
    influence of an image (the delta method): the deviation of its mean is that of the first.
    """
    means = errors.mean(0).clamp(min=1e-12)
    return means.log().mean().item(), (errors / means).mean(1)


def count(data: DataModule, n: int) -> int:
    """How many images of each split `n` are: no fewer than ranks, no more than there are."""
    least = dist.get_world_size() if many() else 1
    return min(max(n, least), data.n_train, len(data.split("test")))


def denoised(
    model: DiffusionModel,
    data: DataModule,
    seed: int,
    n: int,
    batch_size: int,
    context: Context,
    progress: Progress,
) -> dict[str, Estimate]:
    """Errors of n held-out and n training images under the same noise, and what the true conditions gain.

    Training images are taken as they are, without augmentation. Errors are told as shares of those of the best linear
    guess of each pixel from itself, whose variance is that of the training images. `gap` is ln of the held-out loss
    over the training loss, `condition_gain` ln of the loss under exchanged conditions over the one under the true ones.

    Args:
        model: model in eval mode, holding the weights to measure.
        seed: seed of noise and noise levels, which are the same for any weights, ranks and batches.
    """
    variance = _variance(model, data, n, batch_size, context)
    found, logs = {}, {}
    for split, name in (("test", "heldout"), ("train", "training")):
        facts = _errors(model, data, split, seed, n, batch_size, context, progress)
        scale = model.linear_errors(variance, facts.pop("logsnr"))
        own = facts["own"] / scale
        found |= {f"{name}/logsnr_{c}": estimate(e) for c, e in zip(model.noise_bins(), own.T, strict=True)}
        logs |= {f"{name}/{kind}": logarithm(errors / scale) for kind, errors in facts.items()}
        found[f"{name}/loss"] = _exponential(*logs[f"{name}/own"])
    (held, images), (trained, others) = logs["heldout/own"], logs["training/own"]
    width = (estimate(images).half_width ** 2 + estimate(others).half_width ** 2) ** 0.5
    found["gap"] = Estimate(held - trained, width)
    if "heldout/exchanged" in logs:
        other, exchanged = logs["heldout/exchanged"]
        found["condition_gain"] = Estimate(other - held, estimate(exchanged - images).half_width)
    return found


def _exponential(log: float, influence: Tensor) -> Estimate:
    return Estimate(math.exp(log), math.exp(log) * estimate(influence).half_width)


def _variance(model: DiffusionModel, data: DataModule, n: int, batch_size: int, context: Context) -> Tensor:
    """Of each number of what the model denoises over n training images of all ranks, (C, H, W) float64 on the CPU."""
    sums = []
    for _, batch in read(data, "train", n, batch_size, "", lambda *_: None):
        with context():
            z = model.encode(batch["image"].to(model.device)).double()
        sums.append(torch.stack([z.sum(0), z.square().sum(0)]))
    first, second = summed(torch.stack(sums).sum(0)).cpu() / n
    return (second - first**2).clamp(min=0) * (n / max(1, n - 1))


def _errors(
    model: DiffusionModel,
    data: DataModule,
    split: str,
    seed: int,
    n: int,
    batch_size: int,
    context: Context,
    progress: Progress,
) -> dict[str, Tensor]:
    """`own` errors in each bin and the `logsnr` they are of, (n, bins), on all ranks.

    Of held-out images under conditions also the errors `exchanged`: under the condition of the next image.
    """
    parts = Parts()
    for numbers, batch in read(data, split, n, batch_size, f"denoised {split} images", progress):
        rngs, cond = ImageRngs(seed, numbers.start, len(numbers)), model.condition(batch, "")
        with context():
            z = model.encode(batch["image"].to(model.device))
            own, logsnr = model.denoising_errors(z, cond, rngs)
            facts = {"own": own, "logsnr": logsnr}
            if split == "test" and model.embedder.conditions:
                following = data.chosen("test", [(k + 1) % n for k in numbers])
                other = model.condition(following, "")
                facts["exchanged"], _ = model.denoising_errors(z, other, rngs.again())
        parts.add(numbers, facts)
    return parts.gathered()


def memorised(samples: Tensor, heldout: Tensor, training: Tensor) -> Estimate:
    """Whether samples lie nearer to training images than held-out images do: 0.5 where not, 1 where all do.

    Args:
        samples, heldout, training: features (N, D), (M, D), (K, D) of each.
    """
    return Estimate(*nearer(nearest(samples, training), nearest(heldout[: len(samples)], training)))


def thumbnails_of(data: DataModule, split: str, n: int, batch_size: int, progress: Progress) -> Tensor:
    """Thumbnails (n, D) of a split's chosen images on all ranks; where training mirrors them, mirrored ones behind."""
    mirrored = split == "train" and data.flip
    parts = Parts()
    for numbers, batch in read(data, split, n, 4 * batch_size, f"{split} images", progress):
        images = to_uint8(batch["image"])
        kinds = {"own": images} | ({"mirrored": images.flip(-1)} if mirrored else {})
        parts.add(numbers, {name: thumbnails(kind) for name, kind in kinds.items()})
    return torch.cat(list(parts.gathered().values()))
