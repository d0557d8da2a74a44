"""How near the results of a translator come to what their sources should have become, where the set knows it."""

from __future__ import annotations

from torch import Tensor

from atelier.core.batch import Batch
from atelier.images.bicubic import enlarged
from atelier.images.pixels import to_float, to_uint8
from atelier.metrics.image import WINDOW, crop_border, luma, psnr, ssim
from atelier.metrics.shapes import answer_values
from atelier.metrics.suite import Suite
from atelier.models.base import Cond, Generator
from atelier.shapes.judge import Verdict, judge

PAIR = "pair/"


def compared(
    model: Generator, images: Tensor, cond: Cond, batch: Batch, case: str, judged: bool, suite: Suite
) -> dict[str, Tensor]:
    """Facts about results (N, C, H, W) uint8 beside their answers, one row for each; none where there are none.

    Where results are larger than sources, also of their luma and of what a bicubic enlargement makes of the sources,
    all without a border of as many pixels as the factor (the protocol of super-resolution).
    """
    answer = model.answer(batch, case)
    if answer is None:
        return {}
    source, target = cond[model.source_fields[case]], to_uint8(answer).to(images.device)
    facts = distances("", images, target, model.scale_factor)
    if suite.lpips is not None:
        facts["pair/lpips"] = suite.lpips(to_float(images), to_float(target))
    if model.scale_factor > 1:
        facts |= distances("bicubic_", to_uint8(enlarged(source, model.scale_factor)), target, model.scale_factor)
    if judged:
        facts |= judge(answer.cpu()).rows("answer/")
        facts |= judge(source.cpu()).rows("before/") if model.same_domain else {}
    return facts


def distances(prefix: str, images: Tensor, target: Tensor, scale_factor: int) -> dict[str, Tensor]:
    """PSNR and SSIM of uint8 pairs, (N,) each; from factor 2 up of their luma too, without a border so wide."""
    border = scale_factor if scale_factor > 1 else 0
    a, b = crop_border(images, border), crop_border(target, border)
    kinds = {"": (a, b)} | ({"_y": (luma(a), luma(b))} if scale_factor > 1 else {})
    facts = {f"{PAIR}{prefix}psnr{kind}": psnr(*pair) for kind, pair in kinds.items()}
    if min(a.shape[2:]) >= WINDOW:
        facts |= {f"{PAIR}{prefix}ssim{kind}": ssim(*pair, inside=True) for kind, pair in kinds.items()}
    return facts


def values(facts: dict[str, Tensor], image_size: int) -> dict[str, float]:
    """Means of gathered facts, and what the judge says of the results beside their answers."""
    found = {name: fact.mean().item() for name, fact in facts.items() if name.startswith(PAIR)}
    verdict, answer, before = (Verdict.of(facts, group) for group in ("verdict/", "answer/", "before/"))
    if verdict is None or answer is None:
        return found
    return found | answer_values(verdict, answer, before, image_size)
