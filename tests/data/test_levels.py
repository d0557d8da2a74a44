"""Grey levels cross to a device in place of floats: a quarter of the bytes, and the same numbers there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
from atelier.checkpoints.store import load, newest
from atelier.core.rng import generator
from atelier.data.base import DataModule, Images, Levelled, MemoryImages, with_floats
from atelier.data.file_images import FileImages
from atelier.data.reading import pixels
from atelier.data.shapes import SceneImages
from atelier.data.superres import Squares
from atelier.images.pixels import looked_up, to_float
from tests.compose import composed
from tests.tiny import tiny


def read_file(path: Path) -> torch.Tensor:
    return pixels(Image.open(path))


def files(folder: Path) -> list[Path]:
    for k in range(4):
        noise = torch.randint(0, 256, (16, 16, 3), generator=generator(k), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{k}.png")
    return sorted(folder.glob("*.png"))


SETS: dict[str, Callable[[Path], Images]] = {
    "memory": lambda _: MemoryImages(torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8), {}, True),
    "files": lambda folder: FileImages(files(folder), read_file, {}, True, False, ""),
    "scenes": lambda _: SceneImages("train", 4, "none", 16, True, None),
    "scenes with masks": lambda _: SceneImages("train", 4, "inpaint", 16, True, None),
    "scenes with sources": lambda _: SceneImages("train", 4, "low_resolution", 16, True, None),
    "squares": lambda folder: Squares(files(folder), [], read_file, 8, 2, True, True, False, ""),
}


def test_a_look_up_is_the_arithmetic_to_the_bit() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(2, 2, 8, 8)
    assert torch.equal(looked_up(levels), to_float(levels)) and looked_up(levels).dtype == torch.float32


@pytest.mark.parametrize("name", SETS)
def test_levels_are_what_is_read_in_a_quarter_of_the_bytes(name: str, tmp_path: Path) -> None:
    images = SETS[name](tmp_path)
    assert isinstance(images, Levelled)
    floats, levels = (read([2, 0, 3], [generator(k) for k in range(3)]) for read in (images.read, images.levels))
    pictures = [field for field, value in levels.items() if getattr(value, "dtype", None) == torch.uint8]
    assert "image" in pictures and set(levels) == set(floats)
    assert all(4 * levels[field].nbytes == floats[field].nbytes for field in pictures)
    again = with_floats(levels, looked_up)
    for field, value in floats.items():
        assert torch.equal(again[field], value) if isinstance(value, torch.Tensor) else again[field] == value


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_a_run_whose_batches_cross_learns_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the CPU were a device with memory of its own."""
    seen: list[torch.dtype] = []
    for crosses in (False, True):
        monkeypatch.setattr(DataModule, "crosses", crosses)
        transfer = DataModule.on_after_batch_transfer

        def noted(self, batch, k, transfer=transfer):
            seen.append(batch["image"].dtype) if isinstance(batch, dict) else None
            return transfer(self, batch, k)

        with monkeypatch.context() as inside:
            inside.setattr(DataModule, "on_after_batch_transfer", noted)
            train.train(composed(*tiny("vae"), "budget.images=24", run_dir=tmp_path / str(crosses)))
    assert seen == [torch.float32] * 3 + [torch.uint8] * 3
    states = [load(newest(tmp_path / str(crosses) / "checkpoints"))["state_dict"] for crosses in (False, True)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
