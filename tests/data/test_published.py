"""MNIST, Fashion-MNIST, CIFAR-10 and CelebA from tiny files in their layouts; an absent one is one line."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import pickle
import random
import struct
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from atelier.core.errors import UserError
from atelier.core.rng import generator
from atelier.data.attribute_transfer import changed
from atelier.data.base import DataModule, random_order
from atelier.data.celeba import CROPS, HAIR, CelebA, n_listed
from atelier.data.cifar10 import CIFAR10
from atelier.data.mnist import MNIST, FashionMNIST, read_idx
from atelier.data.published import fetch, resized, with_channels
from atelier.runs import build, preflight
from tests.compose import composed

SHARED = Path(__file__).parents[3] / "shared" / "data"


def data(kind: type, root: Path, **changed: object) -> DataModule:
    size = 64 if kind is CelebA else 32
    fields = {
        "root": str(root), "download": False, "image_size": size,
        "image_channels": 1 if kind in (MNIST, FashionMNIST) else 3,
        "batch_size": 2, "seed": 0, "limit": None, "num_workers": 0, "flip": False, "conditions": [],
        "n_classes": 0 if kind is CelebA else 10, "n_attributes": 40 if kind is CelebA else 0,
    }  # fmt: skip
    own = {"crop": "ddim", "memory_mb": 100, "cache": str(root / "cache")} if kind is CelebA else {}
    return kind(**fields | own | changed)


def grey_levels(batch: dict) -> torch.Tensor:
    return (batch["image"] * 127.5 + 127.5).round().int()


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()


def write_mnist(root: Path, name: str = "MNIST", packed: bool = False) -> dict[str, np.ndarray]:
    rng, folder, images = np.random.default_rng(0), root / name / "raw", {}
    folder.mkdir(parents=True)
    for prefix, n in (("train", 5), ("t10k", 3)):
        images[prefix] = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = np.arange(n, dtype=np.uint8)[::-1].copy()
        for kind, values in (("images-idx3", images[prefix]), ("labels-idx1", labels)):
            content = idx(values)
            file = folder / f"{prefix}-{kind}-ubyte{'.gz' if packed else ''}"
            file.write_bytes(gzip.compress(content) if packed else content)
    return images


@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"])
def test_a_set_in_memory_is_its_pixels_and_labels(tmp_path, file):
    """Written anew it is the same; with one other byte it is not."""
    write_mnist(tmp_path / "a")
    write_mnist(tmp_path / "b")
    first, other = (data(MNIST, tmp_path / name).fingerprint("train") for name in "ab")
    assert first == other
    path = tmp_path / "b" / "MNIST" / "raw" / file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert data(MNIST, tmp_path / "b").fingerprint("train") != first
    assert data(MNIST, tmp_path / "b").fingerprint("test") == data(MNIST, tmp_path / "a").fingerprint("test")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", [MNIST, FashionMNIST])
def test_mnist_is_padded_to_32(tmp_path, kind, packed):
    images = write_mnist(tmp_path, kind.__name__, packed)
    module = data(kind, tmp_path)
    assert module.provides == {"label"}
    batch = module.split("train").read([4, 1], None)
    got = grey_levels(batch)
    assert got.shape == (2, 1, 32, 32)
    assert (got[:, 0, 2:30, 2:30].numpy() == images["train"][[4, 1]]).all()
    assert got.sum() == int(images["train"][[4, 1]].sum())  # black all round
    assert batch["label"].tolist() == [0, 3] and batch["label"].dtype == torch.int64
    first = grey_levels(module.test_batch(0, 1))[0, 0, 2:30, 2:30].numpy()
    assert (first == images["t10k"][module.order("test")[0]]).all()
    assert len(module.split("test")) == 3


def test_mnist_agrees_with_torchvision(tmp_path):
    write_mnist(tmp_path)
    reference = datasets.MNIST(str(tmp_path), train=True, download=False)
    batch = data(MNIST, tmp_path, image_size=28).split("train").read(list(range(5)), None)
    assert torch.equal(grey_levels(batch)[:, 0], reference.data.int())
    assert torch.equal(batch["label"], reference.targets)


def test_mnist_of_other_sizes_and_in_colour(tmp_path):
    write_mnist(tmp_path)
    small = data(MNIST, tmp_path, image_size=16, image_channels=3).test_batch(0, 3)["image"]
    full = data(MNIST, tmp_path).test_batch(0, 3)["image"]
    assert small.shape == (3, 3, 16, 16)
    assert torch.equal(small[:, 0], small[:, 2])
    torch.testing.assert_close(small[:, :1].mean(), full.mean(), atol=0.03, rtol=0)


@pytest.mark.parametrize("kind", [MNIST, FashionMNIST, CIFAR10, CelebA])
def test_an_absent_set_is_one_line(tmp_path, kind):
    with pytest.raises(UserError) as error:
        data(kind, tmp_path / "nowhere").split("train")
    line = str(error.value)
    assert line.startswith(f"error: data.root={str(tmp_path / 'nowhere')[:57]}")
    assert str(tmp_path / "nowhere") in error.value.problem and ", source " in error.value.problem
    assert "data.download=true" in error.value.fix and "data=shapes" in error.value.fix
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(("kind", "key"), [(MNIST, "n_classes"), (CIFAR10, "n_classes"), (CelebA, "n_attributes")])
def test_a_wrong_number_of_labels_is_refused(tmp_path, monkeypatch, kind, key):
    {MNIST: write_mnist, CelebA: write_celeba}.get(kind, lambda root: write_cifar10(root, monkeypatch))(tmp_path)
    right = 40 if kind is CelebA else 10
    with pytest.raises(UserError, match=f"data.{key}=7: .*Fix: data.{key}={right}$"):
        data(kind, tmp_path, **{key: 7}).split("train")


@pytest.mark.parametrize(
    ("damage", "reason"), [("cut", "cannot reshape"), ("no idx", "not an idx file"), ("cut archive", "ended before")]
)
def test_damaged_mnist_is_refused(tmp_path, damage, reason):
    write_mnist(tmp_path, packed=damage == "cut archive")
    file = next((tmp_path / "MNIST" / "raw").glob("t10k-images*"))
    file.write_bytes(b"<html>404</html>" if damage == "no idx" else file.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"t10k-images.* is damaged: .*{reason}.*Fix: rm "):
        data(MNIST, tmp_path).split("test")


def test_the_archive_goes_before_a_half_extracted_file(tmp_path):
    write_mnist(tmp_path, packed=True)
    (tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte").write_bytes(b"\0\0")
    assert len(data(MNIST, tmp_path).split("test")) == 3


def test_read_idx_of_any_rank(tmp_path):
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "a").write_bytes(idx(values))
    assert (read_idx(tmp_path / "a").numpy() == values).all()


def write_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """One training and one test batch of the real format, made known to torchvision by their checksums."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8)
    names = [b"a", b"b"]

    def write(name: str, content: dict) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    train = write("data_batch_1", {"data": pixels[:4], "labels": [3, 1, 2, 0]})
    test = write("test_batch", {"data": pixels[4:], "labels": [9, 8]})
    meta = write("batches.meta", {"label_names": names})
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [train])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [test])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    return pixels.reshape(6, 3, 32, 32)


