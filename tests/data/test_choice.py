"""Which n images of a set are taken: they stand for all of it, whoever takes them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import sample
import train
from atelier.callbacks.grids import Grids
from atelier.core.rng import ImageRngs
from atelier.data.base import DataModule, MemoryImages, Split, random_order, stratified
from atelier.data.folders import FileImages
from atelier.evaluation.evaluator import Evaluator, training_set
from atelier.evaluation.gathering import read
from atelier.images.pictures import LINE
from atelier.images.pixels import to_uint8
from atelier.models.base import Autoencoder, Cond, Likelihood
from atelier.requests.request import Request
from tests.compose import composed
from tests.tiny import TINY

CLASSES, EACH, N = 10, 30, 20


class Sorted(DataModule):
    """Ten classes, one after another; an image is as bright as its label."""

    provides = frozenset({"label"})

    def images(self, split: Split) -> MemoryImages:
        labels = torch.arange(CLASSES).repeat_interleave(EACH)
        return MemoryImages(labels.byte()[:, None, None, None].expand(-1, 3, 16, 16), {"label": labels}, False)


def made(kind: type[DataModule] = Sorted, **changed: Any) -> DataModule:
    given = {"image_size": 16, "image_channels": 3, "batch_size": N, "seed": 0, "limit": None, "num_workers": 0}
    return kind(**given | {"flip": False, "n_classes": CLASSES, "n_attributes": 0, "conditions": []} | changed)


def shown(images: Tensor) -> list[int]:
    """The labels of images in [-1, 1]."""
    return to_uint8(images)[:, 0, 0, 0].tolist()


class Mirror(Autoencoder, Likelihood):
    """Gives everything back, and notes the labels of all that it is shown."""

    needs = frozenset({"label"})

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[int]] = {"samples": [], "reconstructed": [], "likelihood": []}

    def sample_latents(self, rngs: ImageRngs, cond: Cond) -> Tensor:
        self.seen["samples"] += cond["label"].tolist()
        return torch.zeros(len(rngs), 3, 16, 16)

    def encode(self, x: Tensor, rngs: ImageRngs | None = None) -> Tensor:
        self.seen["reconstructed"] += shown(x)
        return x

    def decode(self, z: Tensor) -> Tensor:
        return z

    def nll(self, x: Tensor, cond: Cond, rngs: ImageRngs) -> Tensor:
        self.seen["likelihood"] += shown(x)
        return torch.zeros(len(x))


def judged(data: DataModule) -> dict[str, list[int]]:
    """The labels of all images that a judgement looks at."""
    model, real = Mirror(), []

    def compute(_: str, facts: Callable[[], dict[str, Tensor]], agree: object) -> dict[str, Tensor]:
        real.append(facts())
        return real[-1]

    suite = SimpleNamespace(active=True, lpips=None, clip=None, knows_labels=False, protocol=dict, real=compute)
    suite.features, suite.compare = (lambda images: images[:, :1, 0, 0].float()), (lambda real, fake: {})
    Evaluator(N, N, 8, 0, suite)(model, data, {}, nullcontext, lambda *_: None)
    names = ("real test", "real train", "real of reconstructions")
    return model.seen | {name: facts["label"].tolist() for name, facts in zip(names, real, strict=True)}


def picture(data: DataModule, folder: Path) -> list[int]:
    """The labels in real.png: 4 rows of 5 cells, 64 px wide and 2 px apart, with a line of words below each row."""
    grids = Grids(1, N, 0, str(folder), False, SimpleNamespace(images_seen=0), None, None)
    trainer = SimpleNamespace(is_global_zero=True, datamodule=data)
    grids.on_train_start(trainer, Mirror())
    pixels = np.array(Image.open(folder / "real.png"))[34 :: 66 + LINE, 34::66, 0]
    return pixels.flatten().tolist()


def trained_on(data: DataModule) -> list[int]:
    """The labels of an epoch."""
    data.trainer = SimpleNamespace(
        global_rank=0, world_size=1, strategy=SimpleNamespace(root_device=torch.device("cpu"))
    )
    return next(iter(data.train_dataloader()))["label"].tolist()


def taught(data: DataModule) -> list[int]:
    """The labels that a classifier of N images learns from."""
    with patch("atelier.evaluation.evaluator.N_TRAINING", N):
        return training_set(data)[1].tolist()


TAKERS: dict[str, Callable[[Path], list[int]]] = {
    "test_batch": lambda _: made().test_batch(0, N)["label"].tolist(),
    "train": lambda _: [k for _, b in read(made(), "train", N, 8, "", lambda *_: None) for k in b["label"].tolist()],
    "classifier": lambda _: taught(made()),
    "limit": lambda _: trained_on(made(limit=N)),
    "samples of a request": lambda _: Request(Mirror(), made()).conditions(0, N)["label"].tolist(),
    "real.png": lambda folder: picture(made(), folder),
    **{
        name: lambda _, name=name: judged(made())[name]
        for name in ("samples", "reconstructed", "likelihood", "real test", "real train", "real of reconstructions")
    },
}


@pytest.mark.parametrize("taker", TAKERS)
def test_n_images_of_a_sorted_set_have_every_label_as_often(taker: str, tmp_path: Path) -> None:
    assert torch.tensor(TAKERS[taker](tmp_path)).bincount(minlength=CLASSES).tolist() == [N // CLASSES] * CLASSES


@pytest.mark.parametrize("taker", ["real.png", "samples", "samples of a request"])
def test_a_set_smaller_than_n_comes_round_again(taker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And of what is given back, each image is judged once."""
    monkeypatch.setattr(f"{__name__}.EACH", 1)
    monkeypatch.setattr(f"{__name__}.CLASSES", 6)
    assert TAKERS[taker](tmp_path) == (made().order("test") * 4)[:N]
    assert judged(made())["reconstructed"] == made().order("test")


