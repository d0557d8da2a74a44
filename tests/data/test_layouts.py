"""What folders may be called, in every set of files alike: splits and sides by other names, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from atelier.core.errors import UserError
from atelier.data.base import Split
from atelier.data.classes import ClassFolders
from atelier.data.finding import visible_files
from atelier.data.folders import ImageFiles, ImageFolder
from atelier.data.layouts import left_out, role
from atelier.data.pairs import Edges, Pairs
from atelier.data.superres import SuperRes
from atelier.data.unpaired import Unpaired

FOLDERS = ["trainA", "trainB", "testA", "testB"]
OWN = {
    ImageFolder: {},
    ClassFolders: {"n_classes": 2},
    Pairs: {"direction": "a2b", "jitter": 0},
    Edges: {"jitter": 0, "sigma": 1.0, "threshold": 0.03},
    Unpaired: {"folders": FOLDERS, "jitter": 0},
    SuperRes: {"scale_factor": 4, "resize": None, "turn": False},
}


def data(kind: type, root: Path, **changed: object) -> ImageFiles:
    fields = {
        "root": str(root), "holdout": 0.5, "background": "white", "max_pixels": 1 << 20, "on_bad_image": "error",
        "memory_mb": 100, "cache": f"{root}.cache", "image_size": 8, "image_channels": 3, "batch_size": 2, "seed": 0,
        "limit": None, "num_workers": 0, "flip": False, "n_classes": 0, "n_attributes": 0, "conditions": [],
    }  # fmt: skip
    return kind(**fields | OWN[kind] | changed)


def files(root: Path, *names: str) -> Path:
    """Empty files, which are found like others and not yet looked into."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def found(kind: type, root: Path, **changed: object) -> dict[Split, list[tuple[str, ...]]]:
    return {split: [item.names for item in items] for split, items in data(kind, root, **changed).layout().items()}


def refusal(kind: type, root: Path, **changed: object) -> UserError:
    with pytest.raises(UserError) as error:
        data(kind, root, **changed).layout()
    assert "\n" not in error.value.line()
    return error.value


SPLITS = [
    ("Train", "Test"), ("TRAIN", "VAL"), ("training", "testing"), ("train", "valid"), ("train", "Validation"),
    ("train", "eval"), ("train", "dev"), ("Training", "Evaluation"), ("train2017", "val2017"),
    ("train_set", "test_set"), ("Train Images", "Test Images"), ("images-train", "images-val"),
    ("traindata", "testdata"), ("seg_train", "seg_test"), ("faces-train-v2", "faces-val-v2"),
]  # fmt: skip


@pytest.mark.parametrize(("train", "test"), SPLITS)
def test_splits_by_other_names(tmp_path, train, test):
    """The same in a set of images, of classes, of edges, of pairs in one file and in two, of large and small."""
    flat = files(tmp_path / "flat", f"{train}/1.png", f"{test}/2.png")
    for kind in (ImageFolder, Edges, Pairs, SuperRes):
        assert found(kind, flat) == {"train": [(f"{train}/1.png",)], "test": [(f"{test}/2.png",)]}
    sorted_ = files(tmp_path / "classes", *(f"{split}/{one}/1.png" for split in (train, test) for one in "ab"))
    assert found(ClassFolders, sorted_) == {
        split: [(f"{name}/a/1.png",), (f"{name}/b/1.png",)] for split, name in (("train", train), ("test", test))
    }
    inside = files(tmp_path / "in", *(f"{split}/{side}/1.png" for split in (train, test) for side in ("LR", "HR")))
    outside = files(tmp_path / "out", *(f"{side}/{split}/1.png" for split in (train, test) for side in ("LR", "HR")))
    for kind, k in ((Pairs, 1), (SuperRes, -1)):
        sides = ("LR", "HR")[::k]
        assert found(kind, inside)["test"] == [tuple(f"{test}/{side}/1.png" for side in sides)]
        assert found(kind, outside)["train"] == [tuple(f"{side}/{train}/1.png" for side in sides)]


SIDES = [
    ("A", "B"), ("a", "b"), ("x", "y"), ("input", "target"), ("inputs", "Targets"), ("input", "output"),
    ("source", "target"), ("LR", "HR"), ("lr", "hr"), ("LQ", "GT"), ("low", "high"), ("input", "GT"),
]  # fmt: skip