def test_cifar10(tmp_path, monkeypatch):
    pixels = write_cifar10(tmp_path, monkeypatch)
    module = data(CIFAR10, tmp_path)
    batch = module.split("train").read([3, 0], None)
    assert (grey_levels(batch).numpy() == pixels[[3, 0]]).all()
    assert batch["label"].tolist() == [0, 3]
    assert module.test_batch(0, 3)["label"].tolist() == [9, 8, 9]
    grey = grey_levels(data(CIFAR10, tmp_path, image_channels=1).test_batch(0, 2))
    want = (pixels[4:] * np.array([0.299, 0.587, 0.114])[:, None, None]).sum(1)
    assert np.abs(grey[:, 0].numpy() - want).max() <= 0.5 + 1e-3


def test_cifar10_with_a_wrong_checksum_is_never_unpickled(tmp_path, monkeypatch):
    write_cifar10(tmp_path, monkeypatch)
    monkeypatch.setattr(pickle, "load", lambda *args, **kwargs: pytest.fail("unpickled"))
    with open(tmp_path / "cifar-10-batches-py" / "data_batch_1", "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="no complete .*cifar-10-batches-py/"):
        data(CIFAR10, tmp_path).split("train")


def write_celeba(root: Path) -> None:
    """Photographs 000001..000006: red is the row, green the column; 1..3 train, 4 validation, 5..6 test."""
    folder = root / "celeba" / "img_align_celeba"
    folder.mkdir(parents=True, exist_ok=True)
    rows, columns = np.mgrid[:218, :178].astype(np.uint8)
    image = Image.fromarray(np.stack([rows, columns, np.zeros_like(rows)], -1))
    names = [f"{k:06d}.jpg" for k in range(1, 7)]
    for name in names:
        image.save(folder / name, "PNG")  # exact pixels
    attributes = [" ".join("1" if (k + a) % 3 == 0 else "-1" for a in range(40)) for k in range(6)]
    lines = ["6", " ".join(f"A{a}" for a in range(40))] + [f"{n}  {a}" for n, a in zip(names, attributes, strict=True)]
    (root / "celeba" / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
    parts = zip(names, (0, 0, 0, 1, 2, 2), strict=True)
    (root / "celeba" / "list_eval_partition.txt").write_text("\n".join(f"{n} {p}" for n, p in parts) + "\n")


def test_celeba(tmp_path):
    write_celeba(tmp_path)
    module = data(CelebA, tmp_path)
    assert module.provides == {"attributes", "target"}
    assert [path.name for path in module.split("train").files.paths] == ["000001.jpg", "000002.jpg", "000003.jpg"]
    batch = module.split("test").read([0, 1], None)
    assert batch["image"].shape == (2, 3, 64, 64)
    want = [[float((k + a) % 3 == 0) for a in range(40)] for k in (4, 5)]
    assert batch["attributes"].tolist() == want and batch["attributes"].dtype == torch.float32


def test_celeba_gives_the_attributes_that_were_asked_for(tmp_path):
    write_celeba(tmp_path)
    whole = data(CelebA, tmp_path)
    assert whole.attribute_names == [f"A{a}" for a in range(40)]
    module = data(CelebA, tmp_path, attributes=["A7", "A0", "A39"], n_attributes=3)
    assert module.attribute_names == ["A7", "A0", "A39"]
    for split in ("train", "test"):
        batch, all_of_them = (one.split(split).read([1, 0], None) for one in (module, whole))
        assert batch["target"].shape == (2, 3)
        assert torch.equal(batch["attributes"], all_of_them["attributes"][:, [7, 0, 39]])
    assert module.fingerprint("train") != whole.fingerprint("train")


@pytest.mark.parametrize(("asked", "line"), [
    ({"attributes": ["Smilling"], "n_attributes": 1},
     "data.attributes=Smilling: the files have no such attribute. Fix: Smiling in its place"),
    ({"attributes": ["Smiling"]},
     "data.n_attributes=40: it is not how many data.attributes names. Fix: data.n_attributes=1"),
    ({"n_attributes": 39}, "data.n_attributes=39: it is not what the files have. Fix: data.n_attributes=40"),
])  # fmt: skip
def test_celeba_refuses_attributes_that_are_not_there(tmp_path, asked, line):
    write_celeba(tmp_path)
    file = tmp_path / "celeba" / "list_attr_celeba.txt"
    file.write_text(file.read_text().replace(" A39", " Smiling"))
    with pytest.raises(UserError) as error:
        data(CelebA, tmp_path, **asked).split("train")
    assert error.value.line() == f"error: {line}"


def test_a_face_is_to_get_the_attributes_of_another_one_in_training(tmp_path):
    write_celeba(tmp_path)
    images = data(CelebA, tmp_path, image_size=8).split("train")
    known = images.read([0, 1, 2], None)["attributes"]
    assert len(known.unique(dim=0)) == 3
    rows = [k % 3 for k in range(300)]
    batch = images.read(rows, [generator(k) for k in range(300)])
    given = (batch["target"][:, None] == known).all(2)  # (300, 3)
    assert (given.sum(1) == 1).all() and batch["target"].dtype == torch.float32
    steps = (given.long().argmax(1) - torch.tensor(rows)) % 3
    assert (steps > 0).all() and 110 < (steps == 1).sum() < 190  # each of the others as often
    assert torch.equal(images.read([rows[77]], [generator(77)])["target"][0], batch["target"][77])


def test_a_test_face_is_to_change_one_attribute(tmp_path):
    write_celeba(tmp_path)
    batch = data(CelebA, tmp_path, image_size=8).split("test").read([0, 1], None)
    turned = (batch["target"] != batch["attributes"]).nonzero().tolist()
    assert turned == [[0, 0], [1, 1]]


@pytest.mark.parametrize(("index", "before", "after"), [
    (0, [1, 0, 1, 0, 0], [0, 0, 1, 0, 0]),  # young no more: the hair stays
    (6, [1, 0, 1, 0, 0], [1, 1, 0, 0, 0]),  # fair: black goes
    (2, [1, 0, 1, 0, 0], [1, 0, 0, 0, 0]),  # black no more: none
    (9, [0, 1, 0, 1, 0], [0, 0, 0, 0, 1]),  # two go
    (2, [0, 1, 1, 0, 0], [0, 1, 0, 0, 0]),  # one goes and nothing is set
    (3, [1, 0, 0, 0, 1], [1, 0, 0, 1, 0]),
])  # fmt: skip
def test_hair_has_one_colour(index, before, after):
    """Of young, blond, black, brown, grey."""
    given = torch.tensor([before, before], dtype=torch.float32)
    target = changed(given, torch.tensor([index, 0]), [1, 2, 3, 4])
    assert target.tolist() == [after, [1.0 - before[0], *before[1:]]] and target.dtype == torch.float32
    assert given.tolist() == [before, before]


def test_the_names_of_hair_are_those_of_the_file(tmp_path):
    write_celeba(tmp_path)
    file = tmp_path / "celeba" / "list_attr_celeba.txt"
    names = ["Male", *HAIR]
    file.write_text(file.read_text().replace(" ".join(f"A{a}" for a in range(5)), " ".join(names)))
    images = data(CelebA, tmp_path, attributes=[*HAIR, "Male"], n_attributes=5).split("test")
    assert images.changed.keywords == {"exclusive": [0, 1, 2, 3]}


@pytest.mark.parametrize(("crop", "row", "column", "side"), [
    ("ddim", 121, 89, 128), ("score_sde", 109, 89, 140), ("mimicry", 109, 89, 178), ("none", 109, 89, 178),
    (148, 109, 89, 148), (108, 109, 89, 108),
])  # fmt: skip
def test_celeba_crops(tmp_path, crop, row, column, side):
    """The pixels hold their own coordinates: first and centre of the crop, at its own size and at 64."""
    write_celeba(tmp_path)
    whole = grey_levels(data(CelebA, tmp_path, crop=crop, image_size=side).test_batch(0, 1))[0]
    assert whole[:2, 0, 0].tolist() == [row - side // 2, column - side // 2]
    assert whole[:2, side // 2, side // 2].tolist() == [row, column]
    small = grey_levels(data(CelebA, tmp_path, crop=crop).test_batch(0, 1))[0]
    torch.testing.assert_close(
        small[:2, 32, 32].float(), torch.tensor([row, column]) + side / 128 - 0.5, atol=1, rtol=0
    )
    assert set(CROPS) == {"ddim", "score_sde", "mimicry", "none"}


def test_the_number_of_attributes_follows_from_the_list(tmp_path):
    """Through the config: what the model is told, too; 40 where there is no list yet."""
    write_celeba(tmp_path)
    file = tmp_path / "celeba" / "list_attr_celeba.txt"
    words = ["model=ldm", "data=celeba", f"data.root={tmp_path}"]
    for cut, asked, right in ((40, [], 40), (3, [], 3), (3, ["data.attributes=[A2,A0]"], 2)):
        head, names, *rows = [line.split() for line in file.read_text().splitlines()]
        file.write_text("\n".join(map(" ".join, [head, names[:cut], *(row[: cut + 1] for row in rows)])))
        cfg = composed(*words, *asked)
        preflight.check(cfg)
        assert cfg.data.n_attributes == cfg.model.embedder.n_attributes == right
        assert build.data(cfg).split("test").read([0], None)["attributes"].shape == (1, right)
        write_celeba(tmp_path)
    file.unlink()
    assert composed(*words).data.n_attributes == 40


@pytest.mark.parametrize("crop", [179, 0, -1, "dim", True])
def test_a_crop_that_is_none_is_refused(crop):
    with pytest.raises(UserError, match="data.crop="):
        preflight.check(composed("data=celeba", f"data.crop={crop}"))


@pytest.mark.parametrize("change", ["pixels", "attribute", "damage", "touch"])
def test_celeba_is_its_content(tmp_path, change):
    """Other pixels under the same name and another attribute are another set; a file written anew is the same."""
    write_celeba(tmp_path)
    before = data(CelebA, tmp_path).fingerprint("train")
    file = tmp_path / "celeba" / "img_align_celeba" / "000002.jpg"
    whole = file.read_bytes()
    if change == "pixels":
        Image.open(file).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(file, "PNG")
    elif change == "attribute":
        table = tmp_path / "celeba" / "list_attr_celeba.txt"
        table.write_text(table.read_text().replace(" -1", " 1", 1))
    else:
        file.write_bytes(whole[: len(whole) // 2] if change == "damage" else whole)
    module = data(CelebA, tmp_path)
    if change == "damage":
        with pytest.raises(UserError, match="1 of 5 photographs cannot be read, first 000002.jpg"):
            module.prepare_data()
    else:
        assert (module.fingerprint("train") == before) == (change == "touch")


def test_a_limit_is_all_that_is_looked_at(tmp_path):
    """The other training photographs may be missing or damaged; a set that was checked whole stays so."""
    write_celeba(tmp_path)
    data(CelebA, tmp_path).prepare_data()
    (cache,) = (tmp_path / "cache").iterdir()
    whole = cache.read_text()
    data(CelebA, tmp_path, limit=1).prepare_data()
    assert cache.read_text() == whole
    cache.unlink()
    first, damaged, missing = (f"{k + 1:06d}.jpg" for k in random_order(3))
    folder = tmp_path / "celeba" / "img_align_celeba"
    (folder / damaged).write_bytes(b"x")
    (folder / missing).unlink()
    module = data(CelebA, tmp_path, limit=1)
    module.prepare_data()
    assert list(module.checked) == [first, "000005.jpg", "000006.jpg"]
    assert len(module.split("train")) == 3 and module.n_train == 1
    assert module.chosen("train", range(1))["index"].tolist() == [int(first[:6]) - 1] == list(module.trained_on())
    for limit, told in ((2, f"1 of 4 photographs cannot be read, first {damaged}"), (3, "1 of 5 images are not in")):
        with pytest.raises(UserError, match=told):
            data(CelebA, tmp_path, limit=limit).prepare_data()


@pytest.mark.parametrize("name", ["list_attr_celeba.txt", "list_eval_partition.txt"])
def test_blank_lines_in_the_lists_are_passed_over(tmp_path, name):
    write_celeba(tmp_path)
    before = data(CelebA, tmp_path).fingerprint("train")
    file = tmp_path / "celeba" / name
    file.write_text("\n" + file.read_text().replace("\n", "\n \n") + "\n\n")
    assert data(CelebA, tmp_path).fingerprint("train") == before
    assert n_listed(str(tmp_path), None) == 40


def test_lists_that_were_cut_before_the_test_part_hold_a_tenth_out(tmp_path):
    write_celeba(tmp_path)
    for name in ("list_attr_celeba.txt", "list_eval_partition.txt"):
        file = tmp_path / "celeba" / name
        lines = file.read_text().splitlines()
        keep = 2 + 3 if "attr" in name else 3  # the first three photographs, all of them to train
        file.write_text("\n".join(lines[:keep]) + "\n")
    module = data(CelebA, tmp_path)
    files = [set(module.split(split).files.paths) for split in ("train", "test")]
    assert [len(one) for one in files] == [2, 1] and not files[0] & files[1]


def test_celeba_as_stargan_keeps_it(tmp_path):
    """images/ and no list of parts: of 40 lines the first 4 after a shuffle with seed 1234 test, the others train."""
    folder = tmp_path / "celeba" / "images"
    folder.mkdir(parents=True)
    names = [f"{k:06d}.jpg" for k in range(1, 41)]
    for k, name in enumerate(names):
        Image.fromarray(np.full((218, 178, 3), k, np.uint8)).save(folder / name, "PNG")
    rows = [f"{name} {' '.join('1' if k == a else '-1' for a in range(40))}" for k, name in enumerate(names)]
    lines = ["40", " ".join(f"A{a}" for a in range(40)), *rows]
    (tmp_path / "celeba" / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
    module = data(CelebA, tmp_path, image_size=8)
    assert (len(module.split("train")), len(module.split("test"))) == (36, 4)
    random.seed(1234)
    random.shuffle(rows)
    assert [path.name for path in module.split("test").files.paths] == [row.split()[0] for row in rows[:4]]
    batch = module.test_batch(0, 4)
    assert torch.equal(batch["attributes"].argmax(1), grey_levels(batch)[:, 0, 0, 0].long())  # each has its own


def test_celeba_with_missing_photographs_is_refused(tmp_path):
    write_celeba(tmp_path)
    (tmp_path / "celeba" / "img_align_celeba" / "000002.jpg").unlink()
    for split in ("train", "test"):
        with pytest.raises(UserError, match="1 of 5 images are not in .*, first 000002.jpg"):
            data(CelebA, tmp_path).split(split)


@pytest.mark.parametrize("name", ["list_attr_celeba.txt", "list_eval_partition.txt"])
def test_celeba_without_a_list_is_refused(tmp_path, name):
    write_celeba(tmp_path)
    (tmp_path / "celeba" / name).unlink()
    with pytest.raises(UserError, match=f"no .*/celeba/{name}, source "):
        data(CelebA, tmp_path).split("train")


@pytest.mark.parametrize("kind", [MNIST, FashionMNIST, CIFAR10, CelebA])
def test_only_download_true_downloads(tmp_path, monkeypatch, kind):
    asked = []
    source = getattr(datasets, kind.__name__)
    monkeypatch.setattr(
        source, "download", lambda self: asked.append(kind) or (_ for _ in ()).throw(OSError("no net\nx"))
    )
    with contextlib.suppress(UserError):  # that it is not there
        data(kind, tmp_path).prepare_data()
    assert asked == []
    with pytest.raises(UserError, match="data.download=True: no download to .*: no net. Fix: "):
        data(kind, tmp_path, download=True).prepare_data()
    assert asked == [kind]


@pytest.mark.parametrize("kind", [MNIST, CIFAR10, CelebA])
def test_what_is_there_is_not_downloaded(tmp_path, monkeypatch, kind):
    {MNIST: write_mnist, CelebA: write_celeba}.get(kind, lambda root: write_cifar10(root, monkeypatch))(tmp_path)
    monkeypatch.setattr(getattr(datasets, kind.__name__), "download", lambda self: pytest.fail("downloaded"))
    data(kind, tmp_path, download=True).prepare_data()
    assert not (tmp_path / ".download.lock").exists()


def test_one_download_at_a_time(tmp_path):
    inside, most = [], []

    def download() -> None:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.1)
        inside.pop()

    threads = [threading.Thread(target=fetch, args=(str(tmp_path), download)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1]


def test_channels_and_resizing():
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    reference = [np.asarray(Image.fromarray(one.permute(1, 2, 0).numpy()).convert("L")) for one in images]
    assert (with_channels(images, 1)[:, 0].int() - torch.tensor(np.stack(reference)).int()).abs().max() <= 1
    small = [Image.fromarray(one.permute(1, 2, 0).numpy()).resize((12, 12), Image.Resampling.BICUBIC) for one in images]
    want = torch.tensor(np.stack([np.asarray(one) for one in small])).permute(0, 3, 1, 2)
    assert (resized(images, 12).int() - want.int()).abs().max() <= 1  # Pillow's own, within rounding
    assert resized(images, 32) is images and with_channels(images, 3) is images


@pytest.mark.skipif(not (SHARED / "fashion_mnist").is_dir(), reason="no ../shared/data/fashion_mnist")
def test_fashion_mnist_on_disk():
    module = data(FashionMNIST, SHARED / "fashion_mnist")
    assert len(module.split("test")) == 10_000
    batch = module.test_batch(0, 10_000)
    assert batch["label"].bincount().tolist() == [1000] * 10
    assert batch["label"][:5].tolist() == [9, 2, 1, 1, 6]
