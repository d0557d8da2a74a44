"""The published sizes, what a result sees of its source, the discriminator's layers, VGG19 beside torchvision's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from atelier.images.bicubic import enlarged
from atelier.nets.srgan import SRDiscriminator, SRResNet
from atelier.nets.vgg import VGG19, VGG54, vgg


def net(**changed: Any) -> SRResNet:
    torch.manual_seed(0)
    small = dict(image_channels=3, width=4, n_blocks=1, scale_factor=4, kernel=9, norm="none", residual=False)
    return SRResNet(**(small | changed))


def n_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_published_net_has_its_parameters() -> None:
    """Ledig et al. 2017, figure 4: a bias where no norm follows, a PReLU has a slope a channel."""
    first = 9 * 9 * 3 * 64 + 64 + 64
    block = 2 * (3 * 3 * 64 * 64 + 2 * 64) + 64
    after = 3 * 3 * 64 * 64 + 2 * 64
    stage = 3 * 3 * 64 * 256 + 256 + 64
    last = 9 * 9 * 64 * 3 + 3
    assert first + 16 * block + after + 2 * stage + last == 1_548_547
    assert n_parameters(net(width=64, n_blocks=16, norm="batch")) == 1_548_547


@pytest.mark.parametrize(("scale_factor", "stages"), {2: [2], 3: [3], 4: [2, 2]}.items())
def test_each_factor_has_its_stages(scale_factor: int, stages: list[int]) -> None:
    model = net(scale_factor=scale_factor, image_channels=1)
    assert [layer.upscale_factor for layer in model.up if isinstance(layer, nn.PixelShuffle)] == stages
    assert model(torch.zeros(2, 1, 5, 7)).shape == (2, 1, 5 * scale_factor, 7 * scale_factor)


def test_the_layers_by_hand() -> None:
    """As the figure draws it, from the weights of the net."""
    model, x = net(n_blocks=2, norm="batch").eval(), torch.randn(2, 3, 6, 6)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2)
    h = start = model.first[1](model.first[0](x))
    for block in model.body[:2]:
        conv1, norm1, prelu, conv2, norm2 = block.layers
        h = h + norm2(conv2(prelu(norm1(conv1(h)))))
    h = start + model.body[3](model.body[2](h))
    for k in (0, 3):
        wide = model.up[k](h)  # (B, 4 N, H, W): the pixels of a 2 x 2 square are neighbouring channels
        h = (
            wide.view(2, 4, 2, 2, *wide.shape[2:])
            .permute(0, 1, 4, 2, 5, 3)
            .reshape(2, 4, *(2 * n for n in h.shape[2:]))
        )
        h = torch.where(h > 0, h, h * model.up[k + 2].weight[:, None, None])
    torch.testing.assert_close(model(x), model.last(h))


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_norms_are_there_or_not(norm: str) -> None:
    kinds = [type(layer) for layer in net(n_blocks=3, norm=norm).modules()]
    assert kinds.count(nn.BatchNorm2d) == (7 if norm == "batch" else 0)


def test_a_residual_net_starts_as_the_bicubic() -> None:
    x = torch.rand(2, 3, 8, 8)
    model = net(residual=True)
    torch.testing.assert_close(model(x), enlarged(x, 4))
    nn.init.normal_(model.last.weight)
    made = model(x)
    model.residual = False
    torch.testing.assert_close(made - model(x), enlarged(x, 4), rtol=0, atol=1e-5)


def test_the_enlargement_is_float32_under_bf16() -> None:
    x, model, seen = torch.rand(2, 3, 8, 8), net(residual=True), []
    model.last.register_forward_hook(lambda layer, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = model(x)
    assert seen == [torch.bfloat16] and torch.equal(made, enlarged(x, 4))


@pytest.mark.parametrize(
    ("scale_factor", "n_blocks", "kernel"), [(2, 1, 9), (3, 1, 3), (3, 2, 9), (4, 1, 3), (4, 2, 9)]
)
def test_the_reach_is_exact(scale_factor: int, n_blocks: int, kernel: int) -> None:
    """By the gradient of the pixels of one place: it ends `reach` pixels away, for one of them no sooner."""
    model = net(scale_factor=scale_factor, n_blocks=n_blocks, kernel=kernel, residual=True).double()
    for p in model.parameters():
        nn.init.uniform_(p, 0.1, 1)  # nothing cancels
    n = 2 * model.receptive_radius + 5
    x = torch.rand(1, 3, n, n, dtype=torch.float64, requires_grad=True)
    middle, far = n // 2, []
    made = model(x)
    for dy in range(scale_factor):
        pixel = made[0, :, middle * scale_factor + dy, middle * scale_factor + dy].sum()
        (gradient,) = torch.autograd.grad(pixel, x, retain_graph=True)
        rows = gradient[0].abs().sum((0, 2)).nonzero()[:, 0]
        columns = gradient[0].abs().sum((0, 1)).nonzero()[:, 0]
        far += [(rows - middle).abs().max().item(), (columns - middle).abs().max().item()]
    assert max(far) == model.receptive_radius


def test_the_reach_of_the_published_net() -> None:
    """k9, 33 k3 at the size of the source: 37; k3 there, k3 at twice and k9 at four times its size: 3."""
    assert net(width=4, n_blocks=16).receptive_radius == 40


def test_the_published_discriminator() -> None:
    """k3n64s1 ... k3n512s2, norms behind all but the first, dense 1024 and 1; crops of 96 px."""
    model = SRDiscriminator(image_size=96, image_channels=3, width=64, dense=1024, norm="batch")
    told = [(c.out_channels, c.kernel_size[0], c.stride[0]) for c in model.modules() if isinstance(c, nn.Conv2d)]
    widths, strides = (64, 64, 128, 128, 256, 256, 512, 512), (1, 2) * 4
    assert told == [(n, 3, s) for n, s in zip(widths, strides, strict=True)]
    convolutions = 3 * 9 * 64 + 64 + sum(9 * a * b + 2 * b for a, b in zip(widths, widths[1:], strict=False))
    assert n_parameters(model) == convolutions + 512 * 6 * 6 * 1024 + 1024 + 1024 + 1
    assert [layer.negative_slope for layer in model.modules() if isinstance(layer, nn.LeakyReLU)] == [0.2] * 9


def test_without_norms_sizes_are_kept_and_a_logit_is_of_its_image_alone() -> None:
    torch.manual_seed(0)
    small = dict(image_size=64, image_channels=3, width=16, dense=4)
    model, x = SRDiscriminator(**small, norm="none"), torch.randn(8, 3, 64, 64)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())
    assert all(layer.bias is not None for layer in model.modules() if isinstance(layer, nn.Conv2d))
    assert 0.5 < model.layers(x).square().mean().sqrt() < 2
    torch.testing.assert_close(model(x)[:2], model(x[:2]), rtol=1e-4, atol=1e-5)
    with_norms = SRDiscriminator(**small, norm="batch")
    assert not torch.allclose(with_norms(x)[:2], with_norms(x[:2]), atol=1e-3)
    assert (model.per_sample, with_norms.per_sample) == (True, False)


@pytest.mark.parametrize("size", [8, 20, 64])
def test_logits_of_any_size_of_image_are_float32(size: int) -> None:
    model = SRDiscriminator(image_size=size, image_channels=1, width=2, dense=3, norm="batch")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(torch.rand(3, 1, size, size))
    assert logits.shape == (3,) and logits.dtype == torch.float32


@pytest.fixture(scope="module")
def theirs() -> nn.Sequential:
    """torchvision's convolutions with random weights of the size that keeps maps of unit size."""
    torch.manual_seed(0)
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["E"])
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.normal_(layer.bias, std=0.1)
    return layers


