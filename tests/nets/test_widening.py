"""Planes beside an image: a net with them starts as the one without, also with the weights of a finished one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atelier.core.condition import Condition
from atelier.core.errors import UserError
from atelier.nets.dit import DiT
from atelier.nets.unet import UNet
from atelier.nets.widening import PlanesConv2d, widened, with_planes

Made = Callable[..., UNet | DiT]


def unet(plane_channels: int, **changes: Any) -> UNet:
    options = {"image_size": 16, "image_channels": 3, "width": 8, "multipliers": [1, 2], "n_blocks": 1}
    torch.manual_seed(0)
    return UNet(**{**options, "attention": None, "plane_channels": plane_channels, **changes})


def folded(plane_channels: int) -> UNet:
    """Narrower than what it folds, so with a `PixelHead`."""
    net = unet(plane_channels, patch_size=4, learned_variance=True)
    assert net.pixels is not None
    return net


def dit(plane_channels: int, **changes: Any) -> DiT:
    options = {"image_size": 16, "image_channels": 3, "patch_size": 4, "width": 16, "n_layers": 1, "heads": 2}
    torch.manual_seed(0)
    return DiT(**options | {"plane_channels": plane_channels} | changes)


NETS = pytest.mark.parametrize("make", [unet, folded, dit])


def awake(net: UNet | DiT) -> UNet | DiT:
    """All but the first layer random where they are zero, as after training."""
    torch.manual_seed(1)
    for name, parameter in net.named_parameters():
        if not parameter.any() and not name.startswith(("stem", "patches")):
            nn.init.normal_(parameter, std=0.2)
    return net


def inputs(planes: int) -> tuple[Tensor, Tensor, Condition]:
    torch.manual_seed(2)
    x, time = torch.randn(2, 3, 16, 16), torch.tensor([3.0, 800.0])
    return x, time, Condition(planes=100 * torch.randn(2, planes, 16, 16))


@NETS
def test_a_net_with_planes_starts_as_the_one_without(make: Made) -> None:
    """To the bit with any planes, of the same random numbers; then it learns from them, and they change the output."""
    net, plain = awake(make(2)), awake(make(0))
    x, time, cond = inputs(2)
    output = net(x, time, cond)
    assert net.cond_sizes == {"planes": 2} and net.shape == (3, 16, 16)
    assert torch.equal(output, plain(x, time)) and output.any() and output.shape == plain(x, time).shape
    output.square().sum().backward()
    stem = net.stem if isinstance(net, UNet) else net.patches
    assert stem.weight.grad[:, stem.n_own :].flatten(2).any(2).all()
    with torch.no_grad():
        stem.weight -= 1e-3 * stem.weight.grad
    changed = Condition(planes=cond.planes + 1)
    assert (net(x, time, changed) - net(x, time, cond)).abs().amax((1, 2, 3)).min() > 1e-3


def test_both_sums_are_that_of_one_convolution() -> None:
    """Of the same weights over all channels, those of the image before those of the planes."""
    torch.manual_seed(0)
    conv = with_planes(nn.Conv2d(3, 8, 3, stride=2, padding=1), 4)
    assert isinstance(conv, PlanesConv2d) and not conv.weight[:, 3:].any() and conv.weight[:, :3].any()
    nn.init.normal_(conv.weight)
    x = torch.randn(2, 7, 9, 9)
    expected = nn.functional.conv2d(x, conv.weight, conv.bias, stride=2, padding=1)
    torch.testing.assert_close(conv(x), expected, rtol=0, atol=1e-5)
    plain = nn.Conv2d(3, 8, 3)
    assert with_planes(plain, 0) is plain


@NETS
@pytest.mark.parametrize("before", [0, 1])
def test_a_finished_net_goes_on_with_more_planes(make: Made, before: int) -> None:
    """With zeros and with any planes in the new channels: to the bit, or to rounding where there were some before."""
    finished, net = awake(make(before)), awake(make(3))
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    first = finished.stem if isinstance(finished, UNet) else finished.patches
    nn.init.normal_(first.weight, std=0.1)
    state = finished.state_dict()
    kept = {name: value.clone() for name, value in state.items()}
    net.load_state_dict(widened(state, net, "init"))
    x, time, cond = inputs(3)
    expected = finished(x, time, Condition(planes=cond.planes[:, :before]))
    for new in (torch.zeros_like(cond.planes), cond.planes):
        planes = torch.cat([cond.planes[:, :before], new[:, before:]], dim=1)
        output = net(x, time, Condition(planes=planes))
        if before == 0:
            assert torch.equal(output, expected)
        else:
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-3)
    assert all(torch.equal(kept[name], value) for name, value in state.items())
    assert output.any()


def test_a_first_layer_of_many_channels_starts_the_same_to_the_bit() -> None:
    """Where one convolution over all of them would not: its sums go in another order."""
    torch.manual_seed(0)
    x, plain = torch.randn(1, 128, 8, 8), nn.Conv2d(100, 64, 3, padding=1)
    assert torch.equal(with_planes(plain, 28)(x), plain(x[:, :100]))


def test_what_is_as_wide_stays() -> None:
    net = awake(unet(2))
    state = net.state_dict()
    made = widened(state, net, "init")
    assert made.keys() == state.keys() and all(made[name] is state[name] for name in state)
    plain = unet(0)
    assert widened(plain.state_dict(), plain, "init").keys() == plain.state_dict().keys()


@pytest.mark.parametrize(("finished", "line"), [
    (lambda: unet(0, width=16), "init=time.1.weight: they are 64x16, those of UNet are 32x8"),
    (lambda: unet(0, image_channels=1), "init=stem.weight: they are 8x1x3x3, those of UNet are 8x5x3x3"),
    (lambda: unet(3), "init=stem.weight: they are 8x6x3x3, those of UNet are 8x5x3x3"),
    (lambda: unet(0, token_dim=4), "init=down.2.attention.proj_in.weight: UNet has no such weights"),
    (lambda: unet(0, multipliers=[1, 4]), "init=down.2.residual.conv1.weight: they are 32x8x3x3, those of UNet are"),
    (lambda: dit(0), "init=patches.weight: UNet has no such weights"),
])  # fmt: skip
def test_weights_of_another_net_are_refused(finished: Callable[[], UNet | DiT], line: str) -> None:
    with pytest.raises(UserError) as caught:
        widened(finished().state_dict(), unet(2), "init")
    assert caught.value.line().startswith(f"error: {line}")
    assert caught.value.line().endswith(". Fix: weights of a net that differs in plane_channels alone")


def test_weights_that_are_missing_are_refused() -> None:
    state = unet(0).state_dict()
    del state["head.0.bias"]
    with pytest.raises(UserError, match=r"init=head.0.bias: UNet has such weights, and they are missing"):
        widened(state, unet(2), "init")
