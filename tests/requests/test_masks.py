"""Masks: words, files, folders, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from atelier.core.errors import UserError
from atelier.core.rng import ImageRngs
from atelier.requests import masks


def save(path: Path, levels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(levels.astype(np.uint8)).save(path)
    return path


def test_words() -> None:
    rows = masks.drawn("center", 8, ImageRngs(0, 0, 2))[1, 0].int().tolist()
    assert rows == [[0] * 8] * 2 + [[0, 0, 1, 1, 1, 1, 0, 0]] * 4 + [[0] * 8] * 2
    assert masks.drawn("left", 4, ImageRngs(0, 0, 1))[0, 0].int().tolist() == [[1, 1, 0, 0]] * 4


def test_random_boxes_belong_to_images_and_take_no_noise_of_theirs() -> None:
    rngs = ImageRngs(0, 0, 200)
    drawn = masks.drawn("random", 100, rngs)
    assert torch.equal(drawn[7:9], masks.drawn("random", 100, ImageRngs(0, 7, 2)))
    assert torch.equal(rngs.randn(2), ImageRngs(0, 0, 200).randn(2))
    height, width = drawn.any(3).sum((1, 2)), drawn.any(2).sum((1, 2))
    assert torch.equal(drawn.sum((1, 2, 3)), height * width)  # boxes
    for side in (height, width):
        assert 29 <= side.min() and side.max() <= 61 and side.float().mean().item() == pytest.approx(45, abs=2)
    assert (height != width).float().mean() > 0.9
    assert drawn.float().mean(0)[0, 50, 50] > 2 * drawn.float().mean(0)[0, 5, 50] > 0


def test_a_file_is_cut_and_resized_as_its_image(tmp_path: Path) -> None:
    levels = np.zeros((4, 8))
    levels[:, :4] = 255  # of 8 columns 2 to 5 are kept
    path = save(tmp_path / "mask.png", levels)
    assert masks.read(str(path), "x.png", (8, 4), 4)[0, 0].int().tolist() == [[1, 1, 0, 0]] * 4
    assert masks.read(str(path), "x.png", (8, 4), 8)[0, 0].int().sum(1).tolist() == [4] * 8
    grey = save(tmp_path / "grey.png", np.array([[127, 128], [0, 255]]))
    assert masks.read(str(grey), "x.png", (2, 2), 2)[0, 0].int().tolist() == [[0, 1], [0, 1]]


def test_a_folder_has_one_for_each_source(tmp_path: Path) -> None:
    save(tmp_path / "a.png", np.zeros((2, 2)))
    save(tmp_path / "sub" / "b.bmp", np.full((2, 2), 255))
    assert not masks.read(str(tmp_path), "a.png", (2, 2), 2).any()
    assert masks.read(str(tmp_path), "sub/b.png", (2, 2), 2).all()
    with pytest.raises(UserError, match=r"no mask named like c.png is there"):
        masks.read(str(tmp_path), "c.png", (2, 2), 2)


def test_what_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", np.zeros((2, 3)))
    with pytest.raises(UserError) as error:
        masks.read(str(path), "x.png", (8, 8), 8)
    assert "it is 3 x 2 pixels, the image 8 x 8. Fix: a mask of 8 x 8, or mask=center" in error.value.line()
    with pytest.raises(UserError, match="there is no such file or folder. Fix: mask=FILE_OR_FOLDER, or center, left"):
        masks.read(str(tmp_path / "no.png"), "x.png", (8, 8), 8)
    (tmp_path / "b.png").write_text("no image")
    with pytest.raises(UserError, match="not a PNG"):
        masks.read(str(tmp_path / "b.png"), "x.png", (8, 8), 8)
