"""Folders of images: what is found, in which order and split, what is refused, and what a batch holds."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
import socket
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import atelier.data.checking as checking
from atelier.core import lines
from atelier.core.errors import UserError
from atelier.core.rng import generator
from atelier.data.base import MemoryImages
from atelier.data.checking import check_files
from atelier.data.classes import ClassFolders, n_folders
from atelier.data.finding import Item, image_files, natural
from atelier.data.folders import ImageFiles, ImageFolder, hold_out
from atelier.data.reading import SUFFIXES

SHARED = Path(__file__).parents[3] / "shared" / "data"


def image_file(path: Path, grey: int = 0, size: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (grey, 0, 255 - grey)).save(path, "PNG")
    return path


def data(kind: type, root: Path, **changed: object) -> ImageFiles:
    fields = {
        "root": str(root), "holdout": 0.0, "background": "white", "max_pixels": 1 << 20,
        "on_bad_image": "error", "memory_mb": 100, "cache": f"{root}.cache",
        "image_size": 4, "image_channels": 3, "batch_size": 2, "seed": 0, "limit": None,
        "num_workers": 0, "flip": False, "n_classes": 0, "n_attributes": 0, "conditions": [],
    }  # fmt: skip
    return kind(**fields | changed)


def refusal(kind: type, root: Path, **changed: object) -> UserError:
    with pytest.raises(UserError) as error:
        data(kind, root, **changed).split("train")
    assert "\n" not in error.value.line()
    return error.value


def test_numbers_in_names_count_as_numbers():
    names = [
        "a10.png",
        "a2.png",
        "b1.png",
        "a02.png",
        "1.png",
        "10/1.png",
        "2/1.png",
        "\udcff.png",
        "é.png",
        "A.png",
    ]
    got = sorted(names, key=natural)
    assert got[:3] == ["1.png", "2/1.png", "10/1.png"]
    assert got[3:7] == ["A.png", "a02.png", "a2.png", "a10.png"]


def test_found_are_visible_image_files_at_any_depth(tmp_path):
    for name in ("2.png", "10.PNG", "sub/deep/1.webp", ".hidden.png", ".git/3.png", "__MACOSX/._4.jpg"):
        image_file(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    assert image_files(tmp_path) == ["2.png", "10.PNG", "sub/deep/1.webp"]


@pytest.mark.timeout(20)
def test_links_pipes_and_sockets_do_no_harm(tmp_path, monkeypatch):
    root = tmp_path / "root"
    image_file(root / "a" / "1.png")
    image_file(tmp_path / "elsewhere" / "2.png")
    (root / "loop").symlink_to(root)
    (root / "a" / "up").symlink_to("..")
    (root / "slash").symlink_to("/")
    (root / "self.png").symlink_to("self.png")
    (root / "broken.png").symlink_to("nowhere")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "file.png").symlink_to(tmp_path / "elsewhere" / "2.png")
    os.mkfifo(root / "pipe.png")
    with socket.socket(socket.AF_UNIX) as listening:
        monkeypatch.chdir(root)  # the path of a socket is short
        listening.bind("socket.png")
        assert image_files(root) == ["a/1.png", "file.png", "linked/2.png"]


def test_any_file_name_is_read_and_printed(tmp_path):
    names = [
        b"\xff.png",
        b"line\nbreak.png",
        b"-rf.png",
        b"x" * 251 + b".png",
        "\U0001f600.png".encode(),
        b"A.png",
        b"a.png",
    ]
    for k, name in enumerate(names):
        image_file(tmp_path / os.fsdecode(name), grey=k)
    images = data(ImageFolder, tmp_path).split("train")
    assert len(images) == 7
    assert {os.fsencode(path.name) for path in images.paths} == set(names)
    batch = images.read(list(range(7)), None)
    assert sorted((batch["image"][:, 0, 0, 0] * 127.5 + 127.5).round().int().tolist()) == list(range(7))
    assert len(json.loads(next(Path(f"{tmp_path}.cache").iterdir()).read_text())["files"]) == 7

    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(b"")
    refusal(ImageFolder, tmp_path).line().encode("utf-8")  # can be printed


def test_a_batch_holds_the_files_in_the_order_asked_for(tmp_path):
    for k in range(12):
        image_file(tmp_path / f"{k}.png", grey=20 * k)
    batch = data(ImageFolder, tmp_path).split("train").read([11, 0, 3], None)
    assert batch["image"].shape == (3, 3, 4, 4) and batch["image"].dtype == torch.float32
    assert batch["index"].tolist() == [11, 0, 3]
    torch.testing.assert_close(batch["image"][:, 0, 0, 0], torch.tensor([220.0, 0, 60]) / 127.5 - 1)
    assert set(batch) == {"image", "index"}


def test_flip_follows_the_generators(tmp_path):
    tmp_path.joinpath("a").mkdir()
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(tmp_path / "a" / "1.png")
    images = data(ImageFolder, tmp_path, flip=True).split("train")
    plain = images.read([0], None)["image"]
    got = [images.read([0], [generator(k)])["image"] for k in range(20)]
    mirrored = [torch.equal(one, plain.flip(-1)) for one in got]
    assert 3 < sum(mirrored) < 17
    assert all(torch.equal(one, plain) for one, other in zip(got, mirrored, strict=True) if not other)


@pytest.mark.parametrize("test", ["test", "val", "validation"])
def test_split_folders(tmp_path, test):
    image_file(tmp_path / "train" / "x" / "1.png")
    image_file(tmp_path / "train" / "2.png")
    image_file(tmp_path / test / "3.png")
    found = data(ImageFolder, tmp_path).layout()
    assert [item.name for item in found["train"]] == ["train/2.png", "train/x/1.png"]
    assert [item.name for item in found["test"]] == [f"{test}/3.png"]


def test_train_alone_is_held_out_from(tmp_path):
    for k in range(40):
        image_file(tmp_path / "train" / f"{k}.png")
    image_file(tmp_path / "other.png")
    found = data(ImageFolder, tmp_path, holdout=0.25).index
    assert len(found["train"]) + len(found["test"]) == 40 and 3 <= len(found["test"]) <= 18


def test_a_test_folder_without_train_is_refused(tmp_path):
    image_file(tmp_path / "test" / "1.png")
    assert "no train/" in str(refusal(ImageFolder, tmp_path))


def test_holding_out_depends_on_each_path_alone():
    items = [Item(f"{k}.png") for k in range(5000)]
    split = hold_out(items, 0.1)
    assert abs(len(split["test"]) - 500) < 4 * np.sqrt(450)
    assert sorted(split["train"] + split["test"]) == sorted(items)
    assert split["train"] == sorted(split["train"], key=lambda item: natural(item.name))
    half = hold_out(items[:2500], 0.1)
    assert set(half["test"]) == set(split["test"]) & set(items[:2500])
    assert [item.name for item in split["test"][:3]] == [
        "0.png",
        "6.png",
        "8.png",
    ]  # sha256, on every machine


@pytest.mark.parametrize("share", [1e-9, 0.5, 1.0])
def test_both_splits_have_an_image_where_there_are_two(share):
    split = hold_out([Item("a"), Item("b")], share)
    assert len(split["train"]) == len(split["test"]) == 1


@pytest.mark.parametrize("share", [1e-9, 0.5, 1.0])
def test_the_only_image_of_a_class_trains(tmp_path, share):
    items = [Item("a/1", 0), Item("a/2", 0), Item("b/1", 1), *(Item(f"c/{k}", 2) for k in range(9))]
    split = hold_out(items, share)
    assert {item.label for item in split["train"]} == {0, 1, 2} and {item.label for item in split["test"]} == {0, 2}
    assert split["train"] == [item for item in items if item in split["train"]]  # in their order
    module = data(ClassFolders, classes(tmp_path, a=2, b=1, c=9), n_classes=3, holdout=share)
    assert module.split("train").fields["label"].bincount()[1] == 1
    assert 1 not in module.split("test").fields["label"]
    one_each = classes(tmp_path / "few", a=1, b=1)
    error = refusal(ClassFolders, one_each, n_classes=2, holdout=share)
    assert error.problem == "no readable image is left to test" and error.fix.startswith("data.holdout=0 ")


def test_no_holdout_tests_on_the_training_images(tmp_path):
    image_file(tmp_path / "1.png")
    module = data(ImageFolder, tmp_path, holdout=0.0)
    assert len(module.split("train")) == len(module.split("test")) == 1
    assert "left to" in str(refusal(ImageFolder, tmp_path, holdout=0.5))


@pytest.mark.parametrize("kind", [ImageFolder, ClassFolders])
def test_a_missing_root_names_its_neighbour(tmp_path, kind):
    image_file(tmp_path / "flowers" / "1.png")
    error = refusal(kind, tmp_path / "flower")
    assert (error.key, error.problem) == ("data.root", "no such folder")
    assert f"data.root={tmp_path}/flowers" in error.fix
    assert refusal(kind, tmp_path / "flowers" / "1.png").problem == "this is no folder"


@pytest.mark.parametrize("files", [[], [".only_hidden.png"], ["only.txt", "only.gif"]])
def test_no_images_says_what_was_looked_for(tmp_path, files):
    (tmp_path / "empty").mkdir()
    for name in files:
        (tmp_path / "empty" / name).write_bytes(b"")
    error = refusal(ImageFolder, tmp_path / "empty")
    assert error.problem == f"0 images ({' '.join(SUFFIXES)}) under {tmp_path}/empty"


@pytest.mark.parametrize("file", ["dataset_dict.json", "state.json"])
def test_a_dataset_saved_to_disk_is_told_its_page(tmp_path, file):
    (tmp_path / file).write_text("{}")
    (tmp_path / "data-00000-of-00001.arrow").write_bytes(b"")
    error = refusal(ImageFolder, tmp_path)
    assert error.problem == "a Hugging Face dataset saved to disk, no image files" and "data=hugging_face" in error.fix


def classes(root: Path, **numbers: int) -> Path:
    for name, n in numbers.items():
        for k in range(n):
            image_file(root / name / f"{k}.png", grey=k)
    return root


def test_labels_number_the_class_folders(tmp_path):
    classes(tmp_path, c2=3, c10=2, c1=1)
    module = data(ClassFolders, tmp_path, n_classes=3)
    assert module.provides == {"label"}
    batch = module.split("test").read(list(range(6)), None)
    assert batch["label"].tolist() == [0, 1, 1, 1, 2, 2]  # c1, c2, c10
    assert batch["label"].dtype == torch.int64


def test_classes_as_attributes(tmp_path):
    """Each image has the one that is its class; it is to become another: at test each in turn, else another image's."""
    module = data(ClassFolders, classes(tmp_path, happy=4, sad=3, angry=2), n_classes=3, n_attributes=3)
    assert module.provides == {"label", "attributes", "target"} and module.attribute_names == ["angry", "happy", "sad"]
    batch = module.split("test").read(list(range(9)), None)
    assert batch["label"].tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert torch.equal(batch["attributes"], torch.eye(3)[batch["label"]])
    assert batch["target"].argmax(1).tolist() == [1, 2, 2, 0, 2, 0, 0, 1, 0] and (batch["target"].sum(1) == 1).all()
    drawn = module.split("train").read([0] * 400, [generator(k) for k in range(400)])["target"]
    assert (drawn.sum(1) == 1).all()
    assert (drawn.mean(0) - torch.tensor([1, 4, 3]) / 8).abs().max() < 0.08  # of the 8 others 1, 4 and 3