@pytest.mark.parametrize(("a", "b"), SIDES)
def test_sides_by_other_names(tmp_path, a, b):
    root = files(tmp_path, f"{a}/1.jpg", f"{b}/1.png")
    assert found(Pairs, root) == {"train": [(f"{a}/1.jpg", f"{b}/1.png")]}
    assert found(Unpaired, root) == {"train": [(f"{a}/1.jpg",), (f"{b}/1.png",)]}
    if len(a) > 1:  # letters say nothing of sizes
        assert found(SuperRes, root) == {"train": [(f"{b}/1.png", f"{a}/1.jpg")]}


@pytest.mark.parametrize("name", ["{0}{1}", "{0}_{1}", "{0}-{1}", "{1}_{0}"])
@pytest.mark.parametrize(("test", "a", "b"), [("test", "A", "B"), ("Val", "a", "b"), ("valid", "input", "target")])
def test_splits_and_sides_in_one_name(tmp_path, name, test, a, b):
    sides = {
        split: [name.format(word, side) for side in (a, b)] for split, word in (("train", "train"), ("test", test))
    }
    root = files(tmp_path, *(f"{folder}/{split}.png" for split, both in sides.items() for folder in both))
    paths = {split: [f"{folder}/{split}.png" for folder in both] for split, both in sides.items()}
    assert found(Pairs, root) == {split: [tuple(both)] for split, both in paths.items()}
    assert found(Unpaired, root) == {split: [(path,) for path in both] for split, both in paths.items()}
    error = refusal(ImageFolder, root)
    assert "are two sides or domains" in error.problem and error.fix.startswith("data=pairs, ")


def test_of_several_test_splits_the_most_usual_is_taken(tmp_path):
    root = files(tmp_path, *(f"{split}/{split}.png" for split in ("valid", "val", "testing", "train")))
    assert found(ImageFolder, root)["test"] == [("testing/testing.png",)]


@pytest.mark.parametrize(
    "name", ["texts", "trainer", "exam", "values", "contest", "valley", "x4", "ab", "Latest", "device"]
)
def test_other_names_say_nothing(name):
    assert role(name) is None


def test_unpacked_archives_have_a_folder_twice(tmp_path):
    root = files(tmp_path, *(f"{split}/{split}/{one}/1.png" for split in ("seg_train", "seg_test") for one in "ab"))
    assert found(ClassFolders, root)["test"] == [("seg_test/seg_test/a/1.png",), ("seg_test/seg_test/b/1.png",)]


def test_two_sets_with_splits_of_their_own_are_not_mixed(tmp_path):
    names = [f"{one}_{split}/{one}_{split}.png" for one in ("cat", "dog") for split in ("train", "test")]
    error = refusal(ImageFolder, files(tmp_path, *names))
    assert error.problem == "cat_train/ and dog_train/ are training splits both"


def test_a_word_with_other_meanings_is_a_split_only_beside_a_training_split(tmp_path):
    root = files(tmp_path, "valid/1.png", "invalid/2.png")
    assert found(ClassFolders, root)["train"] == [("invalid/2.png",), ("valid/1.png",)]
    trains = files(tmp_path / "vehicles", "train/1.png", "car/2.png")
    assert found(ClassFolders, trains)["train"] == [("car/2.png",), ("train/1.png",)]
    assert "but no train/" in refusal(ImageFolder, files(tmp_path / "half", "Testing/1.png", "more/2.png")).problem


@pytest.mark.parametrize(("kind", "fix"), [
    (ImageFolder, "data=pairs, "), (Edges, "data=pairs, "), (SuperRes, "rename the folder of the sources LR, "),
    (Pairs, "rename the folder of the sources A, "),
])  # fmt: skip
@pytest.mark.parametrize("within", ["", "train/"])
def test_two_folders_of_the_same_file_names_are_no_single_images(tmp_path, kind, fix, within):
    names = [f"{within}{side}/{k}" for side in ("images", "masks") for k in range(3)]
    root = files(tmp_path, *(f"{name}.{'png' if 'masks' in name else 'jpg'}" for name in names))
    error = refusal(kind, root)
    assert error.problem == "images/ and masks/ hold the same file names"
    assert error.fix.startswith(fix) and error.fix.endswith(f"data.root={root}/{within}images")
    files(tmp_path, f"{within}more/0.jpg", f"{within}more/1.jpg", f"{within}more/2.jpg")
    if kind is Pairs:  # of many folders any two
        assert refusal(kind, root).problem == "images/ and masks/ hold the same file names"
    else:  # classes number their files alike
        assert len(found(kind, root)["train"]) == 9


