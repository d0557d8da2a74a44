"""Tokens in a U-Net and in a transformer: what is not there has no influence, where they start, how they are seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atelier.core.condition import Condition
from atelier.nets import layers
from atelier.nets.attention_maps import AttentionMap, attention_maps
from atelier.nets.denoising import DenoisingNet
from atelier.nets.dit import DiT
from atelier.nets.layers import CrossAttention, attended
from atelier.nets.unet import UNet

E = 5


def unet(**changes: Any) -> UNet:
    options = {"width": 8, "multipliers": [1, 2], "n_blocks": 1, "attention": [8, 4], "heads": 2, "token_dim": E}
    return UNet(**{"image_size": 8, "image_channels": 3, **options, **changes})


def dit(**changes: Any) -> DiT:
    options = {"patch_size": 2, "width": 16, "n_layers": 2, "heads": 2, "token_dim": E}
    return DiT(**{"image_size": 8, "image_channels": 3, **options, **changes})


NETS = pytest.mark.parametrize("make", [unet, dit, lambda **changes: dit(qk_norm=True, **changes)])
Made = Callable[..., UNet | DiT]


def awake(net: UNet | DiT) -> UNet | DiT:
    """Weights that were zero at the start become random, as after training."""
    torch.manual_seed(1)
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return net


def inputs(n: int = 3) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(n, 3, 8, 8), torch.tensor([0.0, 500.0, 999.0])[:n]


def told(*lengths: int) -> Condition:
    """Texts of so many tokens, of 4 places each."""
    torch.manual_seed(2)
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    return Condition(tokens=torch.randn(len(lengths), 4, E), mask=mask)


def test_a_mask_leaves_keys_out() -> None:
    """As if they were not there, to the last bits of float64, and zeros without a number that is none where all are."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 6, 6))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]]).bool()
    h = attended(q, k, v, mask=mask)
    torch.testing.assert_close(h[0], (q[0] @ k[0].mT / 2).softmax(2) @ v[0])
    seen = mask[1]
    torch.testing.assert_close(h[1], (q[1] @ k[1][:, seen].mT / 2).softmax(2) @ v[1][:, seen])
    assert not h[2].any()
    h.square().sum().backward()
    for x in (q, k, v):
        assert x.grad.isfinite().all() and x.grad[:2].any() and not x.grad[2].any()
    assert not k.grad[1][:, ~seen].any() and not v.grad[1][:, ~seen].any()


def test_on_a_cpu_it_is_float32_with_a_mask_too() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 4) for n in (5, 6, 6))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0]]).bool()
    low = [x.bfloat16() for x in (q, k, v)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = attended(*low, mask=mask)
    assert h.dtype == torch.float32
    torch.testing.assert_close(h, attended(*(x.float() for x in low), mask=mask), rtol=0, atol=0)


@NETS
def test_it_says_what_it_takes(make: Made) -> None:
    net = make(cond_dim=7, plane_channels=2)
    assert isinstance(net, DenoisingNet) and net.cond_sizes == {"vector": 7, "tokens": E, "planes": 2}
    assert make(token_dim=None).cond_sizes == {}


@NETS
def test_masked_tokens_have_no_influence(make: Made) -> None:
    """To the bit, and those that are there have one."""
    net, (x, time), cond = awake(make()), inputs(), told(4, 2, 1)
    plain = net(x, time, cond)
    noise = torch.randn_like(cond.tokens)
    hidden = Condition(tokens=torch.where(cond.mask[..., None], cond.tokens, 100 * noise), mask=cond.mask)
    assert torch.equal(net(x, time, hidden), plain)
    seen = Condition(tokens=cond.tokens + noise, mask=cond.mask)
    assert (net(x, time, seen) - plain).abs().amax((1, 2, 3)).min() > 1e-3


@NETS
def test_a_padded_text_is_the_text(make: Made) -> None:
    net, (x, time), cond = awake(make()), inputs(), told(3, 3, 3)
    short = Condition(tokens=cond.tokens[:, :3])
    torch.testing.assert_close(net(x, time, cond), net(x, time, short), rtol=0, atol=1e-5)


@NETS
def test_an_image_without_a_token_looks_at_none(make: Made) -> None:
    """`Condition.null`: what it would give if its tokens' values were 0, and others of the batch are as without it."""
    net, (x, time), cond = awake(make()), inputs(), told(4, 0, 2)
    together = net(x, time, cond)
    torch.testing.assert_close(together[::2], net(x[::2], time[::2], cond.rows([0, 2])), atol=1e-5, rtol=1e-5)
    for layer in net.modules():
        if isinstance(layer, CrossAttention):
            nn.init.zeros_(layer.kv.weight)
            if layer.kv.bias is not None:
                nn.init.zeros_(layer.kv.bias)
    torch.testing.assert_close(together[1], net(x, time, told(4, 4, 4))[1], atol=1e-5, rtol=1e-5)
    net(x, time, cond.null()).sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


@NETS
def test_every_parameter_gets_a_gradient(make: Made) -> None:
    net, (x, time), cond = awake(make(plane_channels=2)), inputs(), told(4, 2, 1)
    net(
        x, time, Condition(tokens=cond.tokens, mask=cond.mask, planes=torch.randn(3, 2, 8, 8))
    ).square().sum().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_a_transformer_with_tokens_starts_as_the_one_without() -> None:
    """Whatever else its weights are: the last layer of each look at tokens is 0."""
    torch.manual_seed(0)
    net, plain = dit(), dit(token_dim=None)
    assert {n for n, m in net.named_modules() if isinstance(m, CrossAttention) and m.out.weight.any()} == set()
    for name, parameter in net.named_parameters():
        if ".cross." not in name:
            nn.init.normal_(parameter, std=0.2)
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if ".cross." not in k})
    x, time = inputs()
    assert torch.equal(net(x, time, told(4, 2, 0)), plain(x, time)) and plain(x, time).any()


