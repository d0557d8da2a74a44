"""Datasets as the library `datasets` saves them: what stands in which column, which split is which, what is refused."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from atelier.core.errors import UserError
from atelier.core.rng import generator
from atelier.data.hugging_face import HuggingFace
from atelier.data.reading import read
from atelier.images.pixels import to_float
from atelier.runs.preflight import texts_of

KINDS = {
    "image": datasets.Image(),
    "before": datasets.Image(),
    "text": datasets.Value("string"),
    "many": datasets.List(datasets.Value("string")),
    "kind": datasets.ClassLabel(names=["a", "b"]),
}
NONE = dict.fromkeys(("source", "text", "instruction", "label"))


def pixels(k: int) -> np.ndarray:
    return np.random.default_rng(k).integers(0, 256, (20, 24, 3), dtype=np.uint8)


def table(n: int, first: int = 0) -> datasets.Dataset:
    numbers = range(first, first + n)
    columns = {
        "image": [Image.fromarray(pixels(k)) for k in numbers],
        "before": [Image.fromarray(255 - pixels(k)) for k in numbers],
        "text": [f"number {k}" for k in numbers],
        "many": [[f"{k}", f"number {k}"] for k in numbers],
        "kind": [k % 2 for k in numbers],
    }
    return datasets.Dataset.from_dict(columns, features=datasets.Features(KINDS))


def saved(folder: Path, n: int, **splits: int) -> Path:
    """A Dataset of n rows; or, of splits, a DatasetDict of their numbers of rows."""
    parts = {name: table(rows, 100 * k) for k, (name, rows) in enumerate(splits.items())}
    (datasets.DatasetDict(parts) if splits else table(n)).save_to_disk(folder)
    return folder


FIELDS = {
    "holdout": 0.0, "background": "white", "max_pixels": 1 << 20, "memory_mb": 100, "image_size": 4,
    "image_channels": 3, "batch_size": 2, "seed": 0, "limit": None, "num_workers": 0, "flip": False, "n_classes": 0,
    "n_attributes": 0, "conditions": [],
}  # fmt: skip


def opened(folder: Path, columns: dict[str, str | None] | None = None, **options: object) -> HuggingFace:
    there = NONE | {"image": "image", "text": "text"} | (columns or {})
    return HuggingFace(**FIELDS | {"root": str(folder), "columns": there} | options)


def test_rows_are_read_as_files_are(tmp_path: Path) -> None:
    for k in range(3):
        Image.fromarray(pixels(k)).save(tmp_path / f"{k}.png")
    module = opened(saved(tmp_path / "set", 3), {"label": "kind"}, n_classes=2, image_size=16)
    files = [to_float(read(tmp_path / f"{k}.png", 16, 3, "white", 1 << 20)) for k in (0, 2)]
    batch = module.split("train").read([0, 2], None)
    assert torch.equal(batch["image"], torch.stack(files))
    assert batch["text"] == ["number 0", "number 2"] and batch["label"].tolist() == [0, 0]
    assert module.provides == {"text", "label"}


def test_a_source_is_mirrored_with_its_image(tmp_path: Path) -> None:
    columns = {"source": "before", "instruction": "many", "text": None}
    module = opened(saved(tmp_path, 3), columns, image_size=20, flip=True)
    plain = module.split("train").read([1], None)
    torch.testing.assert_close(plain["source"], -plain["image"], atol=0.02, rtol=0)
    seen = {}
    for k in range(8):
        batch = module.split("train").read([1], [generator(k)])
        assert torch.equal(batch["source"].flip(-1), plain["source"]) == torch.equal(
            batch["image"].flip(-1), plain["image"]
        )
        seen[batch["instruction"][0], torch.equal(batch["image"], plain["image"])] = True
    assert len(seen) > 2 and plain["instruction"] == ["1"]
    assert len(texts_of(module.split("train"), "instruction")) == 6


def test_which_split_is_which(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    both = opened(saved(tmp_path / "both", 0, train=4, validation=3, other=2))
    capsys.readouterr()
    both.prepare_data()
    assert capsys.readouterr().err == f"{tmp_path}/both: left out are 2 rows of the split other\n"
    assert both.split("test").read([0], None)["text"] == ["number 100"] and len(both.split("train")) == 4
    held = opened(saved(tmp_path / "one", 20), holdout=0.3)
    texts = [held.split(split).read(range(len(held.split(split))), None)["text"] for split in ("train", "test")]
    assert sorted(texts[0] + texts[1]) == sorted(f"number {k}" for k in range(20)) and texts[1]


def test_a_set_is_its_content(tmp_path: Path) -> None:
    first = opened(saved(tmp_path / "a", 4)).fingerprint("train")
    assert opened(saved(tmp_path / "b", 4)).fingerprint("train") == first
    datasets.DatasetDict({"train": table(4, first=1)}).save_to_disk(tmp_path / "c")
    assert opened(tmp_path / "c").fingerprint("train") != first, "as many, with other pixels and texts"
    assert opened(tmp_path / "a", {"text": "many"}).fingerprint("train") != first


@pytest.mark.parametrize(
    ("columns", "options", "line"),
    [
        ({"text": "txt"}, {}, "data.columns.text=txt: no such column, but image, before, text, many, kind. Fix: "
         "data.columns.text=text"),
        ({"image": "text"}, {}, "data.columns.image=text: it holds no images. Fix: data.columns.image=image"),
        ({"text": "kind"}, {}, "data.columns.text=kind: a row that has no text there. Fix: data.columns.text=null"),
        ({"label": "kind"}, {}, "data.columns.label=kind: a label that is no number from 0 up to data.n_classes=0. "
         "Fix: data.n_classes=2"),
        ({"image": None}, {}, "data.columns.image=None: a set needs images. Fix: data.columns.image=image"),
        ({}, {"max_pixels": 100}, "the image of row 0 of train cannot be read: 480 pixels, data.max_pixels is 100"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(tmp_path: Path, columns: dict, options: dict, line: str) -> None:
    with pytest.raises(UserError) as caught:
        opened(saved(tmp_path, 2), columns, **options).split("train")
    assert line in caught.value.line()


def test_rows_without_images_are_refused_before_training(tmp_path: Path) -> None:
    rows = table(3).to_dict() | {"image": [None, Image.fromarray(pixels(0)), None]}
    datasets.Dataset.from_dict(rows, features=datasets.Features(KINDS)).save_to_disk(tmp_path)
    with pytest.raises(UserError, match=r"data.columns.image=image: 2 of 3 rows have none. Fix: leave those rows out"):
        opened(tmp_path).split("train")


def test_a_row_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """It lies in the set as it always did: there is no file to put back."""
    rows = table(3).cast_column("image", datasets.Image(decode=False)).to_dict()
    rows["image"][1]["bytes"] = rows["image"][1]["bytes"][:200]
    datasets.Dataset.from_dict(rows, features=datasets.Features(KINDS)).save_to_disk(tmp_path)
    with pytest.raises(UserError, match="the image of row 1 of train cannot be read: .* leave such rows out before"):
        opened(tmp_path).split("train").read([0, 1], None)


def test_what_is_no_dataset_is_refused(tmp_path: Path) -> None:
    for files in ([], ["state.json"], ["dataset_dict.json"]):
        folder = tmp_path / f"x{files}"
        folder.mkdir()
        for name in files:
            (folder / name).write_text("{}")
        with pytest.raises(UserError, match="no dataset that save_to_disk|no such split|it has no"):
            opened(folder).split("train")
    with pytest.raises(UserError, match="its splits are a, b, none of them train"):
        opened(saved(tmp_path / "ab", 0, a=2, b=2)).split("train")
