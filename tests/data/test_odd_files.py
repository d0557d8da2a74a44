"""Folders as people have them: nothing crashes, hangs, or is lost without a line (tests/fuzz_files.py draws them)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from atelier.core.errors import UserError
from atelier.data.checking import check_files
from atelier.data.finding import found_under, passed_over, subfolders
from atelier.data.layouts import left_out
from atelier.data.reading import decode
from atelier.requests.files import result_names, sources
from tests import fuzz_files, odd_files

CASES = Path(__file__).parents[3] / "shared" / "cases" / "make_inputs.py"


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """One that nobody may enter, unlike pytest's: some folders are read without root's rights."""
    folder = Path(tempfile.mkdtemp(prefix="odd-files-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_of_odd_files_every_one_is_accounted_for(open_folder: Path) -> None:
    table, faults = fuzz_files.fuzz(60, 7, open_folder, most=7)
    assert faults == []
    assert {page for page, _, _ in table} == {page.__name__ for page in fuzz_files.SETS}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [11, 12])
def test_of_a_thousand_odd_files_every_one_is_accounted_for(open_folder: Path, seed: int) -> None:
    _, faults = fuzz_files.fuzz(1000, seed, open_folder)
    assert faults == []


def page_of(name: str) -> str:
    """The set that a folder of CASES is for."""
    begins = {"celeba": "celeba", "pairs": "pairs", "unpaired": "unpaired", "horses": "unpaired", "sr_": "superres"}
    if name.endswith("_classes") or name in ("digits", "yesno", "spaced", "empty_class", "macosx"):
        return "classes"
    return next((page for start, page in begins.items() if name.startswith(start)), "images")


@pytest.mark.slow
@pytest.mark.skipif(not CASES.is_file(), reason="no ../shared/cases")
def test_sets_that_once_failed_are_read_or_refused_in_a_line(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(CASES), str(tmp_path / "cases")], check=True, capture_output=True)
    told = {}
    for root in sorted((tmp_path / "cases").iterdir()):
        if root.name not in ("scratch", "cache"):
            told[root.name] = fuzz_files.counted_in(page_of(root.name), root)
    refused = {
        "bad",
        "huge",
        "large",
        "pairs_one",
        "celeba_cut",
        "celeba_empty",
        "celeba_badjpg",
        "horses",
        "one",
        "odd",
    }
    assert {name for name, found in told.items() if found.what == "fault"} == set(), told
    assert {name for name, found in told.items() if found.what == "refused"} <= refused, told


def small(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (9, 9, 9)).save(path, "PNG")
    return path


def test_what_is_passed_over_is_counted_by_what_it_is(tmp_path: Path) -> None:
    for name in ("1.png", ".hidden.png", ".git/2.png", "__MACOSX/3.png", "._1.png"):
        small(tmp_path / name)
    for name in (".DS_Store", "Thumbs.db", "note.txt"):
        (tmp_path / name).touch()
    for name, target in (("gone.png", "nowhere"), ("itself.png", "itself.png"), ("up", ".")):
        (tmp_path / name).symlink_to(target)
    os.mkfifo(tmp_path / "pipe.png")
    assert sorted(passed_over(found_under(tmp_path))) == [
        "1 files of formats that are not read (1 .txt)", "1 pipes, sockets or devices", "2 hidden files or folders",
        "2 links that lead nowhere",
    ]  # fmt: skip


def test_all_that_is_left_out_is_counted(tmp_path: Path) -> None:
    """However many folders it lies in; not what is read under the name of a link; beside a file, or beside folders."""
    more = [f"more{k}/{j}.png" for k in range(6) for j in range(2)]
    for name in ("train/1.png", "train/2.png", "LR/1.png", "0.png", *more):
        small(tmp_path / name)
    small(tmp_path / "pool" / "9.png")
    (tmp_path / "train" / "linked").symlink_to("../pool")
    told = left_out(str(tmp_path), {"train/1.png", "train/linked/9.png"})
    assert told == (
        "2 images in more0/ (of no split or side), 2 images in more1/ (of no split or side), 2 images in more2/ (of no "
        "split or side), 2 images in more3/ (of no split or side), 7 images in 5 other places"
    )
    used = {"train/1.png", "train/linked/9.png", *more}
    assert left_out(str(tmp_path), used) == (
        "1 images beside the folders, 1 images in LR/ (of no split or side), 1 images that belong to no other in train/"
    )


def test_a_link_to_what_a_folder_lies_in_is_no_class(tmp_path: Path) -> None:
    small(tmp_path / "cat" / "1.png")
    (tmp_path / "again").symlink_to(".")
    (tmp_path / "up").symlink_to("..")
    assert subfolders(tmp_path) == ["cat"]


def test_a_folder_that_cannot_be_listed_is_told_by_the_key_that_named_it(tmp_path: Path, monkeypatch) -> None:
    small(tmp_path / "set" / "1.png")

    def refuse(*_: object) -> None:
        raise OSError(36, "File name too long")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError) as caught:
        sources(str(tmp_path / "set"), tmp_path / "out")
    assert (caught.value.key, caught.value.problem) == ("source", "File name too long")
    assert caught.value.fix == "another source, or remove that folder"


@pytest.mark.parametrize(("names", "results"), [
    (["a.png", "b.jpg"], ["a.png", "b.png"]),
    (["a.png", "a.jpg", "grid.jpg"], ["a.png.png", "a.jpg.png", "grid.jpg.png"]),
    (["a.png", "a.jpg", "a.png.jpg"], ["a.png.png", "a.jpg.png", "a.png.jpg.png"]),
    (["x.jpg", "x.png/y.jpg"], ["x.jpg.png", "x.png/y.png"]),
])  # fmt: skip
def test_results_of_files_have_names_of_their_own(names: list[str], results: list[str]) -> None:
    assert result_names(names) == results


def test_a_result_with_both_suffixes_may_be_too_long_a_name() -> None:
    long = ["x" * 251 + ".png", "x" * 251 + ".jpg"]
    names = result_names(long)
    assert len(set(names)) == 2 and all(len(name) == 20 for name in names)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_transparent_level_of_few_bits_is_on_the_scale_of_the_pixels(tmp_path: Path, depth: int) -> None:
    levels = (np.arange(16) % 2**depth).astype(np.uint8)
    bits = np.unpackbits(levels[:, None], axis=-1)[:, 8 - depth :].reshape(1, -1)
    clear = odd_files.chunk(b"tRNS", b"\0\1")
    content = odd_files.raw_png(16, 1, depth, 0, odd_files.rows_of(np.packbits(bits, axis=-1)), clear)
    (tmp_path / "a.png").write_bytes(content)
    shown = np.where(levels == 1, 255, levels.astype(int) * 255 // (2**depth - 1))
    assert np.array_equal(np.asarray(decode(tmp_path / "a.png", 1, "white", 1000))[0], shown)


def test_the_transparent_colour_of_16_bits_is_compared_by_its_high_byte(tmp_path: Path) -> None:
    values = np.array([[[0x1234, 0x5678, 0x9ABC], [0x1334, 0x5678, 0x9ABC]]]).astype(">u2")
    clear = odd_files.chunk(b"tRNS", values[0, 0].tobytes())
    (tmp_path / "a.png").write_bytes(odd_files.raw_png(2, 1, 16, 2, odd_files.rows_of(values), clear))
    shown = np.asarray(decode(tmp_path / "a.png", 3, "white", 1000))
    assert shown.tolist() == [[[255, 255, 255], [0x13, 0x56, 0x9A]]]


def test_of_too_many_pixels_one_line_tells_and_pillow_does_not_warn(tmp_path: Path, recwarn) -> None:
    (tmp_path / "a.png").write_bytes(odd_files.raw_png(9_500, 9_500, 8, 2, b"\0" * 100))
    found = check_files(tmp_path, ["a.png"], 1000, tmp_path / "cache")
    assert found["a.png"].reason == "90250000 pixels, data.max_pixels is 1000" and not recwarn.list
