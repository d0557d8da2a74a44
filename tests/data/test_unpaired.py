"""Two domains without pairs: which image of each an item has, where they are looked for, what is told and refused."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from atelier.core.errors import UserError
from atelier.core.rng import generator
from atelier.data.base import _Places, random_order
from atelier.data.reading import SUFFIXES
from atelier.data.unpaired import Unpaired, UnpairedImages

SHARED = Path(__file__).parents[3] / "shared" / "data"
FOLDERS = ["trainA", "trainB", "testA", "testB"]


def data(root: Path, **changed: object) -> Unpaired:
    fields = {
        "root": str(root), "folders": FOLDERS, "holdout": 0.4, "background": "white", "max_pixels": 1 << 20,
        "jitter": 0, "on_bad_image": "error", "memory_mb": 100, "cache": f"{root}.cache",
        "image_size": 4, "image_channels": 3, "batch_size": 2, "seed": 0, "limit": None,
        "num_workers": 0, "flip": False, "n_classes": 0, "n_attributes": 0, "conditions": [],
    }  # fmt: skip
    return Unpaired(**fields | changed)


def refusal(root: Path, **changed: object) -> UserError:
    with pytest.raises(UserError) as error:
        data(root, **changed).split("train")
    assert "\n" not in error.value.line()
    return error.value


def write(root: Path, **numbers: int) -> Path:
    """So many images in each folder; image k of the f-th folder has the grey 30 f + k."""
    for f, (folder, n) in enumerate(numbers.items()):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for k in range(n):
            Image.new("RGB", (8, 8), (30 * f + k,) * 3).save(root / folder / f"{k}.png", "BMP")  # all of one length
    return root


def greys(images: torch.Tensor) -> list[int]:
    return (images[:, 0, 0, 0] * 127.5 + 127.5).round().int().tolist()


def generators(n: int) -> list[torch.Generator]:
    return [generator(7, k) for k in range(n)]


@pytest.mark.parametrize(("n_a", "n_b"), [(5, 3), (3, 5), (1, 4)])
def test_without_generators_the_smaller_domain_begins_anew(tmp_path, n_a, n_b):
    module = data(write(tmp_path / "set", trainA=2, trainB=2, testA=n_a, testB=n_b))
    assert module.provides == {"image_a", "image_b"}
    n = max(n_a, n_b)
    assert len(module.split("test")) == n
    assert [module.count("test", field) for field in ("image_a", "image_b", "image")] == [n_a, n_b, n_b]
    batch = module.test_batch(0, n)
    assert set(batch) == {"image", "image_a", "image_b", "index"} and batch["image_a"].shape == (n, 3, 4, 4)
    assert greys(batch["image_a"]) == [60 + (random_order(n_a) * n)[k] for k in range(n)]
    assert greys(batch["image_b"]) == [90 + (random_order(n_b) * n)[k] for k in range(n)]
    assert torch.equal(batch["image"], batch["image_b"]) and batch["index"].tolist() == list(range(n))


def test_in_training_b_is_drawn_and_a_is_not(tmp_path):
    images = data(write(tmp_path / "set", trainA=3, trainB=7, testA=1, testB=1)).split("train")
    assert len(images) == 7
    rows = [k % 7 for k in range(700)]
    batch = images.read(rows, generators(700))
    assert greys(batch["image_a"]) == [random_order(3)[k % 3] for k in rows]
    of_b = [random_order(7).index(grey - 30) for grey in greys(batch["image_b"])]
    assert of_b == [int(torch.randint(7, (), generator=rng)) for rng in generators(700)]
    counts = np.bincount(of_b, minlength=7)
    assert counts.min() > 60 and counts.max() < 140  # uniform: 100, sigma 9.3
    with_own = np.mean([b == row for b, row in zip(of_b, rows, strict=True)])
    assert abs(with_own - 1 / 7) < 0.05  # independent of the item


def test_what_is_drawn_is_a_function_of_seed_epoch_and_index(tmp_path):
    images = data(write(tmp_path / "set", trainA=3, trainB=20, testA=1, testB=1)).split("train")
    places = [(epoch, index) for epoch in range(2) for index in range(20)]
    first = _Places(images, range(20), 0).__getitems__(places)["image_b"]
    again = torch.cat([_Places(images, range(20), 0).__getitems__([place])["image_b"] for place in places])
    assert torch.equal(first, again)
    assert not torch.equal(first[:20], first[20:])
    assert not torch.equal(first, _Places(images, range(20), 1).__getitems__(places)["image_b"])


def noise(path: Path, size: int = 20) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(str(path)))
    Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)


def places(images: torch.Tensor, wide: torch.Tensor) -> list[tuple[int, int, bool]]:
    """Where each of the images (B, 3, 8, 8) was cut out of (3, 10, 10), and whether it was mirrored."""
    options = [(y, x, flip) for y in range(3) for x in range(3) for flip in (False, True)]
    cuts = torch.stack([wide[:, y : y + 8, x : x + 8].flip([-1] if flip else []) for y, x, flip in options])
    found = (images[:, None] - cuts).abs().amax((2, 3, 4)) < 1e-6
    assert (found.sum(1) == 1).all()
    return [options[k] for k in found.long().argmax(1)]


def test_each_domain_is_cut_and_mirrored_by_itself(tmp_path):
    for folder in FOLDERS:
        noise(tmp_path / "set" / folder / "0.png")
    images = data(tmp_path / "set", image_size=8, jitter=2, flip=True).split("train")
    wide = data(tmp_path / "set", image_size=10).split("train").read([0], None)
    batch = images.read([0] * 200, generators(200))
    of_a, of_b = (places(batch[name], wide[name][0]) for name in ("image_a", "image_b"))
    for found in (of_a, of_b):
        assert len(set(found)) == 18 and 70 < sum(flip for _, _, flip in found) < 130
    assert sum(a[:2] == b[:2] for a, b in zip(of_a, of_b, strict=True)) < 50  # 1 of 9 by chance
    assert 70 < sum(a[2] == b[2] for a, b in zip(of_a, of_b, strict=True)) < 130
    for name in ("image_a", "image_b"):
        assert torch.equal(images.read([0], generators(6)[5:])[name][0], batch[name][5])


def test_two_folders_are_held_out_from(tmp_path):
    root = write(tmp_path / "set", cats=20, dogs=4)
    module = data(root, folders=["cats", "dogs"])
    sizes = [(len(module.split(split).a), len(module.split(split).b)) for split in ("train", "test")]
    assert np.sum(sizes, axis=0).tolist() == [20, 4] and min(map(min, sizes)) > 0
    same = data(root, folders=["cats", "dogs"], holdout=0.0)
    assert len(same.split("train")) == len(same.split("test")) == 20


def test_folders_may_be_classes(tmp_path):
    root = write(tmp_path / "set", **{"train/a": 3, "train/b": 2, "test/a": 1, "test/b": 1, "train/c": 4})
    module = data(root, folders=["train/b", "train/a", "test/b", "test/a"])
    assert sorted(greys(module.split("train").read([0, 1], None)["image_a"])) == [30, 31]
    assert greys(module.test_batch(0, 1)["image_b"]) == [60]


def test_a_limit_is_of_each_domain(tmp_path):
    module = data(write(tmp_path / "set", trainA=6, trainB=9, testA=5, testB=5), limit=2)
    images = module.split("train")
    assert module.n_train == len(images) == 2 and len(module.split("test")) == 5
    assert set(greys(images.read([0] * 60, generators(60))["image_b"])) == {30 + k for k in random_order(9)[:2]}


@pytest.mark.parametrize(("copied", "n"), [
    ([("trainA/0.png", "trainB/7.png")], 1),  # both domains
    ([("trainA/0.png", "testA/7.png"), ("trainA/1.png", "testB/7.png")], 2),  # both splits
    ([("trainA/0.png", "trainA/7.png")], 0),  # twice in one place
    ([("trainA/0.png", name) for name in ("trainB/7.png", "testA/7.png", "testB/7.png")], 1),
    ([], 0),
])  # fmt: skip
def test_images_in_both_domains_or_splits_are_told_once(tmp_path, copied, n):
    root = write(tmp_path / "set", trainA=3, trainB=3, testA=3, testB=3)
    for source, target in copied:
        (root / target).write_bytes((root / source).read_bytes())
    sizes = {path.stat().st_size for path in root.rglob("*.png")}
    assert len(sizes) == 1  # so that only the content tells them apart
    module = data(root)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        module.prepare_data()
    assert [str(one.message) for one in told] == (
        [f"{root}: {n} images are in both domains or both splits, with the same content"] if n else []
    )


@pytest.mark.parametrize("holdout", [0.0, 0.5])
def test_testing_on_the_training_images_is_no_news(tmp_path, holdout):
    assert data(write(tmp_path / "set", a=4, b=4), folders=["a", "b"], holdout=holdout).n_repeated() == 0
    (tmp_path / "set" / "b" / "9.png").write_bytes((tmp_path / "set" / "a" / "1.png").read_bytes())
    assert data(tmp_path / "set", folders=["a", "b"], holdout=holdout).n_repeated() == 1


def test_an_empty_domain_is_refused(tmp_path):
    root = write(tmp_path / "set", trainA=2, trainB=0, testA=1, testB=1)
    assert refusal(root).problem == f"0 images ({' '.join(SUFFIXES)}) under {root}/trainB"
    (root / "trainB" / "0.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="1 of 5 images cannot be read"):
        error = refusal(root, on_bad_image="skip")
    assert error.problem == "no readable image of domain B is left to train"


def test_a_missing_folder_names_its_neighbour(tmp_path):
    root = write(tmp_path / "set", trainA=1, trainB=1, testA=1, testB=1)
    error = refusal(root, folders=["train_A", "trainB", "testA", "testB"])
    assert (error.key, error.problem) == ("data.folders", f"no folder train_A in {root}")
    assert error.fix.startswith("trainA in its place")
    inside = write(tmp_path / "classes", **{"train/cat": 1, "train/dog": 1})
    assert refusal(inside, folders=["train/cat", "train/dogs"]).fix.startswith("train/dog in its place")
    assert refusal(inside, folders=["cat", "nowhere/dog"]).fix.startswith("train in its place")
    assert refusal(root, folders=FOLDERS[:3]).problem == "it names three folders"
    assert refusal(tmp_path / "sets").problem == "no such folder"


def test_readable_in_a_worker_and_told_apart(tmp_path):
    module = data(write(tmp_path / "set", trainA=2, trainB=2, testA=1, testB=1))
    images: UnpairedImages = pickle.loads(pickle.dumps(module.split("train")))
    assert torch.equal(images.read([1], None)["image"], module.split("train").read([1], None)["image"])
    other = data(tmp_path / "set", folders=["trainB", "trainA", "testA", "testB"])
    assert other.fingerprint("train") != module.fingerprint("train")


@pytest.mark.skipif(not (SHARED / "clothing128").is_dir(), reason="no ../shared/data/clothing128")
def test_two_kinds_of_clothes(tmp_path):
    folders = ["train/t-shirt", "train/dress", "test/t-shirt", "test/dress"]
    module = data(SHARED / "clothing128", folders=folders, cache=str(tmp_path), image_size=32)
    for split, folder in (("train", folders[:2]), ("test", folders[2:])):
        images = module.split(split)
        counted = [len(list((SHARED / "clothing128" / name).iterdir())) for name in folder]
        assert [len(images.a), len(images.b)] == counted and len(images) == max(counted) > 10
    batch = module.split("train").read([0, 5], generators(2))
    assert batch["image_a"].std() > 0.3 and batch["image_b"].std() > 0.3