@pytest.mark.parametrize(("n_classes", "n_attributes", "fix"), [
    (2, 3, "data.n_classes=3, or data.n_attributes=2"), (1, 1, "data.n_attributes=0"), (1, 4, "data.n_attributes=0"),
])  # fmt: skip
def test_attributes_of_class_folders_are_the_classes(tmp_path, n_classes, n_attributes, fix):
    problem = f"attributes are the classes here, and there are {n_classes}"
    with pytest.raises(UserError) as error:
        data(ClassFolders, tmp_path, n_classes=n_classes, n_attributes=n_attributes)
    assert error.value.line() == f"error: data.n_attributes={n_attributes}: {problem}. Fix: {fix}"


def test_each_class_is_held_out_from(tmp_path):
    classes(tmp_path, a=30, b=2)
    module = data(ClassFolders, tmp_path, n_classes=2, holdout=0.2)
    labels = {split: module.split(split).fields["label"].bincount().tolist() for split in ("train", "test")}
    assert np.add(labels["train"], labels["test"]).tolist() == [30, 2]
    assert labels["train"][1] == labels["test"][1] == 1


def test_class_folders_in_split_folders(tmp_path):
    classes(tmp_path / "train", a=2, b=3)
    classes(tmp_path / "validation", b=4)
    module = data(ClassFolders, tmp_path, n_classes=2)
    assert module.split("train").fields["label"].tolist() == [0, 0, 1, 1, 1]
    assert module.split("test").fields["label"].tolist() == [1, 1, 1, 1]
    classes(tmp_path / "validation", c=1)
    assert "validation/ has the class c" in str(refusal(ClassFolders, tmp_path, n_classes=2))


