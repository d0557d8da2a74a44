"""Folders with captions: the three layouts, what is left out, what is refused, and which caption a batch has."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from atelier.core.errors import UserError
from atelier.core.rng import generator
from atelier.data.captioned import Captioned
from atelier.data.captions import captions_under
from atelier.data.pairs import Edges, edge_map
from atelier.images.masks import lama_mask
from atelier.runs.preflight import texts_of
from tests.compose import CONF
from tests.data.test_folders import data, image_file

SHARED = Path(__file__).parents[3] / "shared" / "data"


def images(root: Path, *names: str) -> Path:
    for k, name in enumerate(names):
        image_file(root / name, grey=10 * k)
    return root


def captioned(root: Path, tsv: bytes | str, *names: str) -> Path:
    """A folder of images (1.png and 2.png where none are named) with a captions.tsv."""
    images(root, *(names or ("1.png", "2.png")))
    (root / "captions.tsv").write_bytes(tsv if isinstance(tsv, bytes) else tsv.encode())
    return root


def refusal(root: Path, **options: object) -> UserError:
    with pytest.raises(UserError) as error:
        data(Captioned, root, **options).split("train")
    assert error.value.key == "data.root" and "\n" not in error.value.line()
    error.value.line().encode()
    return error.value


def texts(root: Path, **options: object) -> dict[str, list[str]]:
    """The captions of the training images by their files."""
    split = data(Captioned, root, **options).split("train")
    names = [os.path.relpath(path, root) for path in split.paths]
    return dict(zip(names, split.fields["text"], strict=True))


EXPECTED = {"x/1.png": ["a star", "red"], "2.png": ["cross"]}


def test_three_layouts_say_the_same(tmp_path):
    for name in ("tsv", "header", "jsonl", "txt"):
        images(tmp_path / name, "2.png", "x/1.png")
    lines = [("x/1.png", "a star"), ("2.png", "cross"), ("x/1.png", "red")]
    (tmp_path / "tsv/captions.tsv").write_text("".join(f"{file}\t{text}\tignored\n" for file, text in lines))
    header = "group\tcaption\tfile\n" + "".join(f"things\t{text}\t{file}\n" for file, text in lines)
    (tmp_path / "header/captions.tsv").write_text(header)
    table = "\n".join(json.dumps({"text": text, "file_name": file, "more": 1}) for file, text in lines)
    (tmp_path / "jsonl/metadata.jsonl").write_text(table)
    (tmp_path / "txt/x/1.txt").write_text("a star\n\nred\n")
    (tmp_path / "txt/2.txt").write_text("cross")
    for name in ("tsv", "header", "jsonl", "txt"):
        assert texts(tmp_path / name) == EXPECTED, name


def test_a_caption_with_a_tab_in_it_is_refused(tmp_path):
    root = captioned(tmp_path, "1.png\ta star\n2.png\ta cross\tin blue\n")
    assert refusal(root).problem == "line 2: 3 columns, the first line has 2"


def test_brackets_without_end_are_no_json(tmp_path):
    images(tmp_path, "1.png")
    (tmp_path / "metadata.jsonl").write_text("[" * 100_000)
    assert refusal(tmp_path).problem == "line 1: it is no JSON"


def test_tables_lie_in_the_folders_of_splits_too(tmp_path):
    images(tmp_path, "train/1.png", "train/2.png", "test/1.png")
    for split in ("train", "test"):
        line = json.dumps({"file_name": "1.png", "text": f"one to {split}"})
        (tmp_path / split / "metadata.jsonl").write_text(line)
    module = data(Captioned, tmp_path)
    assert [module.split(split).fields["text"] for split in ("train", "test")] == [
        [["one to train"]],
        [["one to test"]],
    ]


@pytest.mark.parametrize("content", [
    b"\xef\xbb\xbf1.png\ta star\r\n2.png\tcross\r\n", b"file\tcaption\r1.png\t a star \r2.png\tcross",
    "1.png\ta star\n./2.png\tcross\n",
])  # fmt: skip
def test_byte_order_marks_and_line_ends_are_passed_over(tmp_path, content):
    assert texts(captioned(tmp_path, content)) == {"1.png": ["a star"], "2.png": ["cross"]}


def test_any_file_name_can_be_captioned(tmp_path):
    names = [b"\xff.png", b"-rf.png", b"x" * 251 + b".png", "\U0001f600.png".encode(), b"A.png", b"a.png"]
    root = captioned(tmp_path, b"".join(n + b"\tone\n" for n in names), *map(os.fsdecode, names))
    assert set(texts(root)) == set(map(os.fsdecode, names))
    other = images(tmp_path / "json", "line\nbreak.png", os.fsdecode(b"\xff.png"))
    table = "\n".join(json.dumps({"file_name": n, "text": "one"}) for n in ("line\nbreak.png", "\udcff.png"))
    (other / "metadata.jsonl").write_text(table)
    assert len(texts(other)) == 2


def test_images_without_caption_and_captions_without_image_are_a_line_each(tmp_path, capsys):
    root = captioned(tmp_path, "2.png\tx\n1.png\t \n7.png\tx\n7.png\ty\n", *(f"{k}.png" for k in range(1, 6)))
    (root / "readme.md").write_text("x")
    module = data(Captioned, root)
    assert len(module.split("train")) == len(module.split("test")) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"{root}: 4 of 5 images have no caption and are left out, first 1.png, 3.png, 4.png",
        f"{root}: captions of 1 files that are not there, first 7.png",
        f"{root}: left out are 1 files of formats that are not read (1 .md)",
    ]


def test_no_captions_at_all_are_refused(tmp_path):
    plain = images(tmp_path / "plain", "1.png")
    assert "no captions: no captions.tsv, no metadata.jsonl, no .txt" in refusal(plain).problem
    elsewhere = captioned(tmp_path / "other", "img/1.png\ta star\n")
    assert (
        refusal(elsewhere).problem
        == "none of 2 images has a caption, the first is 1.png, the captions are of img/1.png"
    )
    empty = captioned(tmp_path / "empty", "")
    assert refusal(empty).problem == "none of 2 images has a caption, the first is 1.png"


def test_a_folder_that_is_missing_or_has_no_images_is_refused_as_by_the_other_sets(tmp_path):
    assert refusal(tmp_path / "none").problem == "no such folder"
    (tmp_path / "state.json").write_text("{}")
    assert refusal(tmp_path).problem == "a Hugging Face dataset saved to disk, no image files"


def test_two_layouts_at_once_are_refused(tmp_path):
    root = captioned(tmp_path, "1.png\tx\n")
    (root / "metadata.jsonl").write_text("")
    assert refusal(root).problem == "captions in captions.tsv and in metadata.jsonl"
    (root / "metadata.jsonl").unlink()
    (root / "notes.txt").write_text("beside no image")
    assert texts(root) == {"1.png": ["x"]}
    (root / "2.txt").write_text("y")
    assert refusal(root).problem == "captions in captions.tsv and in .txt files beside the images"


@pytest.mark.parametrize(("name", "content", "problem"), [
    ("captions.tsv", b"1.png\tx\n2.png x\n", "line 2: no tab between a file and its caption"),
    ("captions.tsv", b"1.png\t\xe9toile\n", "line 1: it is no UTF-8, byte 0xe9"),
    ("captions.tsv", "1.png\tx\n".encode("utf-16"), "line 1: a character that is in no text"),
    ("captions.tsv", b"\n1.png\ta\0b\n", "line 2: a character that is in no text"),
    ("captions.tsv", b"1.png\t" + b"x" * 10_000_000, "line 1: a caption of 10,000,000 characters, more than 10,000"),
    ("1.txt", b"x\n\xff\n", "line 2: it is no UTF-8, byte 0xff"),
    ("metadata.jsonl", b'{"file_name": "1.png"\n', "line 1: it is no JSON"),
    ("metadata.jsonl", b'["1.png", "x"]', 'line 1: no {"file_name": FILE, "text": CAPTION}'),
    ("metadata.jsonl", b'{"file_name": "1.png", "caption": "x"}', 'line 1: no {"file_name": FILE, "text": CAPTION}'),
    ("metadata.jsonl", b'{"file_name": "1.png", "text": "\\ud83d"}', "line 1: a character that is in no text"),
])  # fmt: skip
def test_a_line_that_cannot_be_read_is_told_by_its_number(tmp_path, name, content, problem):
    images(tmp_path, "1.png", "2.png")
    (tmp_path / name).write_bytes(content)
    error = refusal(tmp_path)
    assert (error.problem, error.value) == (problem, str(tmp_path / name))


def test_one_caption_of_several_is_drawn_in_training_and_the_first_at_test(tmp_path):
    root = captioned(tmp_path, "1.png\ta\n1.png\tb\n1.png\tc\n2.png\td\n")
    module = data(Captioned, root)
    assert module.provides == {"text"}
    train, test = (module.split(split) for split in ("train", "test"))
    assert test.read([1, 0, 0], None)["text"] == ["d", "a", "a"]
    drawn = [train.read([0, 1], [generator(k), generator(k)])["text"] for k in range(300)]
    assert {text for _, text in drawn} == {"d"}
    counts = [sum(text == one for text, _ in drawn) for one in "abc"]
    assert sum(counts) == 300 and min(counts) > 70  # sd 8
    assert drawn == [train.read([0, 1], [generator(k), generator(k)])["text"] for k in range(300)]


def test_another_caption_is_another_set(tmp_path):
    root = captioned(tmp_path, "1.png\ta\n2.png\tb\n")
    first = data(Captioned, root).fingerprint("train")
    (root / "captions.tsv").write_text("2.png\tb\n1.png\ta\n")
    assert data(Captioned, root).fingerprint("train") == first
    (root / "captions.tsv").write_text("1.png\ta\n2.png\tc\n")
    assert data(Captioned, root).fingerprint("train") != first


def rgba(path: Path, opaque: tuple[int, int, int, int], alpha: int = 255) -> None:
    """A blue image, opaque inside the box (left, top, right, bottom) alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGBA", (8, 8), (0, 0, 255, 0))
    picture.paste((0, 0, 255, alpha), opaque)
    picture.save(path)


