"""Nets of GANs: counts as published, what a condition does, filters against direct sums."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atelier.nets.cgan import CGANDiscriminator, CGANGenerator
from atelier.nets.dcgan import DCDiscriminator, DCGenerator
from atelier.nets.gan import MLPDiscriminator, MLPGenerator
from atelier.nets.layers import ConditionalBatchNorm
from atelier.nets.r3gan import Bottleneck, R3Discriminator, R3Generator
from atelier.nets.resample import DownFiltered, UpFiltered


def size(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_dcgan_64_has_the_published_counts() -> None:
    """ngf = ndf = 64, no biases, as in its code."""
    generator = DCGenerator(image_size=64, image_channels=3, noise_dim=100, width=64, channel_max=512)
    discriminator = DCDiscriminator(image_size=64, image_channels=3, width=64, channel_max=512, norm="batch")
    assert (size(generator), size(discriminator)) == (3_576_704, 2_765_568)
    assert generator(torch.randn(2, 100), torch.zeros(2, 0)).shape == (2, 3, 64, 64)
    assert discriminator(torch.randn(2, 3, 64, 64), torch.zeros(2, 0))[0].shape == (2,)


def test_dcgan_starts_as_published() -> None:
    net = DCGenerator(image_size=64, image_channels=3, noise_dim=100, width=64, channel_max=512)
    for layer in net.modules():
        if isinstance(layer, nn.ConvTranspose2d):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05) and abs(layer.weight.mean()) < 1e-3
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.weight.mean().item() == pytest.approx(1, abs=0.01) and not layer.bias.any()


def test_a_mapped_z_scales_and_shifts_behind_each_batch_norm() -> None:
    """At first it changes nothing, as published; then maps are those of z alone, times 1 + scale, plus shift."""
    sizes = {"image_size": 8, "image_channels": 3, "noise_dim": 5, "width": 4, "channel_max": 8}
    net, z = DCGenerator(**sizes, mapping_dim=6), torch.randn(7, 5)
    net(z, z)
    (norm,) = net.norms
    x = torch.randn(7, 4, 4, 4)
    torch.testing.assert_close(norm(x, net.mapping(z)), F.batch_norm(x, None, None, training=True))
    nn.init.normal_(norm.conditioning.weight)
    first, second = (net.mapping[k] for k in (0, 2))
    style = F.leaky_relu(z @ (first.weight / 5**0.5).T, 0.2)
    style = F.leaky_relu(style @ (second.weight / 6**0.5).T, 0.2)
    scale, shift = (style @ norm.conditioning.weight.T)[:, :, None, None].chunk(2, dim=1)
    normed = F.batch_norm(net.convs[0](z[:, :, None, None]), None, None, training=True)
    expected = net.last(F.relu(normed * (1 + scale) + shift)).tanh()
    torch.testing.assert_close(net(z, z), expected)


def test_a_discriminator_sees_how_much_a_group_differs() -> None:
    """With a group, an image alone and one beside a stranger differ in their logits; without, they do not."""
    x, near, far = torch.randn(1, 3, 8, 8), 1e-2 * torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8)
    for group in (0, 2):
        sizes = {
            "image_size": 8,
            "image_channels": 3,
            "width": 4,
            "channel_max": 8,
            "norm": "none",
            "mbstd_group_size": group,
        }
        net = DCDiscriminator(**sizes)
        for p in net.parameters():
            nn.init.normal_(p, 0, 0.3)
        logits = [net(torch.cat([x, x + other]), x)[0][0].item() for other in (near, far)]
        assert (abs(logits[0] - logits[1]) > 1e-3) == (group > 0)


def test_a_transposed_convolution_is_zeros_between_then_correlation() -> None:
    """(1, 2, 3) through the kernel (1, 10, 100), stride 2, padding 1: zeros between and 1 = 3 - 1 - 1 beyond the ends,

    0 1 0 2 0 3 0, then correlation with the kernel backwards: 10, 102, 20, 203, 30; of size (3 - 1) 2 - 2 + 3 = 5.
    """
    x, kernel = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[[1.0, 10.0, 100.0]]])
    found = F.conv_transpose1d(x, kernel, stride=2, padding=1)
    assert found.tolist() == [[[10, 102, 20, 203, 30]]]
    spread = torch.tensor([[[0.0, 1, 0, 2, 0, 3, 0]]])
    assert torch.equal(found, F.conv1d(spread, kernel.flip(2)))
    for n, k, stride, padding in ((4, 4, 2, 1), (1, 4, 1, 0), (5, 3, 2, 0)):
        layer = nn.ConvTranspose1d(1, 1, k, stride, padding)
        assert layer(torch.zeros(1, 1, n)).shape[2] == (n - 1) * stride - 2 * padding + k


def test_spectral_norm_divides_by_the_largest_singular_value() -> None:
    net = DCDiscriminator(image_size=16, image_channels=3, width=8, channel_max=64, norm="spectral").train()
    for _ in range(200):  # of power iteration
        net(torch.randn(2, 3, 16, 16), torch.zeros(2, 0))
    net.eval()
    for layer in net.layers:
        if isinstance(layer, nn.Conv2d):
            assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-3)


def test_maxout_takes_the_largest_of_its_pieces() -> None:
    net = MLPDiscriminator(image_size=4, image_channels=1, width=3, pieces=5, dropout=0.5).eval()
    x = torch.randn(2, 1, 4, 4)
    linear = net.hidden[0][1]
    pieces = F.linear(x.flatten(1), linear.weight, linear.bias).reshape(2, 3, 5)
    h = net.hidden[1][1](torch.stack([pieces[:, :, k] for k in range(5)]).max(0).values).reshape(2, 3, 5).amax(2)
    torch.testing.assert_close(net(x, torch.zeros(2, 0))[0], net.score[1](h)[:, 0])
    ours = MLPGenerator(image_size=4, image_channels=3, noise_dim=5, width=8)
    assert ours(torch.randn(2, 5), x).shape == (2, 3, 4, 4)


def generator(conditioning: str) -> CGANGenerator:
    return CGANGenerator(image_size=16, image_channels=3, width=4, noise_dim=5, cond_dim=6, conditioning=conditioning)


def discriminator(conditioning: str, norm: str = "none") -> CGANDiscriminator:
    sizes = {"image_size": 16, "image_channels": 3, "width": 4, "cond_dim": 6, "n_classes": 7}
    return CGANDiscriminator(**sizes, conditioning=conditioning, norm=norm)


@pytest.mark.parametrize("conditioning", ["concatenation", "norm"])
def test_a_generator_hears_its_condition(conditioning: str) -> None:
    net, z, cond = generator(conditioning).eval(), torch.randn(3, 5), torch.randn(3, 6)
    for layer in net.modules():
        if isinstance(layer, ConditionalBatchNorm) and layer.conditioning is not None:
            nn.init.normal_(layer.conditioning.weight)
    assert net(z, cond).shape == (3, 3, 16, 16) and net(z, cond).abs().max() <= 1
    assert not torch.allclose(net(z, cond), net(z, cond.roll(1, 0)), atol=1e-3)
    torch.testing.assert_close(net(z, cond)[1:2], net(z[1:2], cond[1:2]))


def test_conditional_batch_norm_by_hand() -> None:
    layer, x, cond = ConditionalBatchNorm(4, 6), torch.randn(5, 4, 3, 3), torch.randn(5, 6)
    torch.testing.assert_close(layer(x, cond), nn.BatchNorm2d(4)(x))  # starts without the condition
    nn.init.normal_(layer.conditioning.weight)
    nn.init.normal_(layer.conditioning.bias)
    conditioning = cond @ layer.conditioning.weight.T + layer.conditioning.bias
    expected = nn.BatchNorm2d(4)(x) * (1 + conditioning[:, :4, None, None]) + conditioning[:, 4:, None, None]
    torch.testing.assert_close(layer(x, cond), expected)


@pytest.mark.parametrize("norm", ["none", "spectral"])
@pytest.mark.parametrize("conditioning", ["concatenation", "projection", "classifier"])
def test_what_a_discriminator_does_with_its_condition(conditioning: str, norm: str) -> None:
    net, x, cond = discriminator(conditioning, norm).eval(), torch.randn(3, 3, 16, 16), torch.randn(3, 6)
    logits, classes = net(x, cond)
    assert logits.shape == (3,) and (classes is None) == (conditioning != "classifier")
    heard = not torch.allclose(logits, net(x, cond.roll(1, 0))[0], atol=1e-6)
    assert heard == (conditioning != "classifier")
    if classes is not None:
        assert classes.shape == (3, 7)


# R3GAN


def r3(cond_dim: int) -> tuple[R3Generator, R3Discriminator]:
    sizes = {"image_size": 16, "image_channels": 3, "cond_dim": cond_dim, "width": 8, "channel_max": 16, "n_blocks": 1}
    return R3Generator(**sizes, noise_dim=5, group_width=4), R3Discriminator(**sizes, group_width=4)


@pytest.mark.parametrize("cond_dim", [0, 6])
def test_r3gan_maps_noise_to_images_and_images_to_logits(cond_dim: int) -> None:
    ours, theirs = r3(cond_dim)
    z, cond = torch.randn(3, 5), torch.randn(3, cond_dim)
    x = ours(z, cond)
    assert x.shape == (3, 3, 16, 16) and theirs(x, cond)[0].shape == (3,)
    if cond_dim:
        assert not torch.allclose(x, ours(z, cond.roll(1, 0)), atol=1e-4)
        assert not torch.allclose(theirs(x, cond)[0], theirs(x, cond.roll(1, 0))[0], atol=1e-4)


def test_a_bottleneck_starts_as_the_identity_with_small_weights() -> None:
    block, x = Bottleneck(32, 16, n_blocks=16), torch.randn(2, 32, 8, 8)
    assert torch.equal(block(x), x)
    gain = math.sqrt(2 / 1.04) * 16**-0.25
    assert block.widen.weight.std().item() == pytest.approx(gain / math.sqrt(32), rel=0.05)
    assert block.conv.weight.std().item() == pytest.approx(gain / math.sqrt(16 * 9), rel=0.05)
    assert block.conv.groups == 4


# Resampling


def direct(x: Tensor, taps: list[int], up: int, down: int, pad: tuple[int, int]) -> Tensor:
    """Every output as its own sum, in float64."""
    height = x.shape[2] * up
    spread = torch.zeros(*x.shape[:2], height, height, dtype=torch.float64)
    spread[:, :, ::up, ::up] = x.double()
    padded = F.pad(spread, (*pad, *pad))
    k = torch.tensor(taps, dtype=torch.float64)
    k = k.outer(k) / k.sum() ** 2 * up**2
    n = (padded.shape[2] - len(taps)) // down + 1
    out = torch.empty(*x.shape[:2], n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            patch = padded[:, :, i * down : i * down + len(taps), j * down : j * down + len(taps)]
            out[:, :, i, j] = (patch * k).sum((2, 3))
    return out


@pytest.mark.parametrize(("taps", "up", "down"), [([1, 2, 1], (2, 0), (1, 0)), ([1, 3, 3, 1], (2, 1), (1, 1))])
def test_filters_are_direct_sums(taps: list[int], up: tuple[int, int], down: tuple[int, int]) -> None:
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(UpFiltered(taps)(x).double(), direct(x, taps, 2, 1, up), atol=1e-6, rtol=0)
    torch.testing.assert_close(DownFiltered(taps)(x).double(), direct(x, taps, 1, 2, down), atol=1e-6, rtol=0)
    flat = torch.full((1, 1, 8, 8), 3.0)
    assert torch.allclose(UpFiltered(taps)(flat)[:, :, 2:-2, 2:-2], torch.tensor(3.0))
    assert torch.allclose(DownFiltered(taps)(flat)[:, :, 1:-1, 1:-1], torch.tensor(3.0))
    assert not UpFiltered(taps).state_dict()