@pytest.mark.parametrize("asked", [0, 2, 12])
def test_the_number_of_classes_is_told(tmp_path, asked):
    classes(tmp_path, a=1, b=1, c=1)
    error = refusal(ClassFolders, tmp_path, n_classes=asked)
    assert (error.key, error.fix) == ("data.n_classes", "data.n_classes=3")


def test_a_class_folder_without_images_is_no_class(tmp_path, capsys):
    classes(tmp_path, a=1, c=2)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "readme.txt").write_text("nothing")
    error = refusal(ClassFolders, tmp_path, n_classes=3)
    assert error.problem == f"{tmp_path} has 2 class folders (a, c), 1 without images"
    assert error.fix == "data.n_classes=2"
    assert n_folders(str(tmp_path)) == 2  # what data.n_classes is where nobody says
    assert data(ClassFolders, tmp_path, n_classes=2).split("train").fields["label"].tolist() == [0, 1, 1]
    assert f"{tmp_path}: b: no images, so no class\n" in capsys.readouterr().err
    (tmp_path / "b" / "d").mkdir()
    assert "0 images (.png" in str(refusal(ClassFolders, tmp_path / "b", n_classes=1))


def test_a_class_of_which_no_image_can_be_read_is_refused(tmp_path):
    classes(tmp_path, a=2, b=1)
    (tmp_path / "b" / "0.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="1 of 3 images"):
        error = refusal(ClassFolders, tmp_path, n_classes=2, on_bad_image="skip")
    assert error.problem == "no image of the class b can be read"


def test_a_root_without_class_folders_is_refused(tmp_path):
    image_file(tmp_path / "flat" / "1.png")
    assert "no class folders" in str(refusal(ClassFolders, tmp_path / "flat", n_classes=1))


def with_bad_files(root: Path) -> Path:
    for k in range(10):
        image_file(root / f"{k}.png")
    (root / "2.png").write_bytes(b"")
    (root / "3.png").write_bytes(b"<html>")
    (root / "5.png").write_bytes((root / "4.png").read_bytes()[:-20])
    image_file(root / "7.png", size=2000)
    return root


def test_bad_files_stop_the_start_with_one_line(tmp_path):
    error = refusal(ImageFolder, with_bad_files(tmp_path))
    assert error.problem.startswith("4 of 10 images cannot be read: 2.png (0 bytes); 3.png (not a PNG")
    assert "5.png (" in error.problem and "7.png" not in error.problem and error.fix.endswith("data.on_bad_image=skip")


def test_bad_files_are_skipped_and_counted_once(tmp_path):
    module = data(ImageFolder, with_bad_files(tmp_path), on_bad_image="skip")
    with pytest.warns(UserWarning, match=r"4 of 10 images cannot be read and are left out: 2.png \(0 bytes\)") as told:
        module.prepare_data()
        assert [path.name for path in module.split("train").paths] == [f"{k}.png" for k in (0, 1, 4, 6, 8, 9)]
        module.split("test")
    assert len(told) == 1
    assert module.test_batch(0, 6)["image"].shape == (6, 3, 4, 4)


def test_what_is_held_out_is_readable(tmp_path):
    """The one file with the smallest hash of its path would be the test split, but cannot be read."""
    names = [f"{k}.png" for k in range(12)]
    for name in names:
        image_file(tmp_path / name)
    first = hold_out([Item(name) for name in names], 1e-9)["test"][0].name
    (tmp_path / first).write_bytes(b"")
    with pytest.warns(UserWarning, match="1 of 12 images"):
        module = data(ImageFolder, tmp_path, on_bad_image="skip", holdout=1e-9)
        assert (len(module.split("train")), len(module.split("test"))) == (10, 1)


@pytest.mark.parametrize(("split", "problem"), [("train", "training"), ("test", "test")])
def test_a_split_without_images_is_refused_before_training(tmp_path, monkeypatch, split, problem):
    module = data(ImageFolder, classes(tmp_path, a=2))
    full = module.images("train")
    empty = MemoryImages(torch.zeros(0, 3, 4, 4, dtype=torch.uint8), {}, False)
    monkeypatch.setattr(module, "images", lambda asked: empty if asked == split else full)
    monkeypatch.setattr(module, "trainer", SimpleNamespace(world_size=1), raising=False)
    with pytest.raises(UserError) as error:
        module.setup("fit")
    assert error.value.problem == f"it has no {problem} images"


def test_only_new_and_changed_files_are_checked_again(tmp_path, monkeypatch):
    root, cache = classes(tmp_path / "root", a=5), tmp_path / "cache"
    asked: list[str] = []
    monkeypatch.setattr(checking, "check", lambda path, max_pixels: asked.append(path.name) or "")
    names = image_files(root)

    def run(max_pixels: int = 100) -> list[str]:
        asked.clear()
        check_files(root, names, max_pixels, cache)
        return sorted(asked)

    assert run() == ["0.png", "1.png", "2.png", "3.png", "4.png"]
    assert run() == []
    os.utime(root / "a" / "3.png", ns=(1, 1))
    assert run() == []  # the same content
    image_file(root / "a" / "1.png", size=9)
    assert run() == ["1.png"]
    status = os.stat(root / "a" / "2.png")
    (root / "a" / "2.png").write_bytes(bytes(status.st_size))
    os.utime(root / "a" / "2.png", ns=(status.st_atime_ns, status.st_mtime_ns))  # as if nothing had happened
    assert run() == ["2.png"]
    assert len(run(max_pixels=101)) == 5  # another rule
    next(cache.iterdir()).write_text('{"rule": ')
    assert len(run(max_pixels=101)) == 5
    assert [file.suffix for file in cache.iterdir()] == [".json"]


def test_checking_that_takes_long_is_told_where_no_output_is_parsed(tmp_path, monkeypatch, capsys):
    root, clock = classes(tmp_path / "root", a=5), itertools.count(0, 3)  # 3 s an image
    monkeypatch.setattr(lines.time, "monotonic", lambda: float(next(clock)))
    check_files(root, image_files(root), 100, tmp_path / "cache")
    told = capsys.readouterr()
    assert told.out == "" and told.err == f"{root}: checking 5 images, once for all runs: 1 done, 12 s left\n"


def test_a_remembered_refusal_is_refused_again(tmp_path):
    root = with_bad_files(tmp_path)
    assert refusal(ImageFolder, root).problem == refusal(ImageFolder, root).problem


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path):
    root = classes(tmp_path / "root", a=2)
    module = data(ImageFolder, root, cache="/dev/null/cache")
    assert len(module.split("train")) == 2


