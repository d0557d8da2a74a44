"""Lists and folders as people have them: cut, with commas, a level too deep, off by a pixel."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from atelier.core.errors import UserError
from atelier.data.base import DataModule
from atelier.data.pairs import alike
from atelier.runs import build
from tests.compose import composed

NAMES = [f"{k:06d}.jpg" for k in range(1, 12)]
ROWS = [f"{name} 1 -1 1" for name in NAMES]
HEAD = "Black_Hair Male Smiling"


def picture(path: Path, width: int = 178, height: int = 218) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = np.random.default_rng(abs(hash(path.name)) % 99).integers(256, size=(height, width), dtype=np.uint8)
    Image.fromarray(grey).save(path)


def faces(root: Path, text: str, width: int = 178, images: str = "images", name: str = "list_attr_celeba.txt") -> Path:
    for face in NAMES:
        picture(root / images / face, width)
    (root / name).write_text(text)
    return root


def read(page: str, root: Path, *words: str) -> DataModule:
    data = build.data(
        composed(f"data={page}", f"data.root={root}", "data.image_size=16", f"data.cache={root}/c", *words)
    )
    data.prepare_data()
    return data


def refused(page: str, root: Path, *words: str) -> UserError:
    with pytest.raises(UserError) as caught:
        read(page, root, *words).images("train")
    return caught.value


@pytest.mark.parametrize("text", {
    "plain": "\n".join(["11", HEAD, *ROWS]),
    "blank": "\n".join(["11", HEAD, *ROWS, "", " ", ""]),
    "no_count": "\n".join([HEAD, *ROWS]),
    "crlf_bom": "\ufeff" + "\r\n".join(["11", HEAD, *ROWS]),
    "commas": "\n".join(["image_id," + HEAD.replace(" ", ","), *(row.replace(" ", ",") for row in ROWS)]),
}.items(), ids=lambda item: item[0])  # fmt: skip
def test_a_list_of_faces_is_read_however_it_is_written(text: tuple[str, str], tmp_path: Path) -> None:
    """All eleven, by the root and by the folder itself, and the page counts their attributes."""
    faces(tmp_path / "celeba", text[1])
    for root in (tmp_path, tmp_path / "celeba"):
        data = read("celeba", root)
        assert data.n_attributes == 3 and data.known_names == HEAD.split()
        assert len(data.split("train")) + len(data.split("test")) == 11


def test_kaggles_archive_is_read(tmp_path: Path) -> None:
    rows = [row.replace(" ", ",") for row in ROWS]
    text = "\n".join(["image_id," + HEAD.replace(" ", ","), *rows])
    faces(tmp_path, text, images="img_align_celeba/img_align_celeba", name="list_attr_celeba.csv")
    parts = [f"{name},{2 if k > 8 else 0}" for k, name in enumerate(NAMES)]
    (tmp_path / "list_eval_partition.csv").write_text("\n".join(["image_id,partition", *parts]))
    data = read("celeba", tmp_path)
    assert (len(data.split("train")), len(data.split("test"))) == (9, 2)


@pytest.mark.parametrize(("text", "problem"), {
    "\n".join(["11", HEAD, *ROWS])[:-3]: "has not 1 or -1 for each of 3 attributes at 000011.jpg",
    "\n".join(["11", HEAD, *ROWS[:3], ROWS[3][:-2], *ROWS[4:]]): "at 000004.jpg",
    "\n".join(["11", HEAD, *ROWS[:3], ROWS[1], *ROWS[3:]]): "has 000002.jpg twice",
    "": "is empty",
    "11\n": "is empty",
}.items(), ids=["end", "row", "twice", "empty", "count"])  # fmt: skip
def test_a_list_that_was_cut_is_one_line(text: str, problem: str, tmp_path: Path) -> None:
    faces(tmp_path / "celeba", text)
    assert problem in refused("celeba", tmp_path).problem


def test_faces_of_another_size_are_told_the_crop(tmp_path: Path) -> None:
    faces(tmp_path / "celeba", "\n".join(["11", HEAD, *ROWS]), width=64)
    error = refused("celeba", tmp_path)
    assert (error.key, error.fix) == ("data.crop", "data.crop=none") and "64 x 218" in error.problem
    assert read("celeba", tmp_path, error.fix)


@pytest.mark.parametrize("size", [(64, 64), (409, 687)])  # made smaller; "in the wild"
def test_one_face_of_another_size_is_named(size: tuple[int, int], tmp_path: Path) -> None:
    """Wherever it stands in the list: it would be cut at the wrong place, or stop the training in the middle."""
    faces(tmp_path / "celeba", "\n".join(["11", HEAD, *ROWS]))
    picture(tmp_path / "celeba" / "images" / NAMES[7], *size)
    error = refused("celeba", tmp_path, "data.crop=148")
    assert error.line() == (
        "error: data.crop=148: 1 of 11 photographs have not the 178 x 218 pixels that it is made for, first "
        f"{NAMES[7]} ({size[0]} x {size[1]}). Fix: data.crop=none"
    )
    assert len(read("celeba", tmp_path, "data.crop=none").split("train")) == 10


@pytest.mark.parametrize(("row", "problem"), [
    ("000003.jpg", "list_eval_partition.txt has not 0, 1 or 2 at 000003.jpg"), ("000003.jpg train", "at 000003.jpg"),
    ("000001.jpg 2", "list_eval_partition.txt has 000001.jpg twice"),
])  # fmt: skip
def test_a_list_of_parts_that_was_cut_is_one_line(row: str, problem: str, tmp_path: Path) -> None:
    faces(tmp_path / "celeba", "\n".join(["11", HEAD, *ROWS]), images="img_align_celeba")
    parts = ["000001.jpg 0", "000002.jpg 2", row]
    (tmp_path / "celeba" / "list_eval_partition.txt").write_text("\n".join(parts))
    assert problem in refused("celeba", tmp_path).problem


@pytest.mark.timeout(20)
def test_what_is_no_photograph_is_named_and_what_is_not_used_is_counted(tmp_path: Path, capsys) -> None:
    faces(tmp_path / "celeba", "\n".join(["11", HEAD, *ROWS[:10]]), images="img_align_celeba")
    parts = [f"{name} {k // 3}" for k, name in enumerate(NAMES[:8])]
    (tmp_path / "celeba" / "list_eval_partition.txt").write_text("\n".join(parts))
    (tmp_path / "celeba" / "notes.md").touch()
    data = read("celeba", tmp_path)
    assert (len(data.split("train")), len(data.split("test"))) == (3, 2)
    assert capsys.readouterr().err == (
        f"{tmp_path}: left out are 3 photographs of the validation part, 2 photographs that list_eval_partition.txt "
        "has not, 1 files of formats that are not read (1 .md), 1 images that belong to no other in img_align_celeba/\n"
    )
    face = tmp_path / "celeba" / "img_align_celeba" / NAMES[0]
    for make, said in ((os.mkfifo, "no file, but"), (os.mkdir, "no file, but"), (dangling, "No such file")):
        face.unlink() if not face.is_dir() else face.rmdir()
        make(face)
        assert f"1 of 5 photographs cannot be read, first {NAMES[0]} ({said}" in refused("celeba", tmp_path).problem


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def test_faces_a_level_deeper_are_named(tmp_path: Path) -> None:
    faces(tmp_path / "down" / "celeba", "\n".join(["11", HEAD, *ROWS]))
    assert refused("celeba", tmp_path).fix == f"data.root={tmp_path / 'down'}"


@pytest.mark.parametrize("page", ["pairs", "unpaired", "images"])
def test_sides_a_level_deeper_are_named(page: str, tmp_path: Path) -> None:
    for side in ("trainA", "trainB"):
        for k in range(3):
            picture(tmp_path / "down" / side / f"{k}.png", 16, 16)
    assert refused(page, tmp_path).fix == f"data.root={tmp_path / 'down'}"


def test_sides_that_share_no_name_are_no_pairs(tmp_path: Path) -> None:
    for k in range(4):
        picture(tmp_path / ("trainA", "trainB")[k % 2] / f"{k}.png", 16, 16)
    assert refused("pairs", tmp_path).fix.startswith("data=unpaired")
    assert read("unpaired", tmp_path)


@pytest.mark.parametrize(("a", "b", "fits"), [
    ((200, 133), (100, 66), True), ((200, 133), (100, 67), True), ((100, 66), (200, 133), True),
    ((200, 133), (100, 64), False), ((8, 8), (8, 9), False), ((1000, 750), (100, 75), True),
    ((1000, 750), (100, 74), False), ((30, 40), (40, 30), False), ((333, 500), (67, 100), True),
])  # fmt: skip
def test_rounding_to_whole_pixels_is_no_other_shape(a: tuple[int, int], b: tuple[int, int], fits: bool) -> None:
    assert alike(a, b) == alike(b, a) == fits
