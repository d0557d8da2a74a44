from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from atelier import world
from atelier.judge import judge
from atelier.metrics.shapes import judge_values, reasons, wilson

N = 200
SCENES = world.scenes(3, range(N), "test")
IMAGES = world.render(SCENES, 16)
ASKED = {"label": world.label(SCENES), "attributes": world.attributes(SCENES)}


def test_real_scenes_are_all_right() -> None:
    values = judge_values(judge(IMAGES), ASKED, IMAGES)
    for name in ("valid", "loose", "label", "shape", "colour", "size", "fill", "ground"):
        assert values[f"judge/{name}"] == 1.0
    assert values["judge/coverage"] == len(ASKED["label"].unique()) / 36
    assert values["judge/duplicates"] == 0.0


def test_attributes_are_judged_among_the_valid_alone() -> None:
    images = IMAGES.clone()
    images[: N // 2] = 0.0  # blank, so refused; a judge of all samples would count their attributes
    shifted = {"label": ASKED["label"].clone(), "attributes": ASKED["attributes"]}
    shifted["label"][-50:] = (shifted["label"][-50:] + 6) % 36  # the next shape, the same colour
    values = judge_values(judge(images), shifted, images)
    assert values["judge/valid"] == 0.5
    assert values["judge/shape"] == values["judge/label"] == 0.5
    assert values["judge/colour"] == values["judge/ground"] == 1.0
    assert values["judge/duplicates"] == 0.5  # the blank ones


def test_only_what_was_asked_is_judged() -> None:
    verdict = judge(IMAGES)
    free = {"judge/valid", "judge/loose", "judge/coverage", "judge/duplicates"}
    assert set(judge_values(verdict, None, IMAGES)) == free
    label = judge_values(verdict, {"label": ASKED["label"]}, IMAGES)
    assert set(label) - free == {"judge/label", "judge/shape", "judge/colour"}
    attributes = judge_values(verdict, {"attributes": ASKED["attributes"]}, IMAGES)
    assert set(attributes) - free == {"judge/colour", "judge/size", "judge/fill", "judge/ground"}


def test_shuffled_conditions_are_right_by_chance_only() -> None:
    mixed = {name: value.roll(1, 0) for name, value in ASKED.items()}
    values = judge_values(judge(IMAGES), mixed, IMAGES)
    assert values["judge/label"] < 0.15
    assert 0.3 < values["judge/fill"] < 0.7


def test_without_valid_samples_accuracy_is_nan() -> None:
    blank = torch.zeros_like(IMAGES)
    values = judge_values(judge(blank), ASKED, blank)
    assert values["judge/valid"] == values["judge/coverage"] == 0.0
    assert math.isnan(values["judge/label"])
    assert math.isnan(values["judge/colour"])


def test_reasons_count_what_failed() -> None:
    verdict = judge(IMAGES)
    broken = torch.arange(N) < 30
    verdict = replace(verdict, rms=torch.where(broken, 0.2, verdict.rms), valid=verdict.valid & ~broken)
    rows = {name: (k, n) for name, k, n in reasons(verdict, 16)}
    assert rows["refused: rms"] == (30, N)
    assert rows["refused: border"] == rows["refused: iou"] == (0, N)
    circles = verdict.shape == 0
    assert rows["valid: circle"] == (int((circles & ~broken).sum()), int(circles.sum()))
    assert sum(n for name, (_, n) in rows.items() if name in ("valid: solid", "valid: striped")) == N


def test_wilson_interval() -> None:
    """Against the roots of (p - k/n)^2 = z^2 p (1 - p) / n, which define it."""
    z = 1.959963984540054
    for k, n in ((0, 10), (10, 10), (37, 50), (990, 1000)):
        for bound in wilson(k, n):
            assert (bound - k / n) ** 2 == pytest.approx(z * z * bound * (1 - bound) / n, abs=1e-12)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(50, 100) == pytest.approx((0.403832, 0.596168), abs=1e-6)
