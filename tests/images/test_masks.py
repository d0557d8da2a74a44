"""Masks: distances against closed forms, LaMa's against their bounds, the same from the same generator."""

from __future__ import annotations

import torch

from atelier.core.rng import generator
from atelier.images import masks
from atelier.images.masks import lama_mask, squared_distances


def drawn(n: int, size: int) -> torch.Tensor:
    return torch.stack([lama_mask(size, generator(0, k)) for k in range(n)])


def test_distances_to_an_edge_a_point_and_a_slope():
    axis = (torch.arange(8) + 0.5) / 4 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    starts = torch.tensor([[-9.0, -0.875], [0.125, 0.625], [-9.0, -9.0], [0.125, -0.125]])
    ends = torch.tensor([[9.0, -0.875], [0.125, 0.625], [9.0, 9.0], [0.125, 9.0]])
    edge, point, slope, half = squared_distances(starts, ends, 8)
    torch.testing.assert_close(edge, (y + 0.875) ** 2)
    torch.testing.assert_close(point, (x - 0.125) ** 2 + (y - 0.625) ** 2)
    torch.testing.assert_close(slope, (x - y) ** 2 / 2, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(half, (x - 0.125) ** 2 + (y + 0.125).clamp(max=0) ** 2)


def test_lama_masks_hide_something_and_at_most_half():
    for size in (16, 64):
        masked = drawn(300, size)
        area = masked.mean((1, 2, 3))
        assert masked.shape == (300, 1, size, size) and set(masked.unique().tolist()) == {0.0, 1.0}
        assert 0 < area.min() and area.max() <= 0.5
        assert abs(area.mean() - 0.27) < 0.03 and area.std() > 0.1  # 0.27 of 1,000 drawn at each of 32 to 256 px


def test_half_of_the_lama_masks_are_boxes_with_a_free_border():
    """Boxes leave 10 of 256 pixels free on every side, and four of them have at most nine different rows."""
    masked = drawn(300, 128)[:, 0] > 0
    border = masked.clone()
    border[:, 5:-5, 5:-5] = False
    boxes = torch.tensor([row.unique(dim=0).shape[0] <= 10 for row in masked]) & ~border.flatten(1).any(1)
    assert 0.42 < boxes.float().mean() < 0.58  # sd 0.029
    sides = [int(mask.any(axis).sum()) for mask in masked[boxes] for axis in (0, 1)]
    assert 14 <= min(sides)  # 30 of 256 pixels


def test_lama_masks_belong_to_their_generator_and_scale_with_the_image():
    assert torch.equal(lama_mask(32, generator(3)), lama_mask(32, generator(3)))
    assert not torch.equal(lama_mask(32, generator(3)), lama_mask(32, generator(4)))
    small, large = drawn(60, 32), torch.nn.functional.avg_pool2d(drawn(60, 128), 4)
    same = (small - large).abs().mean((1, 2, 3)) < 0.05
    assert same.float().mean() > 0.9  # a mask of about half the image may be drawn anew at one size alone


def test_one_stroke_of_one_segment_is_as_long_and_wide_as_drawn(monkeypatch):
    """A brush of width w led over a length l inside the image covers l w + pi w^2 / 4."""
    for name, value in (("STROKES", 1), ("SEGMENTS", 1), ("LENGTHS", (100.0, 100.0)), ("WIDTHS", (40.0, 40.0))):
        monkeypatch.setattr(masks, name, value)
    areas = torch.stack([masks._strokes(256, generator(k)).sum() for k in range(60)])
    whole = 100 * 40 + 3.14159 * 40**2 / 4
    inside = (areas - whole).abs() < 0.02 * whole
    assert inside.float().mean() > 0.15 and areas.max() < 1.02 * whole