@pytest.mark.parametrize(
    ("changed", "split", "kept"),
    [
        ({}, "train", True),
        ({"num_workers": 2}, "train", False),  # each worker would hold a copy
        ({"num_workers": 2}, "test", True),
        ({"memory_mb": 1, "image_size": 512}, "train", False),
    ],
)
def test_images_are_kept_where_they_fit(tmp_path, changed, split, kept):
    images = data(ImageFolder, classes(tmp_path / "root", a=3), **changed).split(split)
    first = images.read([0, 1], None)
    for path in images.paths:
        path.unlink()
    if kept:
        assert torch.equal(images.read([0, 1], None)["image"], first["image"])
    else:
        with pytest.raises(UserError, match="0.png cannot be read any more: No such file"):
            images.read([0, 1], None)


def test_readable_in_a_worker(tmp_path):
    images = data(ImageFolder, classes(tmp_path / "root", a=3), num_workers=2).split("train")
    again = pickle.loads(pickle.dumps(images))
    assert torch.equal(again.read([2], None)["image"], images.read([2], None)["image"])


def test_a_set_is_its_content(tmp_path):
    """Copied, touched and read from another cache it is the same; with one other pixel of the same name it is not."""
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    root = tmp_path / "a"
    (root / "x").mkdir(parents=True)
    for k in range(3):
        Image.fromarray(pixels + k).save(root / "x" / f"{k}.png", "BMP")  # all of one length
    first = data(ImageFolder, root).fingerprint("train")
    shutil.copytree(root, tmp_path / "b")
    os.utime(root / "x" / "0.png", ns=(1, 1))
    assert data(ImageFolder, root).fingerprint("train") == first
    assert data(ImageFolder, tmp_path / "b").fingerprint("train") == first
    pixels[3, 3, 2] = 200
    Image.fromarray(pixels + 1).save(root / "x" / "1.png", "BMP")
    assert (root / "x" / "1.png").stat().st_size == (tmp_path / "b" / "x" / "1.png").stat().st_size
    assert data(ImageFolder, root).fingerprint("train") != first
    (tmp_path / "b" / "x" / "0.png").rename(tmp_path / "b" / "x" / "4.png")
    assert data(ImageFolder, tmp_path / "b").fingerprint("train") != first


