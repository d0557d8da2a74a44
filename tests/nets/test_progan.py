"""Counts as published, fades that begin and end at the sizes they lead from and to, AdaIN by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atelier.nets.progan import ProDiscriminator, ProGenerator, doubled, halved, seen_at
from atelier.nets.stylegan import AdaIN, StyleGenerator

SMALL = {"image_size": 16, "image_channels": 3, "cond_dim": 6, "channel_base": 64, "channel_max": 16}


def size(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_the_nets_for_1024_px_have_the_published_counts() -> None:
    full = {"image_size": 1024, "image_channels": 3, "cond_dim": 0, "channel_base": 16384, "channel_max": 512}
    with torch.device("meta"):
        assert size(ProGenerator(**full, noise_dim=512)) == 23_079_115
        assert size(ProDiscriminator(**full)) == 23_087_249
        assert (
            size(StyleGenerator(**full, noise_dim=512, style_dim=512, n_layers=8, mapping_lr_multiplier=0.01))
            == 26_219_627
        )


def pro() -> ProGenerator:
    torch.manual_seed(0)
    return ProGenerator(**SMALL, noise_dim=5)


def style() -> StyleGenerator:
    torch.manual_seed(0)
    net = StyleGenerator(**SMALL, noise_dim=5, style_dim=8, n_layers=2, mapping_lr_multiplier=0.01)
    for layer in net.synthesis.layers:
        nn.init.constant_(layer.strength, 0.3)
    return net


Z, COND = torch.randn(3, 5), torch.randn(3, 6)
NOISES = [torch.randn(3, 1, size, size) for size in (4, 4, 8, 8, 16, 16)]


def image(net: nn.Module, level: float) -> Tensor:
    if isinstance(net, ProGenerator):
        return net(Z, COND, level)
    return net.synthesis(net.mapping(Z, COND)[:, None].expand(-1, net.synthesis.n_styles, -1), NOISES, level)


@pytest.mark.parametrize("made", [pro, style])
def test_a_generator_fades_from_one_size_to_the_next(made: object) -> None:
    net = made()
    assert [image(net, level).shape[2] for level in (0.0, 0.5, 1.0, 1.01, 2.0)] == [4, 8, 8, 16, 16]
    for k in (0.0, 1.0):
        small, large = doubled(image(net, k)), image(net, k + 1)
        torch.testing.assert_close(image(net, k + 0.25), 0.75 * small + 0.25 * large)
        assert not torch.allclose(small, large, atol=1e-2)


def test_a_discriminator_fades_too() -> None:
    torch.manual_seed(0)
    net, x = ProDiscriminator(**SMALL), torch.randn(4, 3, 8, 8)
    cond = torch.randn(4, 6)
    torch.testing.assert_close(net(doubled(x), cond, 1 + 1e-6), net(x, cond, 1.0), atol=1e-4, rtol=1e-4)
    large = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(net(large, cond, 2 - 1e-6), net(large, cond, 2.0), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(net(large, cond, 1.5), net(large, cond, 2.0), atol=1e-3)
    assert not torch.allclose(net(large, cond, 2.0), net(large, cond.roll(1, 0), 2.0), atol=1e-4)


def test_real_images_are_seen_as_generated_ones_are() -> None:
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(seen_at(x, 2.0, 2), x)
    torch.testing.assert_close(seen_at(x, 0.0, 2), F.avg_pool2d(x, 4))
    eight = halved(x)
    torch.testing.assert_close(seen_at(x, 0.25, 2), 0.75 * doubled(halved(eight)) + 0.25 * eight)


def test_each_style_and_each_noise_of_a_level_counts() -> None:
    net = style()
    styles = net.mapping(Z, COND)[:, None].repeat(1, 6, 1)
    for layer in net.synthesis.layers:
        nn.init.normal_(layer.adain.style.weight)
    for level, used in ((0.0, 2), (1.0, 4), (2.0, 6)):
        before = net.synthesis(styles, NOISES, level)
        for k in range(6):
            other = styles.clone()
            other[:, k] += 1
            assert torch.allclose(net.synthesis(other, NOISES, level), before, atol=1e-5) == (k >= used)
            noises = [n + (i == k) * torch.randn_like(n) for i, n in enumerate(NOISES)]
            assert torch.allclose(net.synthesis(styles, noises, level), before, atol=1e-5) == (k >= used)


def test_adain_by_hand() -> None:
    layer, x, w = AdaIN(4, 6), 3 * torch.randn(2, 4, 8, 8) + 1, torch.randn(2, 6)
    told = F.linear(w, layer.style.weight * layer.style.scale)
    scale, shift = told[:, :4, None, None], told[:, 4:, None, None]
    mean, variance = x.mean((2, 3), keepdim=True), x.var((2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(layer(x, w), (x - mean) / (variance + 1e-5).sqrt() * (1 + scale) + shift)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x.bfloat16(), w).dtype == torch.float32