@pytest.mark.parametrize("make", [unet, dit])
def test_learning_reaches_the_tokens_in_the_third_step(make: Made) -> None:
    """Through the net's last layer and that of the branch, which start at 0, one after the other, and no third."""
    torch.manual_seed(0)
    net, (x, time), cond = make(), inputs(), told(4, 2, 1)
    optimizer, first = torch.optim.SGD(net.parameters(), lr=0.1), {}
    layers_of = [(n, m) for n, m in net.named_modules() if isinstance(m, CrossAttention)]
    for step in (1, 2, 3):
        optimizer.zero_grad()
        (net(x, time, cond) - x).square().mean().backward()
        for name, layer in layers_of:
            if layer.kv.weight.grad.any():
                first.setdefault(name, step)
        optimizer.step()
    assert first == {name: 3 for name, _ in layers_of}


@pytest.mark.parametrize("make", [unet, dit])
def test_checkpointing_gives_the_same_gradients(make: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients, runs = [], []
    forward = CrossAttention.forward
    monkeypatch.setattr(CrossAttention, "forward", lambda self, *given: runs.append(1) or forward(self, *given))
    for checkpointing in (False, True):
        torch.manual_seed(0)
        net, (x, time) = awake(make(checkpointing=checkpointing, dropout=0.3)), inputs()
        net(x, time, told(4, 2, 1)).square().sum().backward()
        gradients.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    n = sum(isinstance(m, CrossAttention) for m in net.modules())
    assert len(runs) == n + 2 * n  # once and twice


def test_a_map_is_the_mean_of_the_softmax_of_each_head() -> None:
    torch.manual_seed(0)
    layer, x, cond = CrossAttention(8, E, heads=2, bias=False), torch.randn(3, 6, 8), told(4, 2, 0)
    with attention_maps(layer) as maps:
        layer(x, cond.tokens, cond.mask, 2)
    (found,) = maps
    assert (found.height, found.width, found.weights.dtype) == (2, 3, torch.float32)
    for image, n in ((0, 4), (1, 2)):
        q, k = x[image] @ layer.q.weight.T, cond.tokens[image, :n] @ layer.kv.weight[:8].T
        heads = [(q[:, h] @ k[:, h].T / math.sqrt(4)).exp() for h in (slice(0, 4), slice(4, 8))]
        expected = sum(h / h.sum(1, keepdim=True) for h in heads) / 2
        torch.testing.assert_close(found.weights[image, :, :n], expected)
        assert not found.weights[image, :, n:].any()
    assert not found.weights[2].any()


@pytest.mark.parametrize(("make", "sizes"), [(unet, [8, 4, 4, 4, 4, 8, 8]), (dit, [4, 4])])
def test_maps_are_recorded_in_the_order_of_calls(make: Made, sizes: list[int]) -> None:
    """Of each level on the way down, of the middle and on the way up; what the net gives stays the same to the bit."""
    net, (x, time), cond = awake(make()).eval(), inputs(), told(4, 2, 1)
    plain = net(x, time, cond)
    with attention_maps(net) as maps:
        output = net(x, time, cond)
    assert torch.equal(output, plain)
    assert [(m.height, m.width, tuple(m.weights.shape)) for m in maps] == [(n, n, (3, n * n, 4)) for n in sizes]
    for found in maps:
        assert not found.weights.requires_grad
        torch.testing.assert_close(found.weights.sum(2), torch.ones(3, found.height * found.width))
    assert len({round(float(m.weights[0, 0, 0].detach()), 6) for m in maps}) == len(sizes)  # each its own


def test_nothing_is_recorded_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a softmax computed beside torch's attention, and an error within ends it; within another, that goes on."""
    counted, net, (x, time), cond = [], dit(), inputs(), told(4, 2, 1)
    weights = layers.attention_weights
    monkeypatch.setattr(layers, "attention_weights", lambda *given: counted.append(1) or weights(*given))
    net(x, time, cond)
    outer: list[AttentionMap]
    with attention_maps(net) as outer:
        with pytest.raises(ZeroDivisionError), attention_maps(net) as inner:
            net(x, time, cond)
            raise ZeroDivisionError
        net(x, time, cond)
    net(x, time, cond)
    assert (len(inner), len(outer), len(counted)) == (2, 2, 4)
    with attention_maps(dit(token_dim=None)) as none:
        assert none == []
