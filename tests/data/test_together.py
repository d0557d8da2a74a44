"""All images of one sample are cut, mirrored and turned together, in every set that has several; texts go with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from atelier.core.batch import Batch, rows_of
from atelier.core.rng import generator
from atelier.data.base import DataModule
from atelier.data.captioned import Captioned
from atelier.data.pairs import Edges, Pairs, edge_map
from atelier.data.superres import SuperRes
from atelier.images.bicubic import reduced
from atelier.images.pixels import to_float, to_uint8
from tests.data.test_folders import data
from tests.data.test_shapes import shapes_set

Holds = Callable[[Batch], Tensor]  # whether the images of each sample fit, (B,) bool


def blocks(seed: int, side: int = 12) -> np.ndarray:
    """Random colours (side, side, 3), each over 2 x 2 pixels, of which no part is like another or like its mirror."""
    small = np.random.default_rng(seed).integers(0, 256, (side // 2, side // 2, 3), dtype=np.uint8)
    return small.repeat(2, 0).repeat(2, 1)


def saved(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def same(a: Tensor, b: Tensor, atol: float = 0.01) -> Tensor:
    return (a - b).flatten(1).abs().amax(1) <= atol


def pairs(root: Path) -> tuple[DataModule, Holds]:
    """B is the negative of A, in two folders."""
    for k in range(4):
        saved(root / "A" / f"{k}.png", blocks(k))
        saved(root / "B" / f"{k}.png", 255 - blocks(k))
    module = data(Pairs, root, direction="a2b", jitter=4, image_size=8, flip=True)
    return module, lambda batch: same(batch["image"], -batch["source"])


def halves(root: Path) -> tuple[DataModule, Holds]:
    """The same in one file for a pair."""
    for k in range(4):
        saved(root / f"{k}.png", np.concatenate([blocks(k), 255 - blocks(k)], axis=1))
    module = data(Pairs, root, direction="b2a", jitter=4, image_size=8, flip=True)
    return module, lambda batch: same(batch["image"], -batch["source"])


def edges(root: Path) -> tuple[DataModule, Holds]:
    for k in range(4):
        saved(root / f"{k}.png", blocks(k))
    module = data(Edges, root, jitter=4, sigma=1.0, threshold=0.03, image_size=8, flip=True)
    return module, lambda batch: same(edge_map(batch["image"], 1.0, 0.03).expand_as(batch["image"]), batch["source"])


def superres_files(root: Path) -> tuple[DataModule, Holds]:
    """A source file is the image, a pixel for each block."""
    for k in range(4):
        saved(root / "HR" / f"{k}.png", blocks(k))
        saved(root / "LR" / f"{k}.png", blocks(k)[::2, ::2])
    module = data(SuperRes, root, scale_factor=2, resize=None, turn=True, image_size=8, flip=True)
    return module, lambda batch: same(batch["image"][..., ::2, ::2], batch["source"])


def superres_made(root: Path) -> tuple[DataModule, Holds]:
    for k in range(4):
        saved(root / f"{k}.png", blocks(k))
    module = data(SuperRes, root, scale_factor=2, resize=None, turn=True, image_size=8, flip=True)
    return module, lambda batch: same(to_float(to_uint8(reduced(batch["image"], 2))), batch["source"])


def emoji(root: Path) -> tuple[DataModule, Holds]:
    """Black on white where the alpha is."""
    for k in range(4):
        alpha = 255 * (blocks(k)[:, :, :1] > 127)
        saved(root / f"{k}.png", np.concatenate([np.zeros((12, 12, 3)), alpha], axis=2).astype(np.uint8))
        (root / f"{k}.txt").write_text("blocks")
    module = data(Captioned, root, masks="alpha", image_size=12, flip=True)
    return module, lambda batch: same(batch["image"], (1 - 2 * batch["mask"]).expand_as(batch["image"]))


def inpainted_shapes(root: Path) -> tuple[DataModule, Holds]:
    """The box of a mask is that of what is not ground."""

    def holds(batch: Batch) -> Tensor:
        there = (batch["image"] - batch["image"][:, :, :1, :1]).abs().amax(1) > 0.02  # the corner is ground
        box = batch["mask"][:, 0] > 0
        grown = torch.nn.functional.max_pool2d(there.float()[:, None], 3, 1, 1)[:, 0] > 0
        fits = [(box.any(axis) == grown.any(axis)).float().mean(1) > 0.85 for axis in (1, 2)]
        return (fits[0] & fits[1]) | (batch["mask_kind"] == 1)

    return shapes_set(task="inpaint", image_size=32, flip=True), holds


def label_map_shapes(root: Path) -> tuple[DataModule, Holds]:
    """The second plane of a label map is above its least inside the object, which the image differs from ground in."""

    def holds(batch: Batch) -> Tensor:
        there = (batch["image"] - batch["image"][:, :, :1, :1]).abs().amax(1) > 0.02
        return ((batch["source"][:, 1] > -0.9) & ~there).flatten(1).sum(1) == 0

    return shapes_set(task="label_map", image_size=32, flip=True), holds


def low_resolution_shapes(root: Path) -> tuple[DataModule, Holds]:
    def holds(batch: Batch) -> Tensor:
        return same(torch.nn.functional.avg_pool2d(batch["image"], 4), batch["source"], atol=0.5)

    return shapes_set(task="low_resolution", image_size=64, flip=True), holds


SETS = (
    *(pairs, halves, edges, superres_files, superres_made, emoji),
    *(inpainted_shapes, label_map_shapes, low_resolution_shapes),
)


@pytest.mark.parametrize("made", SETS)
def test_what_belongs_together_moves_together(made: Callable[[Path], tuple[DataModule, Holds]], tmp_path: Path) -> None:
    """Of the samples as they are drawn all fit; and the samples are drawn in many ways, mirrored ones among them."""
    module, holds = made(tmp_path)
    images = module.split("train")
    drawn = [images.read([0, 1, 2, 3], [generator(k, i) for i in range(4)]) for k in range(24)]
    assert all(holds(batch).all() for batch in drawn)
    ways = {batch["image"][i].numpy().tobytes() for batch in drawn for i in range(4)}
    assert len(ways) >= 8
    apart = [batch | {"image": batch["image"].flip(-1)} for batch in drawn]  # what is mirrored alone is noticed
    assert any(not holds(batch).all() for batch in apart)


def test_texts_and_masks_are_those_of_one_process_in_workers_and_where_a_run_resumes(tmp_path: Path) -> None:
    for k in range(7):
        saved(tmp_path / f"{k}.png", blocks(k))
        (tmp_path / f"{k}.txt").write_text("\n".join(f"image {k} text {j}" for j in range(3)))

    def batches(workers: int, seen: int, n: int) -> list[Batch]:
        module = data(Captioned, tmp_path, image_size=8, flip=True, masks="lama", batch_size=4, num_workers=workers)
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
        module.trainer = SimpleNamespace(global_rank=0, world_size=1, strategy=strategy)
        module.position = lambda: seen
        stream = iter(module.train_dataloader())
        return [next(stream) for _ in range(n)]

    whole = batches(0, 0, 8)
    for other, begun in ((batches(2, 0, 8), 0), (batches(0, 12, 5), 3), (batches(2, 12, 5), 3)):
        for batch, expected in zip(other, whole[begun:], strict=True):
            assert batch["text"] == expected["text"] and isinstance(batch["text"], list)
            assert all(torch.equal(batch[name], expected[name]) for name in ("image", "mask", "index"))
    for batch in whole:
        assert [text.split(" text")[0] for text in batch["text"]] == [f"image {i}" for i in batch["index"].tolist()]
    assert len({text for batch in whole for text in batch["text"]}) > 10  # several of each image
    rows = rows_of({name: whole[0][name] for name in ("text", "mask")}, torch.tensor([2, 0, 2]))
    assert rows["text"] == [whole[0]["text"][k] for k in (2, 0, 2)] and torch.equal(
        rows["mask"][1], whole[0]["mask"][0]
    )
