"""How near results are to their answers: figures worked out by hand, and scenes of which the truth is known."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from atelier.core.rng import ImageRngs
from atelier.evaluation.paired import compared, values
from atelier.images.pixels import to_float, to_uint8
from atelier.metrics.shapes import answer_values
from atelier.models.base import Cond, Translator
from atelier.shapes import world
from atelier.shapes.judge import Verdict, judge
from atelier.shapes.world import Scenes
from tests.images.test_bicubic import direct

PLAIN = SimpleNamespace(lpips=None)
LEVEL = 100


class Twice(Translator):
    """Twice as wide; what it makes is written by hand."""

    scale_factor = 2

    def sample(self, cond: Cond, rngs: ImageRngs) -> Tensor: ...


class Edits(Translator):
    """Makes scenes of scenes."""

    same_domain = True

    def sample(self, cond: Cond, rngs: ImageRngs) -> Tensor: ...


def grey(n: int, size: int) -> Tensor:
    return torch.full((n, 3, size, size), LEVEL, dtype=torch.uint8)


def facts(model: Translator, images: Tensor, answer: Tensor, source: Tensor, **changed: Any) -> dict[str, Tensor]:
    """What is told of results (N, C, H, W) uint8."""
    batch = {"image": to_float(answer), "source": to_float(source)}
    given = {"judged": False, "suite": PLAIN} | changed
    return compared(model, images, {"source": batch["source"]}, batch, "", given["judged"], given["suite"])


def decibels(error: float) -> float:
    return 20 * math.log10(255 / error)


def test_super_resolution_by_hand() -> None:
    """Results 10 levels too red in one image and right in the other; sources of which the bicubic makes one grey."""
    answer, source = grey(2, 20), grey(2, 10)
    images = answer.clone()
    images[1, 0] += 10
    answer[:, 2] += 4  # too blue for the bicubic
    images[:, 2] += 4
    told = facts(Twice(), images, answer, source)
    expected = {
        "pair/psnr": [100.0, decibels(10 / math.sqrt(3))],
        "pair/psnr_y": [100.0, decibels(65.481 * 10 / 255)],
        "pair/bicubic_psnr": [decibels(4 / math.sqrt(3))] * 2,
        "pair/bicubic_psnr_y": [decibels(24.966 * 4 / 255)] * 2,
    }
    assert set(told) == {*expected, "pair/ssim", "pair/ssim_y", "pair/bicubic_ssim", "pair/bicubic_ssim_y"}
    for name, value in expected.items():
        assert told[name].tolist() == pytest.approx(value, rel=1e-6), name
    for name in told.keys() - expected:
        assert told[name].max() <= 1 + 1e-9 and told[name].min() > 0.9, name
    assert told["pair/ssim"].tolist() == pytest.approx([1.0, told["pair/ssim"][1].item()]) and told["pair/ssim"][1] < 1
    assert values(told, 20)["pair/bicubic_psnr"] == pytest.approx(decibels(4 / math.sqrt(3)))


def test_a_border_as_wide_as_the_factor_is_left_out() -> None:
    answer, source = grey(1, 20), grey(1, 10)
    for width, equal in ((2, True), (3, False)):
        images = answer.clone()
        images[..., :width] = 0
        images[..., 20 - width :, :] = 255
        told = facts(Twice(), images, answer, source)
        assert (told["pair/psnr"].item() == 100) == equal == (told["pair/psnr_y"].item() == 100)


def test_the_bicubic_is_that_of_the_source_in_eight_bits() -> None:
    rng = torch.Generator().manual_seed(0)
    source, answer = (torch.randint(60, 200, (2, 3, n, n), dtype=torch.uint8, generator=rng) for n in (8, 16))
    told = facts(Twice(), answer, answer, source)
    levels = (direct(source.double(), 16, 16) + 0.5).floor().clamp(0, 255)
    error = (levels - answer)[..., 2:-2, 2:-2].square().mean((1, 2, 3)).sqrt()
    assert told["pair/bicubic_psnr"].tolist() == pytest.approx([decibels(e) for e in error.tolist()], abs=1e-4)


def test_results_as_large_as_their_sources_are_compared_whole() -> None:
    answer = grey(1, 16)
    images = answer.clone()
    images[..., 0] = 0
    told = facts(Edits(), images, answer, answer)
    assert set(told) == {"pair/psnr", "pair/ssim"}
    assert told["pair/psnr"].item() == pytest.approx(decibels(LEVEL / 4))  # one column of 16


def test_a_learned_distance_sees_whole_images_in_their_range() -> None:
    seen: list[Tensor] = []

    def lpips(a: Tensor, b: Tensor) -> Tensor:
        seen.extend((a, b))
        return (a - b).abs().mean((1, 2, 3))

    images = grey(3, 20) + 51
    told = facts(Twice(), images, grey(3, 20), grey(3, 10), suite=SimpleNamespace(lpips=lpips))
    assert told["pair/lpips"].tolist() == pytest.approx([0.4] * 3)  # 51 levels of 127.5
    assert torch.equal(seen[0], to_float(images)) and seen[1].shape == (3, 3, 20, 20)


def test_without_an_answer_nothing_is_said() -> None:
    source = to_float(grey(2, 10))
    assert compared(Twice(), grey(2, 20), {"source": source}, {"source": source}, "", True, PLAIN) == {}
    assert values({f"verdict/{f.name}": torch.ones(2) for f in dataclasses.fields(Verdict)}, 20) == {}


# Scenes

N, SIZE = 40, 64
BEFORE = world.scenes(5, range(N), "test")
ANSWER = replace(BEFORE, ground=(BEFORE.ground + 1) % 4)  # the ground had to change, all else to stay
SOME = torch.arange(N) < 10
COUNTS = dict(zip(world.ATTRIBUTES, world.COUNTS, strict=True))


def seen(scenes: Scenes) -> Verdict:
    return judge(world.render(scenes, SIZE))


def wrong(name: str) -> Scenes:
    """The answers, a quarter of them with another value of one attribute."""
    value = getattr(ANSWER, name)
    return replace(ANSWER, **{name: torch.where(SOME, (value + 1) % COUNTS[name], value)})


NAMES = ["answer/place", *(f"answer/{name}" for name in world.ATTRIBUTES)]


def test_an_answer_is_all_right() -> None:
    found = answer_values(seen(ANSWER), seen(ANSWER), seen(BEFORE), SIZE)
    assert found == dict.fromkeys([*NAMES, "answer/all", "answer/changed", "answer/kept"], 1.0)
    assert answer_values(seen(ANSWER), seen(ANSWER), None, SIZE) == dict.fromkeys([*NAMES, "answer/all"], 1.0)


@pytest.mark.parametrize("name", world.ATTRIBUTES)
def test_one_attribute_that_is_wrong_lowers_itself_alone(name: str) -> None:
    found = answer_values(seen(wrong(name)), seen(ANSWER), seen(BEFORE), SIZE)
    lower = {f"answer/{name}", "answer/all", "answer/changed" if name == "ground" else "answer/kept"}
    assert {key for key, value in found.items() if value < 1} == lower
    assert {found[key] for key in lower} == {0.75}


def test_a_place_that_is_wrong_was_not_kept() -> None:
    for pixels, right in ((0.7, 1.0), (2.0, 0.75)):
        moved = replace(ANSWER, cx=torch.where(SOME, ANSWER.cx - pixels * 2 / SIZE * ANSWER.cx.sign(), ANSWER.cx))
        found = answer_values(seen(moved), seen(ANSWER), seen(BEFORE), SIZE)
        assert {found[f"answer/{key}"] for key in ("place", "kept", "all")} == {right}
        assert found["answer/changed"] == 1 and all(found[name] == 1 for name in NAMES[1:])


def test_a_source_given_back_has_kept_all_and_changed_nothing() -> None:
    found = answer_values(seen(BEFORE), seen(ANSWER), seen(BEFORE), SIZE)
    assert (found["answer/kept"], found["answer/changed"], found["answer/ground"]) == (1, 0, 0)


def test_scenes_are_judged_beside_their_answers() -> None:
    """From pictures to shares: a quarter has the wrong ground, and the verdict on results comes from elsewhere."""
    pictures = {name: world.render(s, SIZE) for name, s in {"image": ANSWER, "source": BEFORE}.items()}
    images = to_uint8(world.render(wrong("ground"), SIZE))
    told = compared(Edits(), images, {"source": pictures["source"]}, pictures, "", True, PLAIN)
    groups = [f.name for f in dataclasses.fields(Verdict)]
    assert {f"{g}/{n}" for g in ("answer", "before") for n in groups} < set(told)
    verdict = {f"verdict/{n}": getattr(judge(to_float(images)), n) for n in groups}
    found = values(told | verdict, SIZE)
    assert (found["answer/ground"], found["answer/changed"], found["answer/kept"]) == (0.75, 0.75, 1.0)
    assert 75 < found["pair/psnr"] < 100  # three quarters are equal, which counts as 100
    enlarging = compared(Twice(), images, {"source": pictures["source"][..., ::2, ::2]}, pictures, "", True, PLAIN)
    assert not any(name.startswith("before/") for name in enlarging)  # a small source is no scene to keep
