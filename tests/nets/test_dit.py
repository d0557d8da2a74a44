"""The diffusion transformer: published sizes, a block by hand, places, conditions, and what checkpointing keeps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from atelier.core.condition import Condition
from atelier.core.errors import UserError
from atelier.nets.denoising import DenoisingNet
from atelier.nets.dit import DiT, DiTBlock, sines_of_places
from atelier.nets.layers import attended
from tests.compose import composed

SMALL = {"image_size": 8, "image_channels": 3, "patch_size": 2, "width": 16, "n_layers": 2, "heads": 2, "cond_dim": 5}


def made(**changes: Any) -> DiT:
    """With weights that do something: a fresh net gives 0."""
    torch.manual_seed(0)
    net = DiT(**SMALL | changes)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net


def inputs(n: int = 3) -> tuple[Tensor, Tensor, Condition]:
    torch.manual_seed(1)
    return torch.randn(n, 3, 8, 8), torch.tensor([0.0, 500.0, 999.0])[:n], Condition(torch.randn(n, 5))


@pytest.mark.parametrize(("page", "millions"), {"s": 33, "b": 130, "l": 458, "xl": 675}.items())
def test_pages_have_the_published_sizes(page: str, millions: float) -> None:
    """Peebles & Xie 2023, table 1; XL from section 4: on latents of 4 channels, with a variance and 1001 classes."""
    options = dict(composed("model=dit", f"net@model.net=dit_{page}").model.net)
    del options["_target_"]
    latents = {"image_size": 32, "image_channels": 4, "cond_dim": None, "learned_variance": True}
    with torch.device("meta"):
        net = DiT(**options | latents)
    weights = sum(p.numel() for p in net.parameters()) + 1001 * options["width"]
    assert weights / 1e6 == pytest.approx(millions, abs=0.5)


def test_it_denoises_and_starts_at_0() -> None:
    net = DiT(**SMALL)
    assert isinstance(net, DenoisingNet) and net.shape == (3, 8, 8) and net.cond_sizes == {"vector": 5}
    assert torch.equal(net(*inputs()), torch.zeros(3, 3, 8, 8))
    h = torch.randn(2, 16, 16)
    assert torch.equal(net.blocks[0](h, torch.randn(2, 16)), h)  # closed gates
    free = DiT(**SMALL | {"cond_dim": None})
    assert free.cond_sizes == {} and free(*inputs()[:2]).shape == (3, 3, 8, 8)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_block_by_hand(qk_norm: bool) -> None:
    """Equations of the paper's figure 3, right, with torch's own attention of one head after the other."""
    torch.manual_seed(0)
    block, x, embedding = DiTBlock(8, 2, 0.0, qk_norm, 1e-6), torch.randn(3, 5, 8), torch.randn(3, 8)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.4)
    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(embedding)[:, None].split(8, dim=2)
    q, k, v = block.qkv(nn.functional.layer_norm(x, (8,), eps=1e-6) * (1 + scale1) + shift1).split(8, dim=2)
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        one, other = q[..., part], k[..., part]
        if qk_norm:
            one = one / one.square().mean(2, keepdim=True).sqrt() * block.query_norm.weight
            other = other / other.square().mean(2, keepdim=True).sqrt() * block.key_norm.weight
        heads.append((one @ other.mT / 2).softmax(2) @ v[..., part])
    h = x + gate1 * block.out(torch.cat(heads, dim=2))
    inner = block.mlp[0](nn.functional.layer_norm(h, (8,), eps=1e-6) * (1 + scale2) + shift2)
    inner = 0.5 * inner * (1 + (math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)).tanh())
    torch.testing.assert_close(block(x, embedding), h + gate2 * block.mlp[2](inner), atol=2e-5, rtol=1e-5)


def test_places_are_sines_of_column_and_row() -> None:
    table, side, width = sines_of_places(12, 4), 4, 12
    for place in range(side**2):
        row, column = divmod(place, side)
        for k in range(width // 4):
            w = 10_000 ** (-k / 3)
            waves = [math.sin(column * w), math.cos(column * w), math.sin(row * w), math.cos(row * w)]
            assert table[place, k::3].tolist() == pytest.approx(waves, abs=1e-6)


def test_a_token_is_drawn_where_it_was_seen() -> None:
    """Without attention a patch alone decides on its own place, and each pixel of it on each of the answer."""
    net = made(cond_dim=None)
    for block in net.blocks:
        nn.init.zeros_(block.out.weight)
    x, time, _ = inputs(1)
    x.requires_grad_()
    for row, column, channel in ((0, 0, 0), (3, 6, 1), (7, 1, 2)):
        grad = torch.autograd.grad(net(x, time)[0, channel, row, column], x)[0][0].abs().sum(0)
        seen = torch.zeros(8, 8, dtype=torch.bool)
        seen[row // 2 * 2 : row // 2 * 2 + 2, column // 2 * 2 : column // 2 * 2 + 2] = True
        assert torch.equal(grad > 0, seen)


@pytest.mark.parametrize("size", [16, 32, 64])
def test_patches_null_are_64_at_every_size(size: int) -> None:
    """What dit_tiny asks for; an image of 4 px has 16 of them."""
    net = made(image_size=size, patch_size=None, cond_dim=None)
    assert len(net.positions) == 64 and net(torch.zeros(1, 3, size, size), torch.zeros(1)).shape == (1, 3, size, size)
    assert len(made(image_size=4, patch_size=None).positions) == 16


def test_the_tiny_page_costs_what_it_says() -> None:
    options = dict(composed("model=dit").model.net)
    del options["_target_"]
    net = DiT(**options)
    with FlopCounterMode(display=False) as counted:
        output = net(torch.zeros(1, 3, 16, 16), torch.zeros(1), Condition(torch.zeros(1, 128)))
        output.sum().backward()
    assert counted.get_total_flops() / 1e9 == pytest.approx(0.5, abs=0.05)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(1.9, abs=0.05)


def test_pixels_keep_their_order_in_a_patch() -> None:
    """A head that gives each token the numbers 0 .. P P C, channels counting fastest (the published order)."""
    net = made(image_channels=2, cond_dim=None)
    nn.init.zeros_(net.head.weight)
    net.head.bias.data = torch.arange(8.0)
    patch = net(torch.randn(1, 2, 8, 8), torch.zeros(1))[0, :, 2:4, 4:6]
    assert patch.permute(1, 2, 0).flatten().tolist() == list(range(8))


@pytest.mark.parametrize("part", ["x", "time", "cond", "places"])
def test_output_depends_on(part: str) -> None:
    net, (x, time, cond) = made(), inputs()
    before = net(x, time, cond)
    if part == "places":
        net.positions.zero_()
    changed = {"x": (x + 0.1, time, cond), "time": (x, time + 10, cond), "places": (x, time, cond)}
    after = net(*changed.get(part, (x, time, Condition(cond.vector + 0.1))))
    assert (after - before).flatten(1).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("qk_norm", [False, True])
def test_every_parameter_gets_a_gradient(qk_norm: bool) -> None:
    net = made(qk_norm=qk_norm)
    net(*inputs()).square().sum().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_an_image_does_not_depend_on_its_batch() -> None:
    net, (x, time, cond) = made(), inputs()
    together = net(x, time, cond)
    for i in range(3):
        alone = net(x[i : i + 1], time[i : i + 1], cond.rows([i]))[0]
        torch.testing.assert_close(together[i], alone, atol=1e-5, rtol=1e-5)


def test_a_learned_variance_is_a_second_half_of_the_channels() -> None:
    net, plain = made(learned_variance=True), made()
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if "head" not in k}, strict=False)
    for part in ("weight", "bias"):  # of each pixel the first half
        whole = getattr(net.head, part).data
        getattr(plain.head, part).data = whole.unflatten(0, (4, 2, 3))[:, 0].flatten(0, 1)
    both = net(*inputs())
    assert both.shape == (3, 6, 8, 8) and net.shape == (3, 8, 8)
    torch.testing.assert_close(both[:, :3], plain(*inputs()))


def test_checkpointing_gives_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients, runs = [], []
    attention = DiTBlock.attention
    monkeypatch.setattr(DiTBlock, "attention", lambda self, x: runs.append(1) or attention(self, x))
    for checkpointing in (False, True):
        net = made(checkpointing=checkpointing, dropout=0.3)
        torch.manual_seed(2)
        net(*inputs()).square().sum().backward()
        gradients.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert len(runs) == 2 + 4  # two blocks, once and twice
    monkeypatch.setattr("atelier.nets.layers.checkpoint", None)
    with torch.no_grad():
        net(*inputs())  # nothing goes back, so nothing is kept anyway


def test_normed_queries_and_keys_stand_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention does not grow with them, whatever their size, and its inputs have one precision."""
    net, (x, time, cond) = made(qk_norm=True), inputs()
    plain, precisions = net(x, time, cond), set()

    def watched(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        precisions.add((q.dtype, k.dtype, v.dtype))
        return attended(q, k, v, causal)

    monkeypatch.setattr("atelier.nets.dit.attended", watched)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (net(x, time, cond).float() - plain).abs().mean() < 0.05 * plain.abs().mean()
    assert precisions == {(torch.bfloat16,) * 3}
    for block in net.blocks:
        block.qkv.weight.data[:32] *= 100
        block.qkv.bias.data[:32] *= 100
    torch.testing.assert_close(net(x, time, cond), plain, atol=1e-4, rtol=1e-4)


def test_in_float64_it_stays_there() -> None:
    """Attention on a CPU is in float32 for what is less."""
    net, (x, time, cond) = made(), inputs()
    plain = net(x, time, cond)
    exact = net.double()(x.double(), time, Condition(cond.vector.double()))
    assert exact.dtype == torch.float64
    assert 0 < (exact - plain).abs().max() < 1e-3 * plain.abs().max()


def test_dropout_acts_in_training_only() -> None:
    net, given = made(dropout=0.5), inputs()
    assert not torch.equal(net(*given), net(*given))
    net.eval()
    assert torch.equal(net(*given), net(*given))
    x = torch.randn(2, 16, 16)
    assert torch.equal(made(dropout=1.0).blocks[0](x, torch.randn(2, 16)), x)  # both branches end in it


@pytest.mark.parametrize(("changes", "line"), [
    ({"image_size": 9}, "data.image_size=9: patches of 2 do not fill it. Fix: data.image_size=10"),
    ({"width": 18}, ".width=18: places need sines and cosines of two axes, a multiple of 4. Fix: .width=20"),
    ({"heads": 3}, ".heads=3: it does not divide the width 16. Fix: .heads=1"),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, int], line: str) -> None:
    with pytest.raises(UserError) as caught:
        DiT(**SMALL | changes)
    assert caught.value.line() == f"error: {line}"
