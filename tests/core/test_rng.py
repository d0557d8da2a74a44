"""Noise of image k: the same numbers whether they are drawn at once, one by one, or for several steps."""

from __future__ import annotations

import pytest
import torch

from atelier.core import rng
from atelier.core.rng import ImageRngs, generator
from tests.counting import Counting


def one_by_one(n: int, *shape: int) -> list[torch.Tensor]:
    """Of each of five images by itself, as torch gives them."""
    generators = [generator(7, k) for k in range(3, 8)]
    return [torch.stack([torch.randn(shape, generator=g) for g in generators]) for _ in range(n)]


@pytest.mark.parametrize("shape", [(3, 8, 8), (4, 4, 4), (1, 28, 28), (3, 7, 5), (4,), (1, 3, 3), (16,), (17,)])
def test_noise_of_several_steps_is_that_of_each_to_the_bit(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes that torch would draw otherwise at once, too; and what is drawn after them."""
    monkeypatch.setattr(rng, "TOGETHER", 5 * 3 * torch.Size(shape).numel())  # three steps at once
    rngs, expected = ImageRngs(7, 3, 5), one_by_one(9, *shape)
    found = [rngs.randn(*shape), *rngs.randns(7, *shape), rngs.randn(*shape)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_torch_draws_some_shapes_otherwise_at_once() -> None:
    """Why those are drawn one by one."""
    at_once, g = torch.randn(2, 17, generator=generator(1)), generator(1)
    assert not torch.equal(at_once, torch.stack([torch.randn(17, generator=g) for _ in range(2)]))


def test_a_draw_is_one_call_for_an_image_and_a_block_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for most, blocks in ((rng.TOGETHER, 1), (6 * 256 * 20, 3)):
        monkeypatch.setattr(rng, "TOGETHER", most)
        with Counting() as counted:
            assert len(list(ImageRngs(0, 0, 6).randns(50, 4, 8, 8))) == 50
        assert counted.calls["normal_"] == 6 * blocks