def test_a_plain_scan_warns_of_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data(ImageFolder, classes(tmp_path / "root", a=3)).test_batch(0, 3)


@pytest.mark.skipif(not (SHARED / "clothing128").is_dir(), reason="no ../shared/data/clothing128")
def test_clothing(tmp_path):
    module = data(ClassFolders, SHARED / "clothing128", n_classes=10, cache=str(tmp_path), image_size=32)
    assert (len(module.split("train")), len(module.split("test"))) == (3068, 372)
    batch = module.test_batch(0, 372)
    assert batch["label"].bincount(minlength=10).min() > 0
    assert batch["image"].std() > 0.3


@pytest.mark.skipif(not (SHARED / "fluent_emoji128").is_dir(), reason="no ../shared/data/fluent_emoji128")
def test_transparent_emoji(tmp_path):
    backgrounds = {}
    for background in ("white", "black"):
        module = data(
            ImageFolder,
            SHARED / "fluent_emoji128",
            background=background,
            cache=str(tmp_path),
            holdout=0.1,
            image_size=64,
        )
        backgrounds[background] = module.split("train").read(list(range(0, 2000, 20)), None)["image"]
    assert len(module.split("train")) + len(module.split("test")) == 2980
    white, black = (backgrounds[name][:, :, 0, 0] for name in ("white", "black"))
    empty = (white == 1).all(1)  # most, but not all, leave their corner empty
    assert empty.float().mean() > 0.5 and (black[empty] == -1).all()