@pytest.mark.parametrize("kind", [ImageFolder, ClassFolders, Pairs, Edges, SuperRes])
def test_splits_that_lie_deeper_are_not_mixed(tmp_path, kind):
    root = files(tmp_path, *(f"images/{split}/{split}.png" for split in ("train", "val")), "labels/1.txt")
    error = refusal(kind, root)
    assert (error.problem, error.fix) == (
        "training and test images lie deeper, in images/", f"data.root={root}/images",
    )  # fmt: skip


def test_two_unknown_domains_are_named_in_the_fix(tmp_path):
    error = refusal(Unpaired, files(tmp_path / "a", "horse/1.png", "zebra/2.png"))
    assert (error.problem, error.fix) == (f"no folder trainA in {tmp_path}/a", "data.folders=[horse,zebra]")
    error = refusal(Unpaired, files(tmp_path / "b", "old man/1.png", "young/2.png"))
    assert error.fix == "'data.folders=[\"old man\",young]'"


def test_a_suffix_counts_only_where_it_tells_two_files_apart(tmp_path):
    root = files(tmp_path / "a", "A/1.jpg", "B/1.PNG", "A/x/2.png", "B/x/2.webp")
    assert found(Pairs, root)["train"] == [("A/1.jpg", "B/1.PNG"), ("A/x/2.png", "B/x/2.webp")]
    root = files(tmp_path / "b", *(f"{side}/1.{suffix}" for side in "AB" for suffix in ("jpg", "png")))
    assert found(Pairs, root)["train"] == [("A/1.jpg", "B/1.jpg"), ("A/1.png", "B/1.png")]
    assert "no partner" in refusal(Pairs, files(root, "A/2.png", "B/3.png")).problem


@pytest.mark.parametrize("small", ["LR/X4", "LR_bicubic/X4", "LR_x4", "lr_bicubic/x4", "X4"])
def test_sources_made_for_a_factor(tmp_path, small):
    root = files(tmp_path, "HR/0001.png", f"{small}/0001x4.png")
    assert found(SuperRes, root) == {"train": [("HR/0001.png", f"{small}/0001x4.png")]}


def test_what_systems_leave_behind_is_no_image_and_no_class(tmp_path):
    left = (
        "__MACOSX/a/._1.png",
        "@eaDir/1.jpg/thumb.jpg",
        "a/@eaDir/t.jpg",
        "lost+found/2.png",
        "Thumbs.db",
        ".hid/3.png",
    )
    root = files(tmp_path, "a/1.png", "b/1.png", *left)
    assert found(ClassFolders, root)["train"] == [("a/1.png",), ("b/1.png",)]
    assert visible_files(root) == ["a/1.png", "b/1.png"]


def test_what_is_left_out_is_told_in_one_line(tmp_path, capsys):
    names = ("train/1.jfif", "train/2.TIF", "test/1.png")
    others = "val/1.png more/a/1.png more/2.png 3.png train/4.gif read.me 5.gif".split()
    root = files(tmp_path, *names, *others)
    assert left_out(str(root), set(names)) == (
        "3 files of formats that are not read (2 .gif, 1 .me), 2 images in more/ (of no split or side), "
        "1 images beside the folders, 1 images in val/ (a further split)"
    )
    module = data(ImageFolder, root)
    for _ in range(2):
        assert [item.name for item in module.files["train"]] == list(names[:2])
    told = capsys.readouterr().err
    assert told.startswith(f"{root}: left out are 3 files") and told.count("\n") == 1
    _ = data(ImageFolder, root / "test").files
    assert capsys.readouterr().err == ""
