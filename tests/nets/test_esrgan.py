"""ESRGAN's net: the published size, the layers by hand, what a result sees of its source."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from atelier.nets.esrgan import RRDBNet


def net(**changed: Any) -> RRDBNet:
    torch.manual_seed(0)
    return RRDBNet(**(dict(image_channels=3, width=4, n_blocks=1, growth=2, scale_factor=4) | changed))


def test_the_published_net_has_its_parameters() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in net(width=64, n_blocks=23, growth=32).parameters()) == 16_697_987


def test_the_layers_by_hand() -> None:
    """As the figures draw them, from the weights of the net."""
    model, x = net(n_blocks=2), torch.randn(2, 3, 6, 6)
    h = start = model.first(x)
    for block in model.body:
        inside = h
        for dense in block.layers:
            seen = [inside]
            for conv in dense.convs[:-1]:
                seen.append(F.leaky_relu(conv(torch.cat(seen, 1)), 0.2))
            inside = inside + 0.2 * dense.convs[-1](torch.cat(seen, 1))
        h = h + 0.2 * inside
    h = start + model.middle(h)
    for conv in model.up:
        h = F.leaky_relu(conv(h.repeat_interleave(2, 2).repeat_interleave(2, 3)), 0.2)
    torch.testing.assert_close(model(x), model.last(F.leaky_relu(model.inner(h), 0.2)))


@pytest.mark.parametrize("scale_factor", [2, 3, 4])
def test_any_size_and_each_factor(scale_factor: int) -> None:
    made = net(scale_factor=scale_factor, image_channels=1)(torch.zeros(2, 1, 5, 7))
    assert made.shape == (2, 1, 5 * scale_factor, 7 * scale_factor) and made.dtype == torch.float32


@pytest.mark.parametrize("scale_factor", [2, 3, 4])
def test_reach_is_how_far_a_gradient_goes(scale_factor: int) -> None:
    """Of the pixels in the middle of the result, as far as any of them sees; weights are positive and linear."""
    model = net(scale_factor=scale_factor, image_channels=1, width=2, growth=1).double()
    for p in model.parameters():
        p.data = torch.full_like(p, 0.1) if p.ndim > 1 else torch.zeros_like(p)
    side = 2 * model.receptive_radius + 5
    x = torch.ones(1, 1, side, side, dtype=torch.double, requires_grad=True)
    half = side // 2 * scale_factor
    model(x)[..., half : half + scale_factor, half : half + scale_factor].sum().backward()
    seen = x.grad[0, 0].any(0).nonzero().flatten()
    assert (side // 2 - seen[0].item(), seen[-1].item() - side // 2) == (model.receptive_radius, model.receptive_radius)
