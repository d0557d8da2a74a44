"""The translator of CycleGAN: published counts, any size, what padding, norm and the residual way do."""

from __future__ import annotations

import pytest
import torch

from atelier.nets.resnet_translator import ResNetTranslator

PUBLISHED = dict(
    in_channels=3,
    image_channels=3,
    width=64,
    n_downs=2,
    patch_size=1,
    norm="instance",
    padding="reflect",
    residual=False,
)
SMALL = PUBLISHED | dict(width=4, n_downs=1, n_blocks=1)


def test_published_counts() -> None:
    """11.378 M for nine blocks; each block less has two 3x3 convolutions of 256 channels less."""
    sizes = {}
    with torch.device("meta"):
        for n in (6, 9):
            sizes[n] = sum(p.numel() for p in ResNetTranslator(**PUBLISHED, n_blocks=n).parameters())
    assert sizes[9] == 11_378_179 and sizes[9] - sizes[6] == 3 * 2 * (9 * 256 * 256 + 256)


@pytest.mark.parametrize(
    "other", [{}, {"patch_size": 2, "width": 12}, {"norm": "group"}, {"padding": "zeros"}, {"residual": True}]
)
def test_any_size_that_divides_keeps_its_size(other: dict) -> None:
    net = ResNetTranslator(**(SMALL | other))
    y = net(torch.randn(2, 3, 4 * net.size_divisor, 6 * net.size_divisor))
    assert y.shape == (2, 3, 4 * net.size_divisor, 6 * net.size_divisor) and y.dtype == torch.float32
    assert net.size_divisor == 2 * other.get("patch_size", 1) and y.abs().max() <= 1


def test_a_residual_net_starts_with_its_source() -> None:
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    torch.testing.assert_close(ResNetTranslator(**SMALL | {"residual": True})(x), torch.tanh(2 * x))


def test_reflection_has_no_border_where_the_image_has_none() -> None:
    """A constant image stays constant, which zeros at its edge would change."""
    torch.manual_seed(0)
    x = torch.full((1, 3, 16, 16), 0.3)
    net = ResNetTranslator(**SMALL | {"norm": "group", "n_downs": 1})
    first = net.layers[1](x)
    assert (first - first[:, :, :1, :1]).abs().max() < 1e-5
    other = ResNetTranslator(**SMALL | {"padding": "zeros"}).layers[1](x)
    assert (other - other[:, :, 8:9, 8:9]).abs().max() > 1e-4


def test_an_image_is_seen_alone() -> None:
    net, x = ResNetTranslator(**SMALL), torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(net(x)[1:2], net(x[1:2]))
