from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from atelier.images.pictures import LINE, grid, save_gif, save_png


def test_a_png_holds_the_same_levels(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    for channels in (1, 3):
        image = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8, generator=rng)
        save_png(image, tmp_path / "image.png")
        with Image.open(tmp_path / "image.png") as picture:
            assert picture.mode == {1: "L", 3: "RGB"}[channels]
            read = torch.from_numpy(np.array(picture).reshape(5, 7, channels)).permute(2, 0, 1)
        assert torch.equal(read, image)


def test_a_grid_enlarges_small_images_and_keeps_their_places() -> None:
    images = torch.stack([torch.full((1, 16, 16), 10 * k, dtype=torch.uint8) for k in range(6)])
    picture = grid(images, columns=3, padding=2, cell=64)
    assert picture.shape == (3, 2 * 66 + 2, 3 * 66 + 2)
    assert picture.dtype == torch.uint8
    middles = [int(picture[0, 34 + 66 * row, 34 + 66 * column]) for row in range(2) for column in range(3)]
    assert middles == [0, 10, 20, 30, 40, 50]
    assert grid(torch.zeros(4, 3, 128, 128, dtype=torch.uint8)).shape == (3, 2 * 130 + 2, 2 * 130 + 2)


def test_words_stand_below_their_pictures_and_are_cut_where_they_are_wider() -> None:
    images = torch.full((3, 1, 64, 64), 7, dtype=torch.uint8)
    for n, edge in ((3, 2), (1, 0)):
        picture = grid(images[:n], columns=2, words=["", "cat\ndog", "W" * 40][-n:])
        assert picture.shape == (3, -(-n // 2) * (64 + LINE + edge) + edge, min(n, 2) * (64 + edge) + edge)
        for k in range(n):
            top, left = edge + k // 2 * (64 + LINE + edge), edge + k % 2 * (64 + edge)
            assert (picture[:, top : top + 64, left : left + 64] == 7).all()
            written = picture[0, top + 64 : top + 64 + LINE, left : left + 64].max() > 200
            assert written == (n == 1 or k > 0)
        edges = picture[:, :, -edge:] if edge else picture[:, :0]
        assert not edges.any(), "a word is no wider than its picture"


def test_what_is_wider_than_its_picture_takes_two_lines() -> None:
    images = torch.full((2, 1, 64, 64), 7, dtype=torch.uint8)
    picture = grid(images, columns=2, words=["cat", "magenta square"])
    assert picture.shape == (3, 64 + 2 * LINE + 4, 2 * 66 + 2)
    first, second = (picture[0, 66 + k * LINE : 66 + (k + 1) * LINE] for k in range(2))
    assert first[:, 2:66].max() > 200 and not second[:, 2:66].any()
    alone = grid(images[:1], words=["square"])[0, 64 : 64 + LINE]
    assert torch.equal(second[:, 68:132], alone) and not torch.equal(first[:, 68:132], alone)


def test_an_animation_has_every_frame(tmp_path: Path) -> None:
    frames = torch.stack([torch.full((3, 8, 8), level, dtype=torch.uint8) for level in (0, 120, 255)])
    save_gif(frames, tmp_path / "path.gif", milliseconds=50)
    with Image.open(tmp_path / "path.gif") as animation:
        assert animation.n_frames == 3
        assert (animation.info["duration"], animation.info["loop"]) == (50, 0)
