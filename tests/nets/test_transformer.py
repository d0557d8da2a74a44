"""What a place sees, the cache, and a block beside torch's own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from atelier.core.condition import Condition
from atelier.core.errors import UserError
from atelier.nets.transformer import CausalTransformer, TransformerBlock

V, N = 7, 6


def made(dropout: float = 0.0) -> CausalTransformer:
    """With weights that do something: a fresh net says nothing of any code."""
    torch.manual_seed(0)
    sizes = {"n_codes": V, "n_places": N, "width": 16, "n_layers": 3, "heads": 2, "cond_dim": 5}
    net = CausalTransformer(**sizes, dropout=dropout)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net.eval()


def codes(n: int = 4) -> Tensor:
    return torch.randint(V, (n, N), generator=torch.Generator().manual_seed(1))


COND = Condition(torch.randn(4, 5, generator=torch.Generator().manual_seed(2)))


def test_a_place_sees_the_codes_before_it_and_no_other() -> None:
    net, embedded = made(), []
    net.codes.register_forward_hook(lambda module, args, out: embedded.append(out))
    logits = net(codes(), COND)
    for place in range(N):
        grad = torch.autograd.grad(logits[:, place].square().sum(), embedded[0], retain_graph=True, allow_unused=True)[
            0
        ]
        seen = grad.abs().sum((0, 2)) > 0  # of the codes at places 0 .. N - 2
        assert seen.tolist() == [k < place for k in range(N - 1)]


def test_changing_a_code_changes_what_comes_after_it() -> None:
    net, before = made(), codes()
    for place in range(N):
        after = before.clone()
        after[:, place] = (after[:, place] + 1) % V
        changed = (net(before, COND) - net(after, COND)).abs().amax((0, 2)) > 1e-4
        assert changed.tolist() == [k > place for k in range(N)]


def test_steps_with_a_cache_equal_the_whole() -> None:
    net, given = made(), codes()
    whole, code, seen = net(given, COND), None, None
    for place in range(N):
        logits, seen = net.step(code, COND, seen)
        torch.testing.assert_close(logits, whole[:, place], atol=1e-5, rtol=0)
        code = given[:, place]
    assert seen[0][0].shape == (4, 2, N, 8) and len(seen) == 3


def test_every_place_hears_the_condition() -> None:
    net = made()
    grads = []
    for place in range(N):
        cond = COND.vector.clone().requires_grad_()
        net(codes(), Condition(cond))[:, place].square().sum().backward()
        grads.append(cond.grad.abs().amin().item())
    assert min(grads) > 0


def test_places_differ() -> None:
    """Equal codes and one condition: without positions later places would repeat each other."""
    net = made()
    for block in net.blocks:
        nn.init.zeros_(block.out.weight)  # no attention, which alone counts the codes before
    logits = net(torch.zeros(1, N, dtype=torch.long), COND.rows([0]))[0]
    assert all((logits[i] - logits[j]).abs().max() > 1e-3 for i in range(1, N) for j in range(i))


def test_a_block_is_torchs_where_no_condition_speaks() -> None:
    torch.manual_seed(0)
    block = TransformerBlock(16, 4, 0.0, 5)
    theirs = nn.TransformerEncoderLayer(16, 4, 64, 0.0, "gelu", batch_first=True, norm_first=True)
    for parameter in [*block.qkv.parameters(), *block.out.parameters(), *block.mlp.parameters()]:
        nn.init.normal_(parameter, std=0.2)
    pairs = {
        theirs.self_attn.in_proj_weight: block.qkv.weight,
        theirs.self_attn.in_proj_bias: block.qkv.bias,
        theirs.self_attn.out_proj.weight: block.out.weight,
        theirs.self_attn.out_proj.bias: block.out.bias,
        theirs.linear1.weight: block.mlp[0].weight,
        theirs.linear1.bias: block.mlp[0].bias,
        theirs.linear2.weight: block.mlp[2].weight,
        theirs.linear2.bias: block.mlp[2].bias,
    }
    with torch.no_grad():
        for theirs_, ours in pairs.items():
            theirs_.copy_(ours)
    x = torch.randn(3, N, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(N)
    expected = theirs(x, src_mask=mask, is_causal=True)
    torch.testing.assert_close(block(x, torch.randn(3, 5), None)[0], expected, atol=1e-5, rtol=1e-5)


def test_the_condition_scales_and_shifts_both_norms() -> None:
    """One place, which attends to itself alone: x + out(v), then the perceptron, by hand."""
    torch.manual_seed(0)
    block, x, told = TransformerBlock(8, 2, 0.0, 5), torch.randn(3, 1, 8), torch.randn(3, 5)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    scale1, shift1, scale2, shift2 = block.conditioning(told)[:, None].split(8, dim=2)
    v = block.qkv(nn.functional.layer_norm(x, (8,)) * (1 + scale1) + shift1)[:, :, 16:]
    h = x + block.out(v)
    expected = h + block.mlp(nn.functional.layer_norm(h, (8,)) * (1 + scale2) + shift2)
    torch.testing.assert_close(block(x, told, None)[0], expected, atol=1e-5, rtol=1e-5)


def test_it_starts_by_saying_that_all_codes_are_as_likely() -> None:
    net = CausalTransformer(n_codes=V, n_places=N, width=8, n_layers=1, heads=1, dropout=0.0, cond_dim=5)
    assert net(codes(), COND).abs().max() == 0
    nats = nn.functional.cross_entropy(net(codes(), COND).flatten(0, 1), codes().flatten())
    assert nats.item() == pytest.approx(math.log(V))


def test_dropout_acts_in_training_alone() -> None:
    net = made(dropout=0.5)
    assert torch.equal(net(codes(), COND), net(codes(), COND))
    net.train()
    assert not torch.equal(net(codes(), COND), net(codes(), COND))
    block, x = made(dropout=1.0).train().blocks[0], torch.randn(4, N, 16)
    assert torch.equal(block(x, COND.vector, None)[0], x)  # both branches end in it


def test_logits_are_float32_under_bf16() -> None:
    net, seen = made(), []
    net.head.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net(codes(), COND).dtype == torch.float32
    assert seen == [torch.bfloat16]  # autocast was on


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(UserError, match=r"\.heads=3: it does not divide the width 16"):
        CausalTransformer(n_codes=V, n_places=N, width=16, n_layers=1, heads=3, dropout=0.0, cond_dim=5)
