"""Copies of training images are found, other images are not taken for copies."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from atelier.images.pixels import to_uint8
from atelier.metrics.memorisation import nearer, nearest, thumbnails
from atelier.shapes.world import render, scenes


def drawn(first: int, n: int, split: str = "train") -> Tensor:
    """Scenes as uint8, 16 px."""
    return to_uint8(render(scenes(0, range(first, first + n), split), 16))


def found(samples: Tensor) -> tuple[float, float]:
    training, heldout = thumbnails(drawn(0, 400)), thumbnails(drawn(0, 200, "test"))
    return nearer(nearest(thumbnails(samples), training), nearest(heldout, training))


def test_copies_are_found() -> None:
    """Also those that are a few grey levels off, and where every other sample is a copy: 1/2 + 1/2 of 1/2."""
    assert found(drawn(100, 200)) == (1.0, 0.0)
    noise = torch.randint(-6, 7, (200, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    value, half = found((drawn(100, 200).int() + noise).clamp(0, 255).to(torch.uint8))
    assert value > 0.97 and half < 0.03
    value, half = found(torch.cat([drawn(100, 100), drawn(5000, 100, "test")]))
    assert value - half < 0.75 < value + half


def test_other_scenes_are_no_copies() -> None:
    """Of the test split, which has combinations that training has not."""
    value, half = found(drawn(5000, 200, "test"))
    assert 0.03 < half < 0.07 and value - half < 0.5 < value + half


def test_the_interval_holds_what_it_should() -> None:
    """Of 400 pairs of sets, one of them shifted, about 95 % of the intervals hold P(a < b), as DeLong's should."""
    shift, n, held = 0.5, 60, 0
    true = 0.5 * (1 + math.erf(shift / 2))
    rng = torch.Generator().manual_seed(0)
    for _ in range(400):
        value, half = nearer(torch.randn(n, generator=rng) - shift, torch.randn(2 * n, generator=rng))
        held += abs(value - true) <= half
    assert 0.92 < held / 400 < 0.98


def test_chance_by_hand() -> None:
    """Pairs of 1 and 2 with 1, 2 and 3: 0.5 + 1 + 1 and 0 + 0.5 + 1, of 6."""
    value, _ = nearer(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0, 3.0]))
    assert value == pytest.approx(4 / 6)


def test_nearest_in_pieces() -> None:
    rng = torch.Generator().manual_seed(0)
    points, others = torch.randn(7, 5, generator=rng), torch.randn(11, 5, generator=rng)
    expected = (points[:, None] - others[None]).square().sum(-1).sqrt().amin(1)
    torch.testing.assert_close(nearest(points, others, chunk=3).float(), expected)
    assert (nearest(others[:4], others) < 1e-6).all()


def test_a_thumbnail_is_the_mean_colour_of_each_field() -> None:
    images = torch.zeros(1, 1, 16, 16, dtype=torch.uint8)
    images[..., :2, :2] = torch.tensor([[0, 255], [255, 255]])
    small = thumbnails(images)
    assert small.shape == (1, 64) and small[0, 0].item() == 0.75 and small[0, 1:].sum() == 0
