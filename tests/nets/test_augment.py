"""Augmentations: each image by its own draw, gradients through, ADA's probability by its rule."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from atelier.nets.augment import ADA, DiffAugment, cut, hue_turned, recoloured, rotation, scaling, shift, translated


def images(n: int = 64, channels: int = 3, size: int = 16) -> Tensor:
    torch.manual_seed(0)
    return torch.rand(n, channels, size, size) * 2 - 1


def ada(p: float, **other: float) -> ADA:
    return ADA(**({"target": 0.6, "images_per_unit": 1000, "every_images": 8, "p": p} | other))


def test_translation_moves_by_whole_pixels_and_pads_with_zeros() -> None:
    x = images(200)
    moved, seen = translated(x), set()
    for before, after in zip(x, moved, strict=True):
        found = [
            (dy, dx) for dy in range(-2, 3) for dx in range(-2, 3)
            if torch.equal(after[:, max(0, -dy) : 16 - max(0, dy), max(0, -dx) : 16 - max(0, dx)],
                           before[:, max(0, dy) : 16 - max(0, -dy), max(0, dx) : 16 - max(0, -dx)])
        ]  # fmt: skip
        assert len(found) == 1
        seen.add(found[0])
        dy, dx = found[0]
        assert after.eq(0).all(0).sum() == 256 - (16 - abs(dy)) * (16 - abs(dx))
    assert len(seen) == 25


def test_cutout_is_a_square_of_half_the_size() -> None:
    x = images(300) + 2
    changed = cut(x)
    holes = (changed == 0).all(1)
    assert torch.equal(changed, x.masked_fill(holes[:, None], 0))
    rows, columns = holes.any(2).sum(1), holes.any(1).sum(1)
    assert torch.equal(holes.flatten(1).sum(1), rows * columns)
    assert rows.max() == columns.max() == 8 and rows.min() >= 4


def test_recolouring_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Brightness + 0.25, saturation times 0.5, contrast times 1.25."""
    x = images(4)
    draws = torch.tensor([0.75, 0.25, 0.75])[:, None, None, None, None]
    monkeypatch.setattr(torch, "rand", lambda *shape, device: draws.expand(*shape))
    bright = x + 0.25
    grey = bright.mean(1, keepdim=True)
    pale = grey + (bright - grey) * 0.5
    mean = pale.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(recoloured(x), mean + (pale - mean) * 1.25)


def test_diffaugment_lets_gradients_through_and_does_only_what_it_is_told() -> None:
    x = images(8).requires_grad_()
    DiffAugment(kinds=["color", "translation", "cutout"])(x).square().sum().backward()
    assert x.grad.flatten(1).any(1).all()
    assert torch.equal(DiffAugment(kinds=[])(x), x)


# ADA


def test_p_follows_its_rule() -> None:
    """p + sign(r - target) n / images_per_unit at each 8 images, never below 0."""
    augment = ada(0.0)
    sure, unsure = torch.ones(4), torch.tensor([1.0, 1.0, 1.0, -1.0])  # r = 1 and 0.5
    told = [augment.observe(logits)["ada_p"].item() for logits in (sure, sure, sure, unsure, sure, sure)]
    # after 8: r = 1; after 16: r = 0.75; after 24: r = 1
    assert told == pytest.approx([0, 0.008, 0.008, 0.016, 0.016, 0.024])
    for _ in range(10):
        augment.observe(-sure)
    assert augment.p == 0
    assert {"p", "signs", "seen"} == set(augment.state_dict())


def test_p_counts_the_signs_of_a_window_anew() -> None:
    augment = ada(0.5, every_images=4)
    augment.observe(torch.ones(4))
    assert augment.signs == 0 and augment.seen == 0
    assert augment.observe(-torch.ones(4))["ada_p"].item() == pytest.approx(0.5)


def test_at_p_0_nothing_changes() -> None:
    x = images(16)
    torch.testing.assert_close(ada(0.0)(x), x, atol=1e-5, rtol=0)


def test_at_p_1_every_image_changes_by_its_own_draw() -> None:
    x = images(1).repeat(16, 1, 1, 1).requires_grad_()
    y = ada(1.0)(x)
    assert y.isfinite().all() and y.shape == x.shape
    apart = torch.cdist(y.flatten(1), y.flatten(1)) + 1e3 * torch.eye(16)
    assert apart.min() > 0.5
    y.sum().backward()
    assert x.grad.flatten(1).any(1).all()
    grey = ada(1.0)(images(4, channels=1))
    assert grey.shape == (4, 1, 16, 16)


def test_nothing_is_rounded_under_bf16() -> None:
    x = images(8)
    torch.manual_seed(1)
    expected = ada(1.0)(x)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ada(1.0)(x), expected)


def test_half_of_the_images_are_flipped_at_p_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all other draws at rest: flips alone are left of the geometry."""
    augment, x = ada(1.0), images(400)
    monkeypatch.setattr(torch, "randn", lambda *shape, device: torch.zeros(*shape))
    monkeypatch.setattr(torch, "rand", lambda *shape, device: torch.full(shape, 0.5))
    kept = torch.randint
    monkeypatch.setattr(torch, "randint", lambda low, high, *rest, device: (
        kept(low, high, *rest) if high == 2 else torch.zeros(*rest, dtype=torch.long)))  # fmt: skip
    y = augment._moved(x)
    same = torch.isclose(y, x, atol=1e-4).flatten(1).all(1)
    flipped = torch.isclose(y, x.flip(3), atol=1e-4).flatten(1).all(1)
    assert (same ^ flipped).all() and 0.4 < flipped.float().mean() < 0.6


def test_geometry_by_hand() -> None:
    point = torch.tensor([1.0, 0.0, 1.0])
    turned = rotation(torch.tensor([math.pi / 2]))[0] @ point
    torch.testing.assert_close(turned, torch.tensor([0.0, 1.0, 1.0]), atol=1e-6, rtol=0)
    assert (scaling(torch.tensor([2.0]), torch.tensor([3.0]))[0] @ torch.ones(3)).tolist() == [2, 3, 1]
    assert (shift(torch.tensor([0.5]), torch.tensor([-1.0]))[0] @ torch.ones(3)).tolist() == [1.5, 0, 1]


def test_a_third_of_a_turn_of_hue_takes_red_to_green() -> None:
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)
    green = hue_turned(red, torch.tensor([2 * math.pi / 3])).flatten()
    torch.testing.assert_close(green, torch.tensor([0.0, 1.0, 0.0]), atol=1e-6, rtol=0)
    grey = torch.full((1, 3, 2, 2), 0.3)
    torch.testing.assert_close(hue_turned(grey, torch.tensor([1.0])), grey)
