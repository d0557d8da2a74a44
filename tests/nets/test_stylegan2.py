"""Counts as published, modulated convolutions image by image, and the layers whose weights learn at one speed."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atelier.nets.equalized import EqualizedConv, EqualizedLinear, MinibatchStd, active, pixel_norm
from atelier.nets.resample import DownFiltered
from atelier.nets.stylegan2 import HalvingConv, ModulatedConv, StyleGAN2Discriminator, StyleGAN2Generator


def size(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(("image_size", "ours", "theirs"), [
    (1024, 30_370_060, 29_012_513), (256, 30_034_338, 28_864_129),
])  # fmt: skip
def test_configuration_f_has_the_published_counts(image_size: int, ours: int, theirs: int) -> None:
    both = {"image_size": image_size, "image_channels": 3, "cond_dim": 0, "channel_base": 32768, "channel_max": 512}
    with torch.device("meta"):
        assert (
            size(StyleGAN2Generator(**both, noise_dim=512, style_dim=512, n_layers=8, mapping_lr_multiplier=0.01))
            == ours
        )
        assert size(StyleGAN2Discriminator(**both)) == theirs


def image_by_image(layer: ModulatedConv, x: Tensor, w: Tensor) -> Tensor:
    """Its own weights for each image, a filter's direct form where the size doubles; float64."""
    found = []
    for image, style in zip(x, layer.style(w), strict=True):
        weight = layer.weight.double() * layer.scale * style.double()[None, :, None, None]
        if layer.demodulate:
            weight = weight / (weight.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        image = image.double()[None]
        if layer.blur is None:
            found.append(F.conv2d(image, weight, padding=weight.shape[2] // 2))
            continue
        spread = torch.zeros(1, image.shape[1], 2 * image.shape[2] - 1, 2 * image.shape[3] - 1, dtype=torch.float64)
        spread[:, :, ::2, ::2] = image
        y = F.conv2d(F.pad(spread, (2, 2, 2, 2)), weight.flip(2, 3))
        line = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64)
        kernel = (4 * line.outer(line) / 64).expand(y.shape[1], 1, 4, 4)
        found.append(F.conv2d(F.pad(y, (1, 1, 1, 1)), kernel, groups=y.shape[1]))
    return torch.cat(found)


@pytest.mark.parametrize(("kernel", "up", "demodulate"), [(3, False, True), (3, True, True), (1, False, False)])
def test_modulation_is_that_of_each_image_alone(kernel: int, up: bool, demodulate: bool) -> None:
    torch.manual_seed(0)
    layer = ModulatedConv(5, 7, kernel, 6, up=up, demodulate=demodulate)
    x, w = torch.randn(3, 5, 8, 8), torch.randn(3, 6)
    torch.testing.assert_close(layer(x, w).double(), image_by_image(layer, x, w), atol=1e-4, rtol=1e-4)


def test_demodulated_output_has_unit_size() -> None:
    torch.manual_seed(0)
    layer = ModulatedConv(64, 64, 3, 16)
    y = layer(torch.randn(4, 64, 32, 32), 3 * torch.randn(4, 16))
    assert y[:, :, 1:-1, 1:-1].std((2, 3)).mean().item() == pytest.approx(1, abs=0.05)


def test_demodulation_is_float32_under_bf16() -> None:
    layer, seen = ModulatedConv(4, 4, 3, 6), []
    rsqrt = torch.Tensor.rsqrt
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype=torch.bfloat16):
        patch.setattr(torch.Tensor, "rsqrt", lambda x: seen.append(x.dtype) or rsqrt(x))
        assert layer(torch.randn(2, 4, 8, 8), torch.randn(2, 6)).dtype == torch.bfloat16
        pixel_norm(torch.randn(2, 4).bfloat16())
    assert seen == [torch.float32] * 2


def generator(**other: int) -> StyleGAN2Generator:
    sizes = {"image_size": 16, "image_channels": 3, "noise_dim": 5, "cond_dim": 6, "style_dim": 8, "n_layers": 2}
    return StyleGAN2Generator(
        **(sizes | {"channel_base": 64, "channel_max": 16, "mapping_lr_multiplier": 0.01} | other)
    )


def noises(net: StyleGAN2Generator, n: int) -> list[Tensor]:
    return [torch.randn(n, 1, size, size) for size in net.synthesis.noise_sizes]


def test_a_generator_uses_each_style_each_noise_and_its_condition() -> None:
    net, z, cond = generator(), torch.randn(2, 5), torch.randn(2, 6)
    assert net.synthesis.n_styles == 6 and net.synthesis.noise_sizes == [4, 8, 8, 16, 16]
    noise, w = noises(net, 2), net.mapping(z, cond)
    for layer in net.synthesis.convs:
        nn.init.constant_(layer.strength, 0.5)
    styles = w[:, None].repeat(1, 6, 1)
    image = net.synthesis(styles, noise)
    torch.testing.assert_close(net(z, cond, noise), image)
    assert image.shape == (2, 3, 16, 16)
    for k in range(6):
        other = styles.clone()
        other[:, k] += 1
        assert not torch.allclose(net.synthesis(other, noise), image, atol=1e-4), k
    for k in range(5):
        other = [n + (i == k) * torch.randn_like(n) for i, n in enumerate(noise)]
        assert not torch.allclose(net.synthesis(styles, other), image, atol=1e-4), k
    assert not torch.allclose(net.mapping(z, cond.roll(1, 0)), w, atol=1e-4)
    assert torch.equal(net.mapping(7 * z, cond).isclose(w, atol=1e-4).all(), torch.tensor(True))  # on the sphere


@pytest.mark.parametrize("cond_dim", [0, 6])
def test_a_discriminator_hears_its_condition(cond_dim: int) -> None:
    net = StyleGAN2Discriminator(image_size=16, image_channels=3, cond_dim=cond_dim, channel_base=64, channel_max=16)
    x, cond = torch.randn(4, 3, 16, 16), torch.randn(4, cond_dim)
    assert net(x, cond).shape == (4,)
    assert cond_dim == 0 or not torch.allclose(net(x, cond), net(x, cond.roll(1, 0)), atol=1e-5)


def test_the_halving_convolution_filters_first() -> None:
    """Where the kernel is a point it is the filter at every second pixel."""
    layer = HalvingConv(2, 2)
    nn.init.zeros_(layer.weight)
    layer.weight.data[[0, 1], [0, 1], 1, 1] = 1 / layer.scale
    x = torch.randn(1, 2, 8, 8)
    torch.testing.assert_close(layer(x), DownFiltered([1, 3, 3, 1])(x))


# Layers whose weights learn at one speed


def test_equalised_layers_keep_the_size_of_what_goes_through() -> None:
    torch.manual_seed(0)
    x = torch.randn(4000, 300)
    assert EqualizedLinear(300, 200)(x).std().item() == pytest.approx(1, abs=0.05)
    assert EqualizedLinear(300, 200, lr_multiplier=0.01)(x).std().item() == pytest.approx(1, abs=0.05)
    maps = torch.randn(8, 64, 16, 16)
    assert EqualizedConv(64, 64, 3)(maps)[:, :, 1:-1, 1:-1].std().item() == pytest.approx(1, abs=0.05)
    assert active(x).square().mean().item() == pytest.approx((1 + 0.04) / 2 * 2, abs=0.05)


def test_a_slow_layer_moves_by_its_speed() -> None:
    """One step of Adam moves a raw weight by lr, the used one by lr times scale and speed."""
    for speed in (1.0, 0.01):
        layer = EqualizedLinear(4, 3, lr_multiplier=speed)
        before = layer.weight.detach() * layer.scale
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
        layer(torch.randn(5, 4)).sum().backward()
        optimizer.step()
        moved = (layer.weight.detach() * layer.scale - before).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, 0.1 * speed / 2), rtol=1e-3, atol=0)


def test_pixel_norm_gives_vectors_of_root_mean_square_1() -> None:
    x = pixel_norm(torch.randn(3, 8, 2, 2) * 5)
    torch.testing.assert_close(x.square().mean(1), torch.ones(3, 2, 2), rtol=1e-4, atol=0)


def test_minibatch_deviation_by_hand() -> None:
    """Groups of 2 out of 4: images 0 and 2, 1 and 3."""
    x = torch.randn(4, 3, 2, 2)
    y = MinibatchStd(2)(x)
    assert torch.equal(y[:, :3], x)
    for pair in ((0, 2), (1, 3)):
        expected = ((x[pair[0]] - x[pair[1]]).square() / 4 + 1e-8).sqrt().mean()
        for k in pair:
            torch.testing.assert_close(y[k, 3], expected.expand(2, 2))
    assert MinibatchStd(4)(x[:3]).shape == (3, 4, 2, 2)  # gcd(3, 4) = 1: no deviation
    assert MinibatchStd(4)(x[:3])[:, 3].max().item() == pytest.approx(math.sqrt(1e-8))
