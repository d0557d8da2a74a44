"""The judge of the shapes world as metrics: is it a scene, is it what was asked, do the samples differ."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from atelier.metrics.distances import NEIGHBOURS, precision_recall
from atelier.shapes.judge import BORDER, RMS, Verdict, coverage, duplicates, judge, least_iou
from atelier.shapes.world import (
    ATTRIBUTES,
    COLOURS,
    COMBINATIONS,
    COUNTS,
    FILLS,
    SHAPES,
    SIZES,
    Scenes,
    furthest,
    is_unseen,
)

OF_VALID = ("label", *ATTRIBUTES)  # `judge/` figures that are shares of the valid samples
PLACES = 3  # cells along each axis of where a centre may lie
ENOUGH = 32  # pixels a side, from which a larger true image tells the judge nothing more


def judge_values(
    verdict: Verdict, asked: dict[str, Tensor] | None, images: Tensor, real: Verdict | None = None
) -> dict[str, float]:
    """The judge's figures for N samples.

    Of all samples: `judge/valid` and `judge/loose` are the shares of scenes and of near scenes,
    `judge/duplicates` the share with another sample nearer than 2 grey levels rms, `judge/asked` the share, valid or
    not, in which every attribute that was asked for is seen; absent where none was. Of the 36 labels:
    `judge/coverage` is the share seen among the valid samples. Of the valid samples alone (nan where there
    are none): `judge/label` is the share whose shape and colour are both those asked for, `judge/shape`,
    `judge/colour`, `judge/size`, `judge/fill` and `judge/ground` the shares in which this attribute is the
    one asked for; those that were not asked for are absent. Beside as many true draws (nan where they cannot be
    had): `judge/combinations`, `judge/places` and `judge/recall`, see the functions of these names.

    Args:
        verdict: verdict on the samples.
        asked: `label` (N,), which asks for shape and colour, and `attributes` (N, 14), which asks for colour,
            size, fill and ground; either, both, or None.
        images: the samples, (N, 3, S, S) in [-1, 1].
        real: verdict on true draws; None: the samples are made of sources, which say what each of them has to be.
    """
    values = {
        "judge/valid": _share(verdict.valid),
        "judge/loose": _share(verdict.loose),
        "judge/coverage": coverage(verdict),
        "judge/duplicates": duplicates(images),
    }
    wanted = wishes(asked or {})
    if real is not None:
        fitting = {name: value[verdict.valid.cpu()] for name, value in wanted.items()}
        seen = verdict.scenes[verdict.valid]
        values |= {
            "judge/combinations": combinations(seen, fitting),
            "judge/places": places(seen),
            "judge/recall": recall(real.scenes, seen),
        }
    hits = {name: getattr(verdict, name).cpu() == value for name, value in wanted.items()}
    if hits:
        values["judge/asked"] = _share(torch.stack(list(hits.values())).all(0))
    right = {name: hit[verdict.valid.cpu()] for name, hit in hits.items()}
    if "shape" in right:
        values["judge/label"] = _share(right["shape"] & right["colour"])
    return values | {f"judge/{name}": _share(hits) for name, hits in right.items()}


def verdict_of_true(images: Tensor) -> Verdict:
    """What the judge sees in true images (N, 3, S, S) in [-1, 1]: the same where they are larger than 32 px and
    reduced to it, which takes a tenth of the time at 128 px."""
    return judge(F.adaptive_avg_pool2d(images, min(ENOUGH, images.shape[-1])))


def combinations(seen: Scenes, wanted: dict[str, Tensor]) -> float:
    """Different combinations of the five attributes in N scenes, over how many N true draws have on average.

    That average is the sum over combinations c of 1 - prod_i (1 - p_ic), with p_i uniform over those that training
    scenes have and that fit what was asked of scene i, so 519 (1 - (1 - 1/519)^N) where nothing was asked; where no
    training scene fits, over all that fit. Only a scene that fits what was asked of it counts. A model conditional
    on both is given its combination, and the figure says little more than how often it obeys.

    Args:
        seen: N scenes.
        wanted: attribute numbers (N,) that were asked for, by name; {}: none.
    """
    fits = torch.ones(len(seen), len(COMBINATIONS), dtype=torch.bool)  # (N, 576)
    for name, value in wanted.items():
        fits &= COMBINATIONS[:, ATTRIBUTES.index(name)] == value[:, None]
    known = fits & ~is_unseen(COMBINATIONS)
    fits = torch.where(known.any(1, keepdim=True), known, fits)
    expected = (1 - (1 - fits.double() / fits.sum(1, keepdim=True)).prod(0)).sum().item()
    number = _number(seen)
    obeyed = fits[torch.arange(len(seen)), number]
    return len(number[obeyed].unique()) / expected if len(seen) else math.nan


def places(seen: Scenes) -> float:
    """Places at which N scenes of the same combination lie, over at how many true draws would on average.

    Where a centre may lie is cut into 3 x 3 cells. Each combination that is seen m times has its number of different
    cells, beside 9 (1 - (1 - 1/9)^m); both are summed over combinations. The more samples, the more telling: of
    those seen once nothing can be said.
    """
    offsets = [(c / furthest(seen.size) + 1) / 2 * PLACES for c in (seen.cx, seen.cy)]
    column, row = (offset.floor().clamp(0, PLACES - 1).long() for offset in offsets)
    cells, number = PLACES**2, _number(seen)
    times = torch.bincount(number).double()
    expected = (cells * (1 - (1 - 1 / cells) ** times)).sum().item()
    return len((cells * number + PLACES * row + column).unique()) / expected if len(seen) else math.nan


def recall(real: Scenes, seen: Scenes) -> float:
    """Share of true scenes in the manifold of those seen (Kynkaanniemi et al. 2019, eq. 2), without a net.

    The square of the distance of two scenes is the number of attributes in which they differ plus that of the distance
    of their centres. What it is for true draws depends on their number: 0.94 to 0.98 for 300 beside 300.
    """
    if min(len(real), len(seen)) <= NEIGHBOURS:
        return math.nan
    return precision_recall(_coordinates(real), _coordinates(seen))[1]


def _coordinates(scenes: Scenes) -> Tensor:
    """(N, 22) float64: one-hots of the five attributes, scaled so that two of them are 1 apart, and the centre."""
    columns = zip(scenes.combination.unbind(1), COUNTS, strict=True)
    hot = torch.cat([F.one_hot(value, count) for value, count in columns], dim=1) / 2**0.5
    return torch.cat([hot.double(), torch.stack([scenes.cx, scenes.cy], dim=1).double()], dim=1)


def _number(scenes: Scenes) -> Tensor:
    """(N,) int64: the row of COMBINATIONS that each scene has."""
    number = torch.zeros_like(scenes.shape)
    for value, count in zip(scenes.combination.unbind(1), COUNTS, strict=True):
        number = number * count + value
    return number


def answer_values(verdict: Verdict, answer: Verdict, before: Verdict | None, image_size: int) -> dict[str, float]:
    """How often N results are what their sources should have become; shares of all of them, valid or not.

    `answer/<attribute>` and `answer/place` (the centre within a pixel) are the shares that are as in the answer,
    `answer/all` those with all of it. Where the sources are scenes too, `answer/changed` is the share in which every
    attribute that had to change is right, `answer/kept` the share in which all others and the place are.

    Args:
        verdict, answer, before: verdicts on the results, on what they should be, on the sources; None: no scenes.
        image_size: side of the results in pixels.
    """
    right = {name: getattr(verdict, name) == getattr(answer, name) for name in ATTRIBUTES}
    far = torch.hypot(verdict.cx - answer.cx, verdict.cy - answer.cy)
    right["place"] = far <= 2 / image_size
    matches = torch.stack(list(right.values()), dim=1)  # (N, 6)
    values = {f"answer/{name}": _share(hits) for name, hits in right.items()} | {"answer/all": _share(matches.all(1))}
    if before is None:
        return values
    changes = torch.stack([getattr(before, name) != getattr(answer, name) for name in ATTRIBUTES], dim=1)
    changes = torch.cat([changes, torch.zeros_like(changes[:, :1])], dim=1)  # a place is never to change
    values["answer/changed"] = _share((matches | ~changes).all(1))
    return values | {"answer/kept": _share((matches | changes).all(1))}


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