def test_alpha_is_the_mask_and_moves_with_the_image(tmp_path, capsys):
    rgba(tmp_path / "1.png", (0, 2, 3, 8))
    rgba(tmp_path / "2.png", (0, 0, 8, 8), alpha=12)  # as faint as nothing
    image_file(tmp_path / "3.png", size=8)
    (tmp_path / "captions.tsv").write_text("1.png\tx\n2.png\tx\n3.png\tx\n")
    module = data(Captioned, tmp_path, masks="alpha", image_size=8, flip=True)
    batch = module.split("test").read([0, 1, 2], None)
    assert "1 of 3 images to test have no alpha, first 3.png: their mask is all of them" in capsys.readouterr().err
    mask = torch.zeros(8, 8)
    mask[2:, :3] = 1
    assert module.provides == {"text", "mask"} and batch["mask"].shape == (3, 1, 8, 8)
    assert torch.equal(batch["mask"][:, 0], torch.stack([mask, torch.zeros(8, 8), torch.ones(8, 8)]))
    red = batch["image"][0, 0]
    assert torch.equal(red, 1 - 2 * mask)  # blue on white
    for k in range(10):
        trained = module.split("train").read([0], [generator(k)])
        assert torch.equal(trained["image"][0, 0], 1 - 2 * trained["mask"][0, 0])
    opaque = captioned(tmp_path / "opaque", "1.png\tx\n")
    with pytest.raises(UserError) as error:
        data(Captioned, opaque, masks="alpha").split("train")
    told = "error: data.masks=alpha: none of 1 images to train is transparent anywhere. Fix: data.masks=lama"
    assert error.value.line() == told


