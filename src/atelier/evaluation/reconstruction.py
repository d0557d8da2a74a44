"""What a model makes of the test images themselves: gives back, finds probable, says of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import Tensor

from atelier.core.batch import Batch
from atelier.core.rng import ImageRngs
from atelier.data.base import DataModule
from atelier.evaluation.gathering import Parts, Progress, in_halves, read
from atelier.images.pixels import to_float, to_uint8
from atelier.metrics.image import code_values, psnr, ssim
from atelier.metrics.suite import Suite
from atelier.models.base import Autoencoder, DiscreteAutoencoder, Examined, Likelihood
from atelier.shapes.judge import judge

Context = Callable[[], AbstractContextManager]


def reconstructed(
    model: Autoencoder,
    data: DataModule,
    suite: Suite,
    real: Tensor | None,
    n: int,
    batch_size: int,
    context: Context,
    progress: Progress,
) -> dict[str, float]:
    """How near the n chosen test images come back that the model encodes to the mode and decodes.

    Args:
        real: features of these images (n, D), for the distances; None: there are none.
    """
    parts = Parts()

    def facts(batch: Batch, rngs: ImageRngs) -> dict[str, Tensor]:
        x = batch["image"].to(model.device)
        with context():
            back = model.decode(model.encode(x))
            codes = {"codes": model.codes(x).flatten(1)} if isinstance(model, DiscreteAutoencoder) else {}
        return _compared(to_uint8(back), to_uint8(x), data.judged, suite) | codes

    for numbers, batch in read(data, "test", n, batch_size, "reconstructions", progress):
        parts.add(numbers, in_halves(facts, batch, ImageRngs(0, numbers.start, len(numbers))))  # which draw nothing
    found = parts.gathered()
    values = {
        f"recon/{name}": found[name].mean().item() for name in ("psnr", "ssim", "lpips", "valid") if name in found
    }
    if real is not None:
        values |= {f"recon/{name}": v for name, v in suite.compare(real, found["features"]).items()}
    if isinstance(model, DiscreteAutoencoder):
        values |= code_values(found["codes"], model.n_codes)
    return values


def _compared(given: Tensor, real: Tensor, judged: bool, suite: Suite) -> dict[str, Tensor]:
    facts = {"psnr": psnr(given, real), "ssim": ssim(given, real)}
    if judged:
        facts["valid"] = judge(to_float(given.cpu())).valid.double()
    if suite.lpips is not None:
        facts["lpips"] = suite.lpips(to_float(given), to_float(real))
    if suite.active:
        facts["features"] = suite.features(given)
    return facts


def likelihood(
    model: Likelihood,
    data: DataModule,
    rngs: Callable[[int, int], ImageRngs],
    n: int,
    batch_size: int,
    context: Context,
    progress: Progress,
) -> dict[str, float]:
    """Mean -log p of the n chosen test images: `nll` in nats an image, `bpd` in bits a dimension."""

    def facts(batch: Batch, rngs: ImageRngs) -> dict[str, Tensor]:
        x = batch["image"].to(model.device)
        nats = model.nll(x, model.condition(batch, ""), rngs).double()  # (B,)
        return {"nll": nats, "bpd": nats / (x[0].numel() * math.log(2))}

    found = _facts(facts, data, rngs, n, batch_size, context, "likelihood", progress)
    return {name: values.mean().item() for name, values in found.items()}


def examined(
    model: Examined,
    data: DataModule,
    rngs: Callable[[int, int], ImageRngs],
    n: int,
    batch_size: int,
    context: Context,
    progress: Progress,
) -> dict[str, float]:
    """The model's figures of the n chosen test images."""
    found = model.concluded(_facts(model.examined, data, rngs, n, batch_size, context, "test images", progress))
    return {name: found[name] for name in model.figures}


def _facts(
    facts: Callable[[Batch, ImageRngs], dict[str, Tensor]],
    data: DataModule,
    rngs: Callable[[int, int], ImageRngs],
    n: int,
    batch_size: int,
    context: Context,
    what: str,
    progress: Progress,
) -> dict[str, Tensor]:
    """What `facts` says of each of a batch of the n chosen test images, (B, ...) by name, of all ranks, in order."""
    parts = Parts()
    for numbers, batch in read(data, "test", n, batch_size, what, progress):
        with context():
            found = in_halves(facts, batch, rngs(numbers.start, len(numbers)))
        parts.add(numbers, found)
    return parts.gathered()
