from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from atelier.metrics.shapes import combinations, judge_values, places, reasons, recall, verdict_of_true, wilson, wishes
from atelier.shapes import world
from atelier.shapes.judge import judge

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
    assert set(label) - free == {"judge/asked", "judge/label", "judge/shape", "judge/colour"}
    attributes = judge_values(verdict, {"attributes": ASKED["attributes"]}, IMAGES)
    assert set(attributes) - free == {"judge/asked", "judge/colour", "judge/size", "judge/fill", "judge/ground"}


def test_shuffled_conditions_are_right_by_chance_only() -> None:
    mixed = {name: value.roll(1, 0) for name, value in ASKED.items()}
    values = judge_values(judge(IMAGES), mixed, IMAGES)
    assert values["judge/label"] < 0.15 and values["judge/asked"] < 0.05
    assert judge_values(judge(IMAGES), ASKED, IMAGES)["judge/asked"] == 1.0
    assert 0.3 < values["judge/fill"] < 0.7


def test_without_valid_samples_accuracy_is_nan() -> None:
    blank = torch.zeros_like(IMAGES)
    values = judge_values(judge(blank), ASKED, blank)
    assert values["judge/valid"] == values["judge/coverage"] == 0.0
    assert math.isnan(values["judge/label"])
    assert math.isnan(values["judge/colour"])


# ---- diversity -----------------------------------------------------------------------------------------------------

DRAWS = 300
TRAIN = world.scenes(0, range(5000), "train")
TRUE = world.scenes(0, range(DRAWS), "test")
PICK = torch.Generator().manual_seed(0)
DIVERSITY = ("combinations", "places", "recall")


def figures(scenes: world.Scenes, size: int, asked: dict[str, torch.Tensor] | None = None) -> dict[str, float]:
    images = world.render(scenes, size)
    values = judge_values(judge(images), asked, images, verdict_of_true(world.render(TRUE, size)))
    assert values["judge/valid"] > 0.8  # no fault that validity sees
    return {name: values[f"judge/{name}"] for name in (*DIVERSITY, "coverage", "duplicates")}


def few(size: int) -> world.Scenes:
    """One training scene of each label, drawn 300 times, moved by up to 2 px along each axis."""
    firsts = torch.tensor([int((world.label(TRAIN) == k).nonzero()[0, 0]) for k in range(36)])
    scenes = TRAIN[firsts[torch.randint(36, (DRAWS,), generator=PICK)]]
    dx, dy = (2 * torch.rand(2, DRAWS, generator=PICK) - 1) * 4 / size
    return replace(scenes, cx=scenes.cx + dx, cy=scenes.cy + dy)


@pytest.mark.parametrize(
    ("size", "most"),
    [
        (16, {"combinations": 0.25, "places": 0.9, "recall": 0.2}),
        (32, {"combinations": 0.25, "places": 0.7, "recall": 0.2}),
    ],
)
def test_few_scenes_moved_a_little_are_seen(size: int, most: dict[str, float]) -> None:
    """Coverage of the labels and duplicates do not see them."""
    found = figures(few(size), size)
    assert found["coverage"] == 1.0 and found["duplicates"] < 0.1
    assert all(found[name] < value for name, value in most.items())


@pytest.mark.parametrize(("size", "seed"), [(16, 7), (16, 8), (32, 9)])
def test_true_draws_are_as_diverse_as_true_draws(size: int, seed: int) -> None:
    found = figures(world.scenes(seed, range(DRAWS), "test"), size)
    assert found["combinations"] == pytest.approx(1, abs=0.06) and found["places"] == pytest.approx(1, abs=0.06)
    assert found["recall"] > 0.92


def test_a_thousand_training_scenes_are_what_they_are() -> None:
    """Diverse, as far as 300 of them can tell; one scene of each combination shows in the places alone."""
    found = figures(TRAIN[torch.randint(1000, (DRAWS,), generator=PICK)], 16)
    assert found["combinations"] > 0.8 and found["places"] > 0.8 and found["recall"] > 0.9
    assert 0.1 < found["duplicates"] < 0.4  # 1 - (1 - 1/1000)^299 = 0.26
    number = (TRAIN.combination * torch.tensor([96, 16, 8, 4, 1])).sum(1)
    firsts = torch.tensor([int((number == c).nonzero()[0, 0]) for c in number.unique()])
    found = figures(TRAIN[firsts[torch.randint(len(firsts), (DRAWS,), generator=PICK)]], 16)
    assert found["combinations"] > 0.9 and found["recall"] > 0.9 and found["places"] < 0.85


