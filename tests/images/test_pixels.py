"""Grey levels: made in one place, and given back exactly."""

from __future__ import annotations

import torch

from atelier.images.pixels import to_float, to_uint8

LEVELS = torch.arange(256, dtype=torch.uint8)


def test_black_and_white() -> None:
    assert to_float(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


def test_every_level_comes_back() -> None:
    assert torch.equal(to_uint8(to_float(LEVELS)), LEVELS)
    assert torch.equal(to_uint8(LEVELS.double() / 127.5 - 1), LEVELS)


def test_levels_are_the_nearest_and_saturate() -> None:
    x = torch.tensor([-3.0, -1.0, -0.004, 0.0, 0.0039, 1.0, 1.3, torch.inf, -torch.inf, torch.nan])
    assert to_uint8(x).tolist() == [0, 0, 127, 128, 128, 255, 255, 255, 0, 0]


def test_half_precision_is_widened_first() -> None:
    x = torch.linspace(-1, 1, 1001).bfloat16()
    assert torch.equal(to_uint8(x), to_uint8(x.float()))