def test_an_order_begins_anew_at_its_end_and_is_no_matter_of_the_seed() -> None:
    data, n = made(), CLASSES * EACH
    batch = data.test_batch(n - 1, 3)
    assert batch["index"].tolist() == [data.order("test")[k] for k in (n - 1, 0, 1)]
    assert sorted(data.order("train")) == list(range(n)) and data.order("train") == made(seed=5).order("train")
    assert data.choice("test") == "stratified by label, seed 0"


@pytest.mark.parametrize("counts", [[30] * 10, [500, 7, 50], [1, 1, 1], [200]])
def test_any_first_n_have_labels_in_proportion(counts: list[int]) -> None:
    """After one of each label, a label has what is its share, give or take one for each label."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    order = stratified(labels)
    assert sorted(order) == list(range(len(labels)))
    assert labels[order][: len(counts)].unique().tolist() == list(range(len(counts)))
    for n in range(1, len(labels) + 1):
        found = labels[order][:n].bincount(minlength=len(counts))
        share = n * torch.tensor(counts) / len(labels)
        assert (found - share).abs().max() <= (1 if len(set(counts)) == 1 else len(counts))


def test_a_set_without_labels_is_shuffled_and_one_that_is_shuffled_is_not() -> None:
    class Unlabelled(Sorted):
        def images(self, split: Split) -> MemoryImages:
            return MemoryImages(torch.zeros(50, 3, 16, 16, dtype=torch.uint8), {}, False)

    class Shuffled(Sorted):
        shuffled = True

    plain, kept = made(Unlabelled), made(Shuffled)
    assert plain.order("test") == random_order(50) != list(range(50)) and plain.choice("test") == "random, seed 0"
    assert kept.order("test") == list(range(CLASSES * EACH)) and kept.choice("test") == "the first"


def test_images_of_a_label_are_found_without_a_look_at_any(monkeypatch: pytest.MonkeyPatch) -> None:
    data = made()
    monkeypatch.setattr(MemoryImages, "read", lambda *_: pytest.fail("read"))
    left_out = ("direction", "scale_factor", "attributes", "source", "strength", "mask", "resamplings")
    left_out += ("prompt", "prompts", "negative", "instruction")
    words = dict.fromkeys(left_out) | {"do": "sample", "label": 9, "seed": 0}
    found = Request.of(Mirror.__new__(Mirror), data, {}, words).items
    assert sorted(found) == list(range(9 * EACH, 10 * EACH)) and found != sorted(found)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conditional GAN of ten folders with a training and two test images each."""
    root = tmp_path_factory.mktemp("sorted")
    for part, n in (("train", 1), ("test", 2)):
        for label in range(CLASSES):
            (root / "set" / part / f"class{label}").mkdir(parents=True)
            for k in range(n):
                Image.new("RGB", (8, 8), (label, 0, 0)).save(root / "set" / part / f"class{label}" / f"{k}.png")
    words = [word for word in TINY["gan"] if "_scenes" not in word and word != "data=shapes"]
    words += ["data=classes", f"data.root={root}/set", f"data.cache={root}/cache", "budget.images=8"]
    train.train(composed(*words, "eval.every_images=8", run_dir=root / "run"))
    return root / "run"


def test_a_request_for_the_last_label_reads_its_images_alone(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one for none shows all of them; the protocol of the run says how they were chosen."""
    opened: list[str] = []
    kept = FileImages._decoded
    monkeypatch.setattr(
        FileImages, "_decoded", lambda self, index: opened.append(self.paths[index].parent.name) or kept(self, index)
    )
    sample.sample(composed(f"run={run}", "n=6", "label=9", f"out={tmp_path}/nine", config="sample"))
    assert set(opened) == {"class9"} and (tmp_path / "nine" / "000005.png").is_file()
    opened.clear()
    sample.sample(composed(f"run={run}", "n=10", f"out={tmp_path}/all", config="sample"))
    assert sorted(opened) == [f"class{label}" for label in range(CLASSES)]
    assert '"choice": "stratified by label, seed 0"' in (run / "summary.json").read_text()
