"""Squares and their sources: where they are cut, how sources are made or read, what is refused and with which name."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from atelier.core.errors import UserError
from atelier.core.rng import generator
from atelier.data.superres import SuperRes
from atelier.images.bicubic import reduced
from atelier.images.pixels import to_float, to_uint8

SHARED = Path(__file__).parents[3] / "shared" / "data"


def noise(path: Path, width: int, height: int, seed: int = 0) -> Tensor:
    """A PNG of random pixels, (3, H, W) uint8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def pair(root: Path, name: str, width: int, height: int, scale_factor: int = 4) -> tuple[Tensor, Tensor]:
    """Files of the same name in HR/ and LR/, whose pixels have nothing to do with each other."""
    large = noise(root / "HR" / name, width, height, len(name))
    return large, noise(root / "LR" / name, width // scale_factor, height // scale_factor, 100 + len(name))


def data(root: Path, **changed: object) -> SuperRes:
    fields = {
        "root": str(root), "holdout": 0.0, "background": "white", "max_pixels": 1 << 20, "on_bad_image": "error",
        "memory_mb": 100, "cache": f"{root}.cache", "scale_factor": 4, "resize": None, "turn": False, "image_size": 8,
        "image_channels": 3, "batch_size": 2, "seed": 0, "limit": None, "num_workers": 0, "flip": False,
        "n_classes": 0, "n_attributes": 0, "conditions": [],
    }  # fmt: skip
    return SuperRes(**fields | changed)


def refusal(root: Path, **changed: object) -> UserError:
    with pytest.raises(UserError) as error:
        data(root, **changed).split("train")
    assert "\n" not in error.value.line()
    return error.value


def levels(images: Tensor) -> Tensor:
    return to_uint8(images)


def test_at_test_the_middle_is_cut_out(tmp_path):
    pixels = noise(tmp_path / "a.png", 21, 13)
    batch = data(tmp_path, flip=True, turn=True).test_batch(0, 2)
    assert torch.equal(levels(batch["image"]), pixels[None, :, 2:10, 6:14].expand(2, -1, -1, -1))
    assert batch["index"].tolist() == [0, 0] and set(batch) == {"image", "source", "index"}
    assert batch["image"].dtype == batch["source"].dtype == torch.float32


@pytest.mark.parametrize("scale_factor", [2, 3, 4])
def test_a_source_is_the_rounded_bicubic_of_its_square(tmp_path, scale_factor):
    noise(tmp_path / "a.png", 30, 30)
    batch = data(tmp_path, scale_factor=scale_factor, image_size=12).test_batch(0, 1)
    grey = 127.5 * reduced(batch["image"].double(), scale_factor) + 127.5
    rounded = (grey + 0.5).floor().clamp(0, 255)
    assert batch["source"].shape == (1, 3, 12 // scale_factor, 12 // scale_factor)
    torch.testing.assert_close(127.5 * batch["source"].double() + 127.5, rounded, rtol=0, atol=1e-4)
    assert (rounded == 255).any() or (rounded - grey).abs().max() > 0.3


def test_in_training_each_place_comes_up(tmp_path):
    """10 x 9 pixels have 3 x 2 places for 8; the square there belongs to the generator alone."""
    pixels = noise(tmp_path / "a.png", 10, 9)
    images = data(tmp_path).split("train")
    seen = {}
    for k in range(60):
        square = levels(images.read([0], [generator(k)])["image"])[0]
        places = [(t, u) for t in range(2) for u in range(3) if torch.equal(square, pixels[:, t : t + 8, u : u + 8])]
        assert len(places) == 1
        seen[places[0]] = seen.get(places[0], 0) + 1
    assert len(seen) == 6 and min(seen.values()) >= 3
    together = images.read([0, 0], [generator(7), generator(3)])["image"]
    assert torch.equal(together[1:], images.read([0], [generator(3)])["image"])


@pytest.mark.parametrize(
    ("flip", "turn", "kinds"), [(False, False, 1), (True, False, 2), (False, True, 4), (True, True, 8)]
)
@pytest.mark.parametrize("paired", [False, True])
def test_squares_are_mirrored_and_turned_with_their_sources(tmp_path, flip, turn, kinds, paired):
    large, small = pair(tmp_path, "a.png", 8, 8)
    images = data(tmp_path if paired else tmp_path / "HR", flip=flip, turn=turn).split("train")
    ways = {(m, q): (lambda x, m=m, q=q: (x.flip(-1) if m else x).rot90(q, (-2, -1))) for m in (0, 1) for q in range(4)}
    seen = set()
    for k in range(80):
        batch = images.read([0], [generator(k)])
        image, source = levels(batch["image"])[0], levels(batch["source"])[0]
        (way,) = [way for way, turned in ways.items() if torch.equal(image, turned(large))]
        seen.add(way)
        if paired:
            assert torch.equal(source, ways[way](small))
        else:
            made = to_uint8(reduced(to_float(image[None]), 4))[0]
            assert torch.equal(source, made)
    assert len(seen) == kinds


def test_sources_are_cut_where_their_squares_are(tmp_path):
    """The place is that of a pixel of the small file, so that both show the same."""
    large, small = pair(tmp_path, "a.png", 20, 16)
    images = data(tmp_path).split("train")
    seen = set()
    for k in range(60):
        batch = images.read([0], [generator(k)])
        image, source = levels(batch["image"])[0], levels(batch["source"])[0]
        places = [(t, u) for t in range(3) for u in range(4) if torch.equal(source, small[:, t : t + 2, u : u + 2])]
        ((top, left),) = places
        assert torch.equal(image, large[:, 4 * top : 4 * top + 8, 4 * left : 4 * left + 8])
        seen.add(places[0])
    assert len(seen) == 12
    batch = data(tmp_path).test_batch(0, 1)
    assert torch.equal(levels(batch["source"])[0], small[:, 1:3, 1:3])
    assert torch.equal(levels(batch["image"])[0], large[:, 4:12, 4:12])


def test_pairs_in_split_folders_and_at_depth(tmp_path):
    pair(tmp_path / "train", "sub/a.png", 8, 8)
    large, small = pair(tmp_path / "test", "b.png", 8, 8)
    noise(tmp_path / "train" / "LR" / "more.png", 2, 2)  # belongs to nothing
    module = data(tmp_path)
    assert [path.name for path in module.split("train").paths] == ["a.png"]
    batch = module.test_batch(0, 1)
    assert torch.equal(levels(batch["image"])[0], large) and torch.equal(levels(batch["source"])[0], small)


def test_a_share_of_the_pairs_is_held_out(tmp_path):
    for k in range(20):
        pair(tmp_path, f"{k}.png", 8, 8)
    module = data(tmp_path, holdout=0.3)
    train, test = (module.split(split) for split in ("train", "test"))
    assert len(train) + len(test) == 20 and min(len(train), len(test)) > 1
    for images in (train, test):
        assert [path.name for path in images.paths] == [path.name for path in images.sources]
        assert {path.parent.name for path in images.paths} == {"HR"}


@pytest.mark.parametrize("sources", [True, False])
def test_div2k_as_it_is_published(tmp_path, sources):
    """0001.png with X4/0001x4.png; where there are no sources they are made."""
    made = {}
    for part, names in (("train", ["0001", "0002"]), ("valid", ["0801"])):
        for name in names:
            large = noise(tmp_path / f"DIV2K_{part}_HR" / f"{name}.png", 8, 8, int(name))
            made[name] = reduced(to_float(large)[None], 4)
            for factor in (2, 4) if sources else ():
                folder = tmp_path / f"DIV2K_{part}_LR_bicubic" / f"X{factor}"
                made[name] = to_float(noise(folder / f"{name}x{factor}.png", 8 // factor, 8 // factor, 9))[None]
    module = data(tmp_path)
    assert [path.name for path in module.split("train").paths] == ["0001.png", "0002.png"]
    batch = module.test_batch(0, 1)
    assert [path.name for path in module.split("test").paths] == ["0801.png"]
    assert torch.equal(levels(batch["source"]), levels(made["0801"]))
    if sources:
        (tmp_path / "DIV2K_train_LR_bicubic" / "X4" / "0001x4.png").unlink()
        problem = "1 of 2 files of DIV2K_train_HR/ have none in DIV2K_train_LR_bicubic/X4/"
        assert refusal(tmp_path).problem.startswith(problem)


@pytest.mark.parametrize("part", ["train", "valid"])
def test_of_a_part_of_div2k_a_share_is_held_out_where_there_is_no_other(tmp_path, part):
    for k in range(20):
        noise(tmp_path / f"DIV2K_{part}_HR" / f"{k:04d}.png", 8, 8, k)
        noise(tmp_path / f"DIV2K_{part}_LR_bicubic" / "X4" / f"{k:04d}x4.png", 2, 2, k)
    train, test = (data(tmp_path, holdout=0.3).split(split) for split in ("train", "test"))
    assert len(train) + len(test) == 20 and len(test) > 0
    assert [path.name for path in test.sources] == [f"{path.stem}x4.png" for path in test.paths]


def test_set5_as_it_is_published(tmp_path):
    """A folder for each factor; pairs are told by the ends of their names."""
    small = {}
    for factor in (2, 4):
        for k in (1, 2):
            name = f"image_SRF_{factor}/img_00{k}_SRF_{factor}"
            noise(tmp_path / f"{name}_HR.png", 8, 8, k)
            small[factor, k] = noise(tmp_path / f"{name}_LR.png", 8 // factor, 8 // factor, 10 * factor + k)
    for factor in (2, 4):
        module = data(tmp_path, scale_factor=factor)
        paths = [path.name for path in module.split("test").paths]
        assert paths == [f"img_00{k}_SRF_{factor}_HR.png" for k in (1, 2)]
        expected = torch.stack([small[factor, 1], small[factor, 2]])
        assert torch.equal(levels(module.split("test").read([0, 1], None)["source"]), expected)
    assert refusal(tmp_path, scale_factor=3, image_size=6).line() == (
        f"error: data.scale_factor=3: the images of {tmp_path} are made for 2, 4. Fix: data.scale_factor=2"
    )


def test_without_both_folders_all_files_are_images(tmp_path):
    noise(tmp_path / "HR" / "a.png", 8, 8)
    noise(tmp_path / "b.png", 8, 8)
    assert len(data(tmp_path).split("train")) == 2 and data(tmp_path).split("train").sources == []


def test_resize_brings_the_shorter_side_down(tmp_path):
    noise(tmp_path / "a.png", 40, 20)
    batch = data(tmp_path, resize=10).test_batch(0, 1)
    with Image.open(tmp_path / "a.png") as image:
        small = torch.from_numpy(np.array(image.resize((20, 10), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    assert torch.equal(levels(batch["image"])[0], small[:, 1:9, 6:14])


def test_grey_pictures_have_one_channel(tmp_path):
    noise(tmp_path / "a.png", 9, 9)
    batch = data(tmp_path, image_channels=1).test_batch(0, 1)
    assert batch["image"].shape == (1, 1, 8, 8) and batch["source"].shape == (1, 1, 2, 2)


def test_a_picture_on_its_side_is_measured_upright(tmp_path):
    """EXIF orientation 6: 20 x 8 stored, 8 x 20 shown; beside a pair that fits only so."""
    for name, (width, height) in {"HR": (32, 8), "LR": (2, 8)}.items():
        noise(tmp_path / name / "a.png", width, height)
    with Image.open(tmp_path / "HR" / "a.png") as image:
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(tmp_path / "HR" / "a.png", exif=exif)
    assert data(tmp_path).test_batch(0, 1)["image"].shape == (1, 3, 8, 8)


def test_small_files_are_named(tmp_path):
    for k, side in enumerate((20, 7, 6, 30)):
        noise(tmp_path / f"{k}.png", 20, side)
    error = refusal(tmp_path)
    assert error.problem == "2 of 4 images are smaller than 8 px, first 1.png (20 x 7)"
    assert error.key == "data.root" and error.fix == "data.image_size=4, or remove them"
    assert len(data(tmp_path, resize=8).split("train")) == 4


@pytest.mark.parametrize(("changed", "line"), [
    ({"image_size": 10}, "error: data.image_size=10: no multiple of data.scale_factor=4. Fix: data.image_size=8"),
    ({"resize": 7}, "error: data.resize=7: squares of 8 px are cut out. Fix: data.resize=8"),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_refused_at_once(tmp_path, changed, line):
    with pytest.raises(UserError) as caught:
        data(tmp_path, **changed)
    assert caught.value.line() == line


def test_pairs_that_do_not_fit_are_named(tmp_path):
    pair(tmp_path, "a.png", 16, 16)
    pair(tmp_path, "bb.png", 12, 16, scale_factor=3)
    error = refusal(tmp_path)
    assert error.problem == "HR/bb.png (12 x 16) is not 4 times LR/bb.png (4 x 5)"
    assert refusal(tmp_path, resize=16).line().startswith("error: data.resize=16: the sources are files. Fix: ")
    (tmp_path / "LR" / "a.png").unlink()
    error = refusal(tmp_path)
    assert error.problem == "1 of 2 files of HR/ have none in LR/, first HR/a.png"


@pytest.mark.parametrize("small", [(33, 51), (32, 50), (33, 50)])  # MATLAB's ceil, floor, round
def test_pairs_that_were_rounded_are_told_and_cut_on_the_grid_of_the_source(tmp_path, capsys, small):
    """131 x 201 is 32.75 x 50.25 at 4 : 1; pixel i of a source is over the pixels 4i to 4i + 3."""
    pair(tmp_path, "a.png", 16, 16)
    large = noise(tmp_path / "HR" / "bb.png", 131, 201, 1)
    source = noise(tmp_path / "LR" / "bb.png", *small, 2)
    module = data(tmp_path)
    batch = module.split("train").read([1], None)
    top, left = (201 // 4 - 2) // 2, (131 // 4 - 2) // 2
    assert torch.equal(levels(batch["image"])[0], large[:, 4 * top : 4 * top + 8, 4 * left : 4 * left + 8])
    assert torch.equal(levels(batch["source"])[0], source[:, top : top + 2, left : left + 2])
    places = [module.split("train").read([1], [generator(k)]) for k in range(300)]
    assert {one["source"].shape for one in places} == {(1, 3, 2, 2)}
    told = capsys.readouterr().err
    assert f"1 of 2 pairs are rounded, first HR/bb.png (131 x 201) and LR/bb.png ({small[0]} x {small[1]}); " in told
    assert told.count("\n") == 1
    noise(tmp_path / "LR" / "bb.png", small[0] + 2, small[1])
    assert refusal(tmp_path).problem == f"HR/bb.png (131 x 201) is not 4 times LR/bb.png ({small[0] + 2} x {small[1]})"


def test_a_pair_with_a_bad_source_is_bad(tmp_path):
    for name in ("a.png", "bb.png"):
        pair(tmp_path, name, 8, 8)
    (tmp_path / "LR" / "a.png").write_bytes(b"")
    assert "LR/a.png (0 bytes)" in refusal(tmp_path).problem
    with pytest.warns(UserWarning, match="1 of 4 images cannot be read and are left out, with 1 that belong to them: "):
        images = data(tmp_path, on_bad_image="skip").split("train")
    assert [path.name for path in images.paths] == ["bb.png"] == [path.name for path in images.sources]


@pytest.mark.parametrize(("changed", "split", "kept"), [
    ({}, "train", True),
    ({"num_workers": 2}, "train", False),  # each worker would hold a copy
    ({"num_workers": 2}, "test", True),
    ({"memory_mb": 1}, "train", False),  # 4 x 400 x 400 x 3 bytes
])  # fmt: skip
def test_files_are_kept_decoded_where_they_fit(tmp_path, changed, split, kept):
    for k in range(4):
        noise(tmp_path / f"{k}.png", 400, 400, k)
    images = data(tmp_path, **changed).split(split)
    first = images.read([0, 1], None)
    for path in images.paths:
        path.unlink()
    if kept:
        assert torch.equal(images.read([0, 1], None)["image"], first["image"])
        assert not torch.equal(images.read([0], [generator(0)])["image"], first["image"][:1])  # another place of it
    else:
        with pytest.raises(UserError, match="0.png cannot be read any more: No such file"):
            images.read([0, 1], None)


def test_readable_in_a_worker(tmp_path):
    noise(tmp_path / "a.png", 20, 20)
    images = data(tmp_path, num_workers=2, turn=True).split("train")
    again = pickle.loads(pickle.dumps(images))
    assert torch.equal(again.read([0], [generator(4)])["source"], images.read([0], [generator(4)])["source"])


def test_fingerprint_tells_sets_apart(tmp_path):
    noise(tmp_path / "a.png", 20, 20)
    first = data(tmp_path).fingerprint("test")
    assert data(tmp_path, flip=True, memory_mb=1).fingerprint("test") == first
    assert (
        len({first, data(tmp_path, scale_factor=2).fingerprint("test"), data(tmp_path, resize=9).fingerprint("test")})
        == 3
    )
    noise(tmp_path / "a.png", 21, 20)
    assert data(tmp_path).fingerprint("test") != first


@pytest.mark.skipif(not (SHARED / "clothing128").is_dir(), reason="no ../shared/data/clothing128")
def test_clothing(tmp_path):
    module = data(SHARED / "clothing128", cache=str(tmp_path), image_size=64)
    assert (len(module.split("train")), len(module.split("test"))) == (3068, 372)
    batch = module.test_batch(0, 4)
    assert batch["image"].shape == (4, 3, 64, 64) and batch["source"].shape == (4, 3, 16, 16)
    assert batch["image"].std() > 0.2
