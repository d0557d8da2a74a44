"""Noise between that of two images."""

from __future__ import annotations

import pytest
import torch

from atelier.core.rng import ImageRngs
from atelier.requests.latents import Between


def test_noise_between_two_images_begins_and_ends_at_theirs_and_is_normal_throughout() -> None:
    part = torch.tensor([0.0, 0.3, 0.5, 1.0])
    start, end = ImageRngs.of(0, [4] * 4), ImageRngs.of(0, [5] * 4)
    noise = Between(start, end, part)
    drawn = noise.randn(10_000)
    ends = torch.stack([ImageRngs(0, k, 1).randn(10_000)[0] for k in (4, 5)])
    torch.testing.assert_close(drawn[[0, 3]], ends, atol=1e-6, rtol=0)
    torch.testing.assert_close(noise.again()[2:3].randn(10_000)[0], ends.sum(0) / 2**0.5)
    assert drawn.std(1).tolist() == pytest.approx([1.0] * 4, abs=0.03)
    assert len(noise) == 4 and len(noise[1:3]) == 2
