"""LPIPS beside torchmetrics' implementation, on the same random VGG16 and the published heads."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchmetrics.functional.image.lpips as theirs
import torchvision
from torch import Tensor, nn

from atelier.nets.lpips import TAPS, LPIPSNet, unit
from atelier.nets.vgg import VGG16, vgg

HEADS = Path(theirs.__file__).parent / "lpips_models" / "vgg.pth"  # LPIPS v0.1, which torchmetrics ships


@pytest.fixture(scope="module")
def features() -> nn.Sequential:
    """torchvision's convolutions with random weights of the size that keeps maps of unit size."""
    torch.manual_seed(0)
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.normal_(layer.bias, std=0.1)
    return layers


@pytest.fixture(scope="module")
def states(features: nn.Sequential) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    vgg = {f"features.{name}": value for name, value in features.state_dict().items()}
    return vgg | {"classifier.0.bias": torch.zeros(1)}, torch.load(HEADS, map_location="cpu", weights_only=True)


@pytest.fixture(scope="module")
def net(states: tuple[dict[str, Tensor], dict[str, Tensor]]) -> LPIPSNet:
    return LPIPSNet(*states)


def images(seed: int = 1, n: int = 2, size: int = 32) -> Tensor:
    return 2 * torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) - 1


def test_the_features_are_torchvisions(features: nn.Sequential) -> None:
    ours = vgg(VGG16)
    ours.load_state_dict(features.state_dict())
    x = images()
    torch.testing.assert_close(ours(x), features[:-1](x))  # all but the last pooling
    assert [type(ours[k]) for k in TAPS] == [nn.ReLU] * 5
    assert [ours[k - 1].out_channels for k in TAPS] == [64, 128, 256, 512, 512]


@pytest.mark.parametrize("size", [16, 32, 41])
def test_the_distance_is_torchmetrics(
    net: LPIPSNet, features: nn.Sequential, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(torchvision.models, "vgg16", lambda weights: SimpleNamespace(features=features))
    other = theirs._LPIPS(net="vgg", pretrained=False, pnet_rand=True, pnet_tune=True)
    other.load_state_dict(torch.load(HEADS, map_location="cpu", weights_only=True), strict=False)
    a, b = images(1, size=size), images(2, size=size)
    expected = other(a, b).flatten()
    torch.testing.assert_close(net(a, b), expected, rtol=1e-5, atol=1e-7)
    assert (expected > 1e-3).all() and expected[0] != expected[1]


def test_it_is_a_distance(net: LPIPSNet) -> None:
    a, b = images(1), images(2)
    assert net(a, a).tolist() == [0, 0]
    torch.testing.assert_close(net(a, b), net(b, a))
    assert (net(a, 0.9 * a + 0.1 * b) < net(a, b)).all()
    torch.testing.assert_close(net(a, b)[1:], net(a[1:], b[1:]))


def test_grey_is_repeated(net: LPIPSNet) -> None:
    a, b = images(1)[:, :1], images(2)[:, :1]
    torch.testing.assert_close(net(a, b), net(a.repeat(1, 3, 1, 1), b.repeat(1, 3, 1, 1)))


def test_gradients_are_finite_where_no_feature_answers(net: LPIPSNet) -> None:
    zero = torch.zeros(1, 3, 2, 2, requires_grad=True)
    unit(zero).sum().backward()
    assert torch.isfinite(zero.grad).all()
    y = torch.zeros(1, 3, 16, 16, requires_grad=True)
    net(torch.zeros(1, 3, 16, 16), y).sum().backward()
    assert torch.isfinite(y.grad).all()


def test_other_layers_are_refused(states: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    vgg, heads = states
    with pytest.raises(RuntimeError):
        LPIPSNet({name: v for name, v in vgg.items() if "28" not in name}, heads)
    with pytest.raises(RuntimeError):
        LPIPSNet(vgg, {name: v for name, v in heads.items() if "lin3" not in name})
