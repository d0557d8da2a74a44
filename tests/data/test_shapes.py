"""The shapes set: what each task hands out, and that it is the same however it is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from atelier.core.errors import UserError
from atelier.data import shapes
from atelier.data.shapes import EXTRA, Shapes
from atelier.shapes import world
from atelier.shapes.judge import judge

PAGE = Path(__file__).parents[2] / "conf" / "data" / "shapes.yaml"
HALF_LEVEL = 0.5 / 127.5 + 1e-6
FINGERPRINT = "ce751a128ce24012"  # of the training split of `shapes_set`, as it was before `shapes`
FIELDS = ("image", "source", "image_a", "image_b", "mask", "mask_kind", "label", "attributes", "target", "index")


def shapes_set(**options: object) -> Shapes:
    """The set of the config page, with some options changed."""
    page = yaml.safe_load(PAGE.read_text()) | {"seed": 0, "n_train_scenes": 300, "n_test_scenes": 100} | options
    assert page.pop("_target_") == "atelier.data.shapes.Shapes"
    return Shapes(**page)


def generators(n: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(k) for k in range(n)]


@pytest.mark.parametrize("task", EXTRA)
@pytest.mark.parametrize("image_size", [16, 32, 64])
def test_every_field_is_there_in_shape_and_range(task: shapes.Task, image_size: int) -> None:
    data = shapes_set(task=task, image_size=image_size)
    batch = data.split("train").read([5, 0, 299, 7], None)
    assert set(batch) == data.provides | {"image", "index"}
    small = image_size // 4 if task == "low_resolution" else image_size
    expected = dict.fromkeys(("image", "image_a", "image_b"), (4, 3, image_size, image_size))
    expected |= {"source": (4, 3, small, small), "mask": (4, 1, image_size, image_size)}
    expected |= {"label": (4,), "attributes": (4, 14), "target": (4, 14), "index": (4,), "mask_kind": (4,)}
    for name in set(batch) & set(FIELDS):
        assert batch[name].shape == expected[name], name
        assert batch[name].dtype == (torch.int64 if name in ("label", "index", "mask_kind") else torch.float32), name
        assert batch[name].min() >= -1 and (batch[name].max() <= 1 or name in ("label", "index"))
    assert batch["index"].tolist() == [5, 0, 299, 7]


@pytest.mark.parametrize("task", EXTRA)
@pytest.mark.parametrize("kept", [True, False])
def test_a_scene_is_the_same_however_it_is_read(task: shapes.Task, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "KEPT_BYTES", shapes.KEPT_BYTES if kept else 0)
    one, other = (shapes_set(task=task).split("train") for _ in range(2))
    first = one.read(list(range(40)), None)
    other.read([3, 9, 9, 250], None)
    rows = [30, 9, 3, 9, 39]
    for images in (one, other):
        batch = images.read(rows, None)
        for name, value in batch.items():
            expected = first[name][rows] if isinstance(value, Tensor) else [first[name][r] for r in rows]
            assert torch.equal(value, expected) if isinstance(value, Tensor) else value == expected, name
    assert bool(one.kept) == kept


def test_image_is_the_scene_within_half_a_grey_level() -> None:
    batch = shapes_set(image_size=32).split("test").read(list(range(50)), None)
    scenes = world.scenes(0, range(50), "test")
    assert (batch["image"] - world.render(scenes, 32)).abs().max() <= HALF_LEVEL
    assert torch.equal(batch["label"], world.label(scenes))
    assert torch.equal(batch["attributes"], world.attributes(scenes))
    assert batch["text"] == world.captions(scenes)


def test_domains_are_solid_and_striped() -> None:
    batch = shapes_set(task="fill", image_size=32).split("train").read(list(range(100)), None)
    for name, fill in (("image_a", 0), ("image_b", 1)):
        verdict = judge(batch[name])
        assert verdict.valid.all() and (verdict.fill == fill).all()


def test_test_scenes_of_a_domain_come_with_the_same_in_the_other() -> None:
    data = shapes_set(task="fill", image_size=32)
    batch = data.split("test").read(list(range(100)), None)
    assert set(batch) == data.provides | {"image", "index", "answer_a", "answer_b"}
    assert not {"answer_a", "answer_b"} & set(data.split("train").read([0], None))
    for side, fill in (("a", 0), ("b", 1)):
        before, after = judge(batch[f"image_{side}"]), judge(batch[f"answer_{side}"])
        assert before.valid.all() and after.valid.all()
        assert (before.fill == fill).all() and (after.fill == 1 - fill).all()
        kept = [world.ATTRIBUTES.index(name) for name in ("shape", "colour", "size", "ground")]
        assert torch.equal(before.scenes.combination[:, kept], after.scenes.combination[:, kept])
        assert torch.maximum((before.cx - after.cx).abs(), (before.cy - after.cy).abs()).max() * 16 < 0.5


def test_recast_asks_for_one_change_and_test_scenes_have_the_answer() -> None:
    data = shapes_set(task="attribute_transfer", image_size=32)
    batch = data.split("test").read(list(range(100)), None)
    assert set(batch) == data.provides | {"image", "index", "answer"}
    before, after = judge(batch["image"]), judge(batch["answer"])
    assert before.valid.all() and after.valid.all()
    changed = before.scenes.combination != after.scenes.combination
    assert changed.sum(1).eq(1).all()
    by_name = dict(zip(world.ATTRIBUTES, changed.sum(0).tolist(), strict=True))
    assert by_name["shape"] == by_name["size"] == 0 and min(by_name[k] for k in ("colour", "fill", "ground")) > 15
    assert torch.equal(batch["target"], world.attributes(after.scenes))
    assert torch.maximum((before.cx - after.cx).abs(), (before.cy - after.cy).abs()).max() * 16 < 0.5


def test_recast_training_scenes_have_a_target_and_no_answer() -> None:
    batch = shapes_set(task="attribute_transfer").split("train").read(list(range(50)), None)
    assert "answer" not in batch and batch["target"].dtype == torch.float32
    turned = (batch["target"] - batch["attributes"]).split([6, 2, 2, 4], dim=1)  # colour, size, fill, ground
    assert torch.stack([part.abs().sum(1) for part in turned]).sum(0).eq(2).all()  # one off, one on
    assert torch.stack([part.sum(1) for part in turned]).eq(0).all() and not turned[1].any()


def test_attributes_are_called_as_in_the_captions() -> None:
    data = shapes_set()
    batch = data.split("train").read(list(range(100)), None)
    assert len(data.attribute_names) == len(set(data.attribute_names)) == 14
    for text, bits in zip(batch["text"], batch["attributes"], strict=True):
        said = {name for name, bit in zip(data.attribute_names, bits.tolist(), strict=True) if bit}
        assert said - {"solid"} == set(text.split()) & set(data.attribute_names) and len(said) == 4


def test_edit_keeps_the_rest() -> None:
    batch = shapes_set(task="edit", image_size=32).split("test").read(list(range(100)), None)
    before, after = judge(batch["source"]), judge(batch["image"])
    assert before.valid.all() and after.valid.all()
    changed = before.scenes.combination != after.scenes.combination
    assert changed.sum(1).eq(1).all()
    assert torch.maximum((before.cx - after.cx).abs(), (before.cy - after.cy).abs()).max() * 16 < 0.5
    for words, kind, now in zip(batch["instruction"], changed.long().argmax(1), after.scenes.combination, strict=True):
        assert words == world.instruction(world.ATTRIBUTES[kind], int(now[kind]))


def test_low_resolution_and_label_map_belong_to_the_image() -> None:
    low = shapes_set(task="low_resolution", image_size=64).split("test").read([1, 2], None)
    assert torch.allclose(low["source"], world.low_resolution(low["image"], 4), atol=0.02)
    planes = shapes_set(task="label_map", image_size=32).split("test").read([1, 2], None)
    scenes = world.scenes(0, [1, 2], "test")
    assert (planes["source"] - world.label_map(scenes, 32)).abs().max() <= HALF_LEVEL


def test_mask_is_zero_or_one_and_its_kind_is_told() -> None:
    batch = shapes_set(task="inpaint").split("train").read(list(range(60)), None)
    assert torch.equal(batch["mask"], world.masks(0, range(60), "train", 16))
    boxes = world.box_mask(world.scenes(0, range(60), "train"), 16)
    assert torch.equal((batch["mask"] != boxes).flatten(1).any(1).long(), batch["mask_kind"])


@pytest.mark.parametrize("task", EXTRA)
def test_flip_mirrors_all_that_belongs_together(task: shapes.Task) -> None:
    plain, flipped = (shapes_set(task=task, flip=flip).split("train") for flip in (False, True))
    rows = list(range(40))
    still, batch = plain.read(rows, generators(40)), flipped.read(rows, generators(40))
    mirrored = torch.stack([torch.rand((), generator=g) < 0.5 for g in generators(40)])
    assert 10 < mirrored.sum() < 30
    for name in set(batch) & {"image", "source", "image_a", "image_b", "mask"}:
        expected = torch.where(mirrored[:, None, None, None], still[name].flip(-1), still[name])
        assert torch.equal(batch[name], expected), name
    assert torch.equal(flipped.read(rows, None)["image"], still["image"])


def test_unseen_test_split_has_combinations_that_training_lacks() -> None:
    told = {}
    for split, data in (("test", shapes_set()), ("unseen", shapes_set(test_split="unseen"))):
        told[split] = set(data.split("test").read(list(range(100)), None)["text"])
    train = set(shapes_set(n_train_scenes=5000).split("train").read(list(range(5000)), None)["text"])
    assert not told["unseen"] & train and told["test"] <= train


def test_world_does_not_change_with_the_seed_of_the_run() -> None:
    a, b = (shapes_set(seed=seed) for seed in (0, 1))
    assert torch.equal(a.split("train").read([3], None)["image"], b.split("train").read([3], None)["image"])
    assert a.fingerprint("test") == b.fingerprint("test") != shapes_set(image_size=32).fingerprint("test")
    assert a.fingerprint("train") != shapes_set(task="edit").fingerprint("train")


def test_sizes_and_limit() -> None:
    data = shapes_set(limit=8)
    assert len(data.split("train")) == 300 and len(data.split("test")) == 100 and data.n_train == 8


def test_large_images_cost_nothing_before_they_are_read() -> None:
    images = shapes_set(image_size=64, n_train_scenes=50000).split("train")
    images.read([49999], None)
    assert images.drawn.sum() == 1 and images.kept["image"].shape == (50000, 3, 64, 64)


@pytest.mark.parametrize("task", [task for task in EXTRA if task not in ("fill", "edit")])
def test_some_shapes_are_the_first_scenes_that_show_them(task: shapes.Task) -> None:
    some = shapes_set(task=task, shapes=["star", "ring"])
    whole = shapes_set(task=task, n_train_scenes=2000, n_test_scenes=600)
    for split, n in (("train", 300), ("test", 100)):
        every = whole.split(split)
        rows = [i for i, shape in enumerate(every.scenes.shape) if world.SHAPES[shape] in ("star", "ring")][:n]
        batch, expected = some.split(split).read(list(range(n)), None), every.read(rows, None)
        for name in set(batch) - {"index"}:
            same = batch[name] == expected[name]
            assert same if isinstance(same, bool) else same.all(), name
        assert batch["index"].tolist() == list(range(n))
    assert len({data.fingerprint("train") for data in (some, shapes_set(task=task), shapes_set(shapes=["star"]))}) == 3


def test_a_run_of_before_there_was_a_choice_of_shapes_finds_its_images() -> None:
    assert shapes_set().fingerprint("train") == FINGERPRINT


@pytest.mark.parametrize("task", ["fill", "edit"])
def test_some_shapes_are_refused_where_further_scenes_are_drawn(task: shapes.Task) -> None:
    with pytest.raises(UserError, match=f"data.shapes=.*task={task} draws further scenes"):
        shapes_set(task=task, shapes=["star"])
