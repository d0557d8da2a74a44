"""Weights that are never trained, in bf16: half the bytes, and gradients of adapters as good as bf16 is."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from atelier.callbacks.ema import average_of
from atelier.models.base import Model
from atelier.nets import lora
from atelier.nets.frozen import HALVED, Frozen, halved
from atelier.nets.unet import UNet
from tests.nets.lora_ranks import adapted, gradients

ROUNDING = 2**-8  # of bf16
WHOLE = slice(0, 4)


def size(net: nn.Module, trained: bool) -> int:
    """Bytes of the weights that take gradients, or of those that take none."""
    return sum(p.numel() * p.element_size() for p in net.parameters() if p.requires_grad == trained)


def joined(found: dict[str, Tensor]) -> Tensor:
    return torch.cat([found[name].flatten() for name in sorted(found)])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_adapters_are_those_of_float32_within_bf16(autocast: bool, checkpointing: bool) -> None:
    exact = joined(gradients(adapted(checkpointing), WHOLE))
    net = adapted(checkpointing)
    halved(net)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        found = gradients(net, WHOLE)
    assert all(value.dtype == torch.float32 for value in found.values())
    error = (joined(found) - exact).norm() / exact.norm()
    assert ROUNDING / 100 < error < 8 * ROUNDING  # not nothing, or nothing was halved


def test_half_the_bytes_of_what_is_frozen_and_all_of_what_is_trained() -> None:
    net, before = adapted(False), adapted(False)
    names = halved(net)
    layers = [layer for layer in before.modules() if isinstance(layer, HALVED) and not layer.weight.requires_grad]
    inside = sum(p.numel() * 4 for layer in layers for p in layer.parameters(recurse=False))
    assert len(names) == len(layers) and inside > 0.95 * size(before, False)
    assert size(net, False) == size(before, False) - inside // 2
    assert size(net, True) == size(before, True)
    assert halved(net) == []  # a second time finds nothing


def test_adapters_put_on_a_halved_net_are_the_same() -> None:
    """Before or behind: float32, and they add to what the layer gives."""
    first = adapted(False)
    halved(first)
    behind = adapted(False)
    state = {name: value for name, value in behind.state_dict().items() if ".lora." in name}
    lora.remove(behind)
    behind.requires_grad_(False)
    halved(behind)
    lora.add(behind, name="style", targets=["qkv.q", "kv", "out", "proj_in"], rank=2, alpha=3)
    lora.add(behind, name="style", targets=[r"down\..*\.conv\d?", "skip"], rank=3, alpha=1)
    behind.load_state_dict(state, strict=False)
    one, two = gradients(first, WHOLE), gradients(behind, WHOLE)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_state_comes_back_to_the_bit_and_averages_share_what_is_frozen() -> None:
    net = adapted(False)
    halved(net)
    again = adapted(False)
    halved(again)
    for weight in again.parameters():
        nn.init.zeros_(weight)
    again.load_state_dict(net.state_dict())
    states = net.state_dict(), again.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])

    class Owner(Model):
        ema_nets = ("net",)

    owner = Owner()
    owner.net = net
    average = average_of(owner)["net"]
    trained = {id(weight) for weight in owner.trained("net").values()}
    pairs = list(zip(net.parameters(), average.parameters(), strict=True))
    assert all((a is b) == (id(a) not in trained) for a, b in pairs)
    one, other = copy.deepcopy(net).eval(), average
    x = torch.ones(2, 4, 8, 8)
    assert torch.equal(*(run(each, x) for each in (one, other)))


def run(net: UNet, x: Tensor) -> Tensor:
    from atelier.core.condition import Condition

    return net(x, torch.arange(len(x)).float(), Condition(tokens=torch.ones(len(x), 5, 16)))


@pytest.mark.parametrize("layer", [nn.Linear(6, 10), nn.Conv2d(6, 10, 1, bias=False), nn.Embedding(6, 10)])
def test_a_halved_layer_gives_float32_of_rounded_weights(layer: nn.Module) -> None:
    layer.requires_grad_(False)
    x = (
        torch.arange(6)
        if isinstance(layer, nn.Embedding)
        else torch.randn(2, 6, *[3, 3] * isinstance(layer, nn.Conv2d))
    )
    wanted = layer(x)
    halved(layer)
    out = layer(x)
    assert out.dtype == torch.float32 and layer.weight.dtype == torch.bfloat16
    assert 0 < (out - wanted).abs().max() <= 4 * ROUNDING * wanted.abs().max()


def test_a_copy_shares_the_weights_of_a_frozen_net() -> None:
    """An average of an embedder has no text encoder of its own."""
    owner = nn.Sequential(Frozen(nn.Linear(2, 2)), nn.Linear(2, 2))
    copied = copy.deepcopy(owner)
    assert copied[0].net.weight is owner[0].net.weight and copied[1].weight is not owner[1].weight


def test_what_is_trained_is_left_alone() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3).requires_grad_(False))
    assert halved(net) == [] and all(p.dtype == torch.float32 for p in net.parameters())
