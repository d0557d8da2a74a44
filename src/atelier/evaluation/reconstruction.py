"""What a model makes of the test images themselves: gives back, finds probable, says of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import Tensor

from atelier.core.rng import ImageRngs
from atelier.data.base import DataModule
from atelier.evaluation.gathering import Parts, Progress, read
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
    for numbers, batch in read(data, "test", n, batch_size, "reconstructions", progress):
        x = batch["image"].to(model.device)
        with context():
            back = model.decode(model.encode(x))
            codes = {"codes": model.codes(x).flatten(1)} if isinstance(model, DiscreteAutoencoder) else {}
        parts.add(numbers, _compared(to_uint8(back), to_uint8(x), data.judged, suite) | codes)
    facts = parts.gathered()
    values = {
        f"recon/{name}": facts[name].mean().item() for name in ("psnr", "ssim", "lpips", "valid") if name in facts
    }
    if real is not None:
        values |= {f"recon/{name}": v for name, v in suite.compare(real, facts["features"]).items()}
    if isinstance(model, DiscreteAutoencoder):
        values |= code_values(facts["codes"], model.n_codes)
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
    parts = Parts()
    for numbers, batch in read(data, "test", n, batch_size, "likelihood", progress):
        x = batch["image"].to(model.device)
        with context():
            nats = model.nll(x, model.condition(batch, ""), rngs(numbers.start, len(numbers)))
        parts.add(numbers, {"nll": nats.double()})
    nll = parts.gathered()["nll"].mean().item()
    return {"nll": nll, "bpd": nll / (x[0].numel() * math.log(2))}


def examined(
    model: Examined,
    data: DataModule,
    rngs: Callable[[int, int], ImageRngs],
    n: int,
    batch_size: int,
    context: Context,
    progress: Progress,
) -> dict[str, float]:
    """The model's figures, each a mean over the n chosen test images."""
    parts = Parts()
    for numbers, batch in read(data, "test", n, batch_size, "test images", progress):
        with context():
            found = model.examined(batch, rngs(numbers.start, len(numbers)))
        parts.add(numbers, {name: value.double() for name, value in found.items()})
    facts = parts.gathered()
    return {name: facts[name].mean().item() for name in model.figures}
