"""The judge of the shapes world as metrics: is it a scene, is it what was asked, do the samples differ."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from atelier.judge import BORDER, RMS, Verdict, coverage, duplicates, least_iou
from atelier.world import ATTRIBUTES, COLOURS, COUNTS, FILLS, SHAPES, SIZES


def judge_values(verdict: Verdict, asked: dict[str, Tensor] | None, images: Tensor) -> dict[str, float]:
    """The judge's figures for N samples.

    Of all samples: `judge/valid` and `judge/loose` are the shares of scenes and of near scenes,
    `judge/duplicates` the share with another sample nearer than 2 grey levels rms. Of the 36 labels:
    `judge/coverage` is the share seen among the valid samples. Of the valid samples alone (nan where there
    are none): `judge/label` is the share whose shape and colour are both those asked for, `judge/shape`,
    `judge/colour`, `judge/size`, `judge/fill` and `judge/ground` the shares in which this attribute is the
    one asked for; those that were not asked for are absent.

    Args:
        verdict: of the samples.
        asked: `label` (N,), which asks for shape and colour, and `attributes` (N, 14), which asks for colour,
            size, fill and ground; either, both, or None.
        images: the samples, (N, 3, S, S) in [-1, 1].
    """
    values = {
        "judge/valid": _share(verdict.valid),
        "judge/loose": _share(verdict.loose),
        "judge/coverage": coverage(verdict),
        "judge/duplicates": duplicates(images),
    }
    wanted = wishes(asked or {})
    right = {name: (getattr(verdict, name).cpu() == value)[verdict.valid.cpu()] for name, value in wanted.items()}
    if "shape" in right:
        values["judge/label"] = _share(right["shape"] & right["colour"])
    return values | {f"judge/{name}": _share(hits) for name, hits in right.items()}


def answer_values(verdict: Verdict, answer: Verdict, before: Verdict | None, image_size: int) -> dict[str, float]:
    """How often N results are what their sources should have become; shares of all of them, valid or not.

    `answer/<attribute>` and `answer/place` (the centre within a pixel) are the shares that are as in the answer,
    `answer/all` those with all of it. Where the sources are scenes too, `answer/changed` is the share in which every
    attribute that had to change is right, `answer/kept` the share in which all others and the place are.

    Args:
        verdict, answer, before: of the results, of what they should be, of the sources; None: no scenes.
        image_size: of the results, in pixels.
    """
    right = {name: getattr(verdict, name) == getattr(answer, name) for name in ATTRIBUTES}
    far = torch.hypot(verdict.cx - answer.cx, verdict.cy - answer.cy)
    right["place"] = far <= 2 / image_size
    told = torch.stack(list(right.values()), dim=1)  # (N, 6)
    values = {f"answer/{name}": _share(hits) for name, hits in right.items()} | {"answer/all": _share(told.all(1))}
    if before is None:
        return values
    changes = torch.stack([getattr(before, name) != getattr(answer, name) for name in ATTRIBUTES], dim=1)
    changes = torch.cat([changes, torch.zeros_like(changes[:, :1])], dim=1)  # a place is never to change
    values["answer/changed"] = _share((told | ~changes).all(1))
    return values | {"answer/kept": _share((told | changes).all(1))}


def wishes(asked: dict[str, Tensor]) -> dict[str, Tensor]:
    """Attribute numbers (N,) that a condition asks for, by name; the label's colour stands."""
    wanted: dict[str, Tensor] = {}
    if "attributes" in asked:
        parts = asked["attributes"].cpu().split(COUNTS[1:], dim=1)
        wanted |= {name: part.argmax(1) for name, part in zip(ATTRIBUTES[1:], parts, strict=True)}
    if "label" in asked:
        label = asked["label"].cpu()
        wanted |= {"shape": label // len(COLOURS), "colour": label % len(COLOURS)}
    return wanted


def reasons(verdict: Verdict, image_size: int) -> list[tuple[str, int, int]]:
    """Why samples were refused and which are valid: rows of (what, how many, of how many).

    `refused: border`, `refused: iou` and `refused: rms` count all samples that fail this test (one may fail
    several); `valid: <shape>`, `valid: <size>` and `valid: <fill>` count the valid among those in which the
    judge saw it.
    """
    failed = {
        "border": verdict.border < BORDER,
        "iou": verdict.iou < least_iou(image_size),
        "rms": verdict.rms > RMS,
    }
    rows = [(f"refused: {name}", int(bad.sum()), len(verdict)) for name, bad in failed.items()]
    for names, seen in ((SHAPES, verdict.shape), (SIZES, verdict.size), (FILLS, verdict.fill)):
        for number, name in enumerate(names):
            here = seen == number
            rows.append((f"valid: {name}", int((verdict.valid & here).sum()), int(here.sum())))
    return rows


def wilson(k: int, n: int) -> tuple[float, float]:
    """95 % interval of a probability that came true in k of n trials (Wilson 1927); (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    z = 1.959963984540054
    centre, spread = k + z * z / 2, z * math.sqrt(k * (n - k) / n + z * z / 4)
    return max(0.0, (centre - spread) / (n + z * z)), min(1.0, (centre + spread) / (n + z * z))


def _share(hits: Tensor) -> float:
    return hits.double().mean().item() if len(hits) else math.nan
