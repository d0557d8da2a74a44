"""The patch discriminator: what a logit sees, how many weights there are, how they start."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from atelier.core.errors import UserError
from atelier.nets.patch import PatchDiscriminator


def made(n_layers: int = 3, norm: str = "batch", size: int = 128, width: int = 4, channels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    options = {"image_size": size, "in_channels": channels, "width": width, "n_layers": n_layers, "norm": norm}
    return PatchDiscriminator(**options)


@pytest.mark.parametrize(("n_layers", "sees", "size"), [(1, 16, 32), (2, 34, 64), (3, 70, 128)])
def test_what_one_logit_sees(n_layers: int, sees: int, size: int) -> None:
    net, x = made(n_layers, size=size).eval(), torch.rand(1, 3, size, size, requires_grad=True)
    logits = net(x)
    assert logits.shape == (1, 1, size // 2**n_layers - 2, size // 2**n_layers - 2)
    middle = logits.shape[-1] // 2
    logits[0, 0, middle, middle].backward()
    for seen in (x.grad.abs().sum((0, 1, 2)).nonzero(), x.grad.abs().sum((0, 1, 3)).nonzero()):
        assert seen.max() - seen.min() + 1 == sees


@pytest.mark.parametrize(("norm", "channels", "weights"), [
    ("instance", 3, 2_764_737),  # as in CycleGAN: biases, no scales
    ("batch", 3, 2_765_633),     # 896 channels with scale and shift instead of a bias
    ("batch", 6, 2_768_705),     # as in pix2pix, on pairs
])  # fmt: skip
def test_number_of_weights_at_width_64(norm: str, channels: int, weights: int) -> None:
    with torch.device("meta"):
        net = made(norm=norm, width=64, channels=channels)
    assert sum(p.numel() for p in net.parameters()) == weights


def test_it_starts_as_published() -> None:
    """Convolutions from N(0, 0.02), scales from N(1, 0.02), no shift; the first and the last layer have no norm."""
    net = made(width=32)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1) and abs(layer.weight.mean()) < 3e-3
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.weight.mean().item() == pytest.approx(1, abs=0.01) and 0.01 < layer.weight.std() < 0.03
        if getattr(layer, "bias", None) is not None:
            assert not layer.bias.any()
    assert [type(layer).__name__ for layer in net.layers] == [
        "Conv2d", "LeakyReLU", *["Conv2d", "BatchNorm2d", "LeakyReLU"] * 3, "Conv2d"
    ]  # fmt: skip
    assert [layer.bias is None for layer in net.layers if isinstance(layer, nn.Conv2d)] == [
        False, True, True, True, False
    ]  # fmt: skip


def test_instances_are_judged_alone_and_batches_are_not() -> None:
    x = torch.rand(4, 3, 64, 64)
    for norm, alone in (("instance", True), ("batch", False)):
        net = made(2, norm, 64)
        assert torch.allclose(net(x)[1:2], net(x[1:2]), atol=1e-5) == alone


def test_logits_are_float32_under_bf16() -> None:
    net, seen = made(2, size=16), []
    net.layers[-1].register_forward_hook(lambda net, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net(torch.rand(2, 3, 16, 16)).dtype == torch.float32
    assert seen == [torch.bfloat16]


def test_the_smallest_images() -> None:
    for n_layers in (1, 2, 3):
        smallest = 3 * 2**n_layers
        assert made(n_layers, "instance", smallest)(torch.rand(1, 3, smallest, smallest)).shape == (1, 1, 1, 1)
    with pytest.raises(UserError) as caught:
        made(3, size=16)
    line = "error: .n_layers=3: 3 layers need 24 px, the images have 16. Fix: "
    assert caught.value.line() == line + ".n_layers=2"