def answers(labels: torch.Tensor) -> world.Scenes:
    """A true draw of each label (N,)."""
    pool = world.label(TRAIN)
    rows = [(pool == k).nonzero()[:, 0] for k in range(36)]
    picks = [rows[k][torch.randint(len(rows[k]), (), generator=PICK)] for k in labels.tolist()]
    return TRAIN[torch.stack(picks)]


def test_combinations_are_beside_their_expectation() -> None:
    """Averages over many draws of 40, with nothing and with labels asked for."""
    draws = [world.scenes(seed, range(40), "test") for seed in range(60)]
    free = torch.tensor([combinations(scenes, {}) for scenes in draws]).mean()
    distinct = [len(scenes.combination.unique(dim=0)) for scenes in draws]
    assert free.item() == pytest.approx(1, abs=0.01)
    assert free.item() == pytest.approx(sum(distinct) / 60 / (519 * (1 - (1 - 1 / 519) ** 40)))
    labels = world.label(draws[0])
    told = [combinations(answers(labels), wishes({"label": labels})) for _ in range(60)]
    assert torch.tensor(told).mean().item() == pytest.approx(1, abs=0.01)


def test_a_combination_counts_where_it_was_asked_for() -> None:
    """Half of the scenes have another ground than they were asked for, all of it."""
    scenes = world.scenes(0, range(40), "test")
    every = wishes({"label": world.label(scenes), "attributes": world.attributes(scenes)})
    assert combinations(scenes, every) == 1.0
    half = replace(scenes, ground=torch.where(torch.arange(40) < 20, (scenes.ground + 1) % 4, scenes.ground))
    obeyed = len(scenes.combination[20:].unique(dim=0)) / len(scenes.combination.unique(dim=0))
    assert combinations(half, every) == pytest.approx(obeyed)


def test_combinations_that_no_training_scene_has_may_be_asked_for() -> None:
    scenes = world.scenes(0, range(30), "unseen")
    every = wishes({"label": world.label(scenes), "attributes": world.attributes(scenes)})
    assert combinations(scenes, every) == 1.0 and combinations(scenes, {}) == 0.0


def test_places_are_counted_by_combination() -> None:
    """20 scenes of one combination at one place, and 20 of another at all nine: 10 of 2 * 9 (1 - (8/9)^20)."""
    offset = torch.linspace(-1, 1, 3).repeat_interleave(3).repeat(3)[:20], torch.linspace(-1, 1, 3).repeat(9)[:20]
    size = torch.tensor([0, 1]).repeat_interleave(20)
    none = torch.zeros(40, dtype=torch.int64)
    cx, cy = (torch.cat([torch.zeros(20), 0.7 * o]) * world.furthest(size) for o in offset)
    scenes = world.Scenes(none, none, size, none, none, cx, cy)
    assert places(scenes) == pytest.approx(10 / (18 * (1 - (8 / 9) ** 20)))


def test_recall_of_scenes_by_hand() -> None:
    """Balls reach the third nearest other scene: four of one combination in a row, 0.3 apart, reach 0.9 and 0.6."""
    none = torch.zeros(4, dtype=torch.int64)
    seen = world.Scenes(none, none, none, none, none, torch.tensor([0.0, 0.3, 0.6, 0.9]), torch.zeros(4))
    true = replace(seen, cx=torch.tensor([1.7, 1.9, 0.0, 0.3]), ground=torch.tensor([0, 0, 0, 1]))
    assert recall(true, seen) == 0.5  # 1.9 is 1.0 from the last, and so is another ground
    assert math.isnan(recall(true[:3], seen)) and math.isnan(recall(true, seen[:3]))


def test_without_valid_samples_diversity_is_nan() -> None:
    blank = torch.zeros(8, 3, 16, 16)
    values = judge_values(judge(blank), {"label": ASKED["label"][:8]}, blank, judge(IMAGES))
    assert all(math.isnan(values[f"judge/{name}"]) for name in DIVERSITY)


def test_true_images_tell_as_much_at_32_px() -> None:
    scenes = world.scenes(5, range(60), "test")
    verdict = verdict_of_true(world.render(scenes, 128))
    assert torch.equal(verdict.scenes.combination, scenes.combination)
    assert (verdict.cx - scenes.cx).abs().max() < 0.02 and (verdict.cy - scenes.cy).abs().max() < 0.02


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