def test_lama_masks_are_drawn_anew_in_training_and_stay_at_test(tmp_path):
    root = captioned(tmp_path, "1.png\tx\n2.png\tx\n")
    module = data(Captioned, root, masks="lama", image_size=16, flip=True)
    train, test = (module.split(split) for split in ("train", "test"))
    still = test.read([0, 1], None)["mask"]
    assert still.shape == (2, 1, 16, 16) and not torch.equal(still[0], still[1])
    assert torch.equal(test.read([1], None)["mask"][0], still[1])
    masks = [train.read([0], [generator(k)])["mask"] for k in (1, 2, 1)]
    assert torch.equal(masks[0], masks[2]) and not torch.equal(masks[0], masks[1])
    plain = data(Captioned, root, image_size=16, flip=True)
    assert torch.equal(
        plain.split("train").read([0], [generator(1)])["image"], train.read([0], [generator(1)])["image"]
    )
    assert plain.fingerprint("train") == module.fingerprint("train")  # the images are the same


def test_a_turn_is_drawn_first_then_a_text_then_a_mask(tmp_path):
    root = captioned(tmp_path, "1.png\ta\n1.png\tb\n1.png\tc\n")
    split = data(Captioned, root, masks="lama", image_size=16, flip=True).split("train")
    for k in range(8):
        rng, read = generator(k), split.read([0], [generator(k)])
        turned = bool(torch.rand((), generator=rng) < 0.5)
        assert split.beside([0], [generator(k)])[1].tolist() == [turned]
        assert read["text"] == ["abc"[int(torch.randint(3, (), generator=rng))]]
        assert torch.equal(read["mask"][0], lama_mask(16, rng))


def test_edges_are_those_of_the_set_of_edges_and_of_the_mirror_image(tmp_path):
    root = captioned(tmp_path, "1.png\ta\n2.png\tb\n")
    for name in ("1.png", "2.png"):
        pixels = torch.rand(3, 24, 20, generator=generator(len(name)), dtype=torch.float32).mul(255).byte()
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(root / name)
    module = data(Captioned, root, source="edges", image_size=16, flip=True)
    page = OmegaConf.load(CONF / "data/edges.yaml")
    others = data(Edges, root, image_size=16, jitter=0, sigma=page.sigma, threshold=page.threshold)
    assert module.provides == {"text", "source"} and texts_of(module.split("train"), "text") == ["a", "b"]
    batch, expected = module.test_batch(0, 2), others.test_batch(0, 2)
    assert torch.equal(batch["source"], expected["source"]) and torch.equal(batch["image"], expected["image"])
    seen = {}
    for k in range(8):
        read = module.split("train").read([0], [generator(k)])
        turned = bool(module.split("train").beside([0], [generator(k)])[1])
        plain = batch["image"][:1].flip(-1) if turned else batch["image"][:1]
        assert torch.equal(read["source"], edge_map(plain, page.sigma, page.threshold).expand(-1, 3, -1, -1))
        seen[turned] = True
    assert len(seen) == 2


@pytest.mark.skipif(not (SHARED / "fluent_emoji128").is_dir(), reason="no ../shared/data/fluent_emoji128")
def test_emoji_are_captioned_as_they_are():
    found = captions_under(str(SHARED / "fluent_emoji128"))
    assert len(found.texts) == 2980 and found.files == {"captions.tsv"} and not found.nameless
    assert found.texts["images/0023-20e3.webp"] == ["keycap #"]