def named(layers: nn.Sequential) -> dict[str, Tensor]:
    return {f"features.{name}": value for name, value in layers.state_dict().items()}


def test_features_are_those_of_torchvision(theirs: nn.Sequential) -> None:
    """Of images normalised as torchvision's weights want it; conv5_4 is the last but a ReLU and a pool."""
    x = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    mean, deviation = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert isinstance(theirs[34], nn.Conv2d) and len(theirs) == 37
    with torch.no_grad():
        expected = theirs[:35]((x - mean) / deviation) / 12.75
        found = VGG54(named(theirs) | {"classifier.0.bias": torch.zeros(1)})(2 * x - 1)
    assert found.shape == (2, 512, 2, 3) and expected.min() < -0.1  # before the ReLU
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_grey_is_seen_as_equal_colours(theirs: nn.Sequential) -> None:
    model, x = VGG54(named(theirs)), 2 * torch.rand(1, 1, 16, 16) - 1
    torch.testing.assert_close(model(x), model(x.repeat(1, 3, 1, 1)))


def test_other_layers_are_refused(theirs: nn.Sequential) -> None:
    state = named(theirs)
    with pytest.raises(RuntimeError):
        VGG54({name: value for name, value in state.items() if name != "features.34.bias"})
    with pytest.raises(RuntimeError):
        VGG54(state | {"features.34.bias": torch.zeros(3)})
    assert set(vgg(VGG19)[:-1].state_dict()) == {name[9:] for name in state}
