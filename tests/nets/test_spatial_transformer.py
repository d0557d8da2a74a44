"""Attention of a U-Net that looks at tokens: its equations, the nets of Stable Diffusion, published sizes."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atelier.core.condition import Condition
from atelier.core.errors import UserError
from atelier.nets.layers import CrossAttention
from atelier.nets.spatial_transformer import SpatialTransformer
from atelier.nets.unet import UNet

SD1 = {"width": 320, "multipliers": [1, 2, 4, 4], "n_blocks": 2, "attention": [64, 32, 16], "heads": 8}
SD2 = {**SD1, "head_width": 64, "token_dim": 1024}
SDXL = {"width": 320, "multipliers": [1, 2, 4], "n_blocks": 2, "attention": [32, 16], "head_width": 64}


def shaken(net: nn.Module) -> nn.Module:
    """Weights moved off their start, where some are 0."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return net


def by_head(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of one image after the other and two heads of half the channels, (B, N, C), (B, T, C), (B, T)."""
    rows = []
    for one, keys, values, there in zip(q, k[:, :], v, mask, strict=True):
        parts = []
        for part in (slice(0, q.shape[2] // 2), slice(q.shape[2] // 2, q.shape[2])):
            weights = (one[:, part] @ keys[there][:, part].T / math.sqrt(q.shape[2] // 2)).exp()
            parts.append(weights / weights.sum(1, keepdim=True) @ values[there][:, part])
        rows.append(torch.cat(parts, dim=1))
    return torch.stack(rows)


def test_its_equations_by_hand() -> None:
    torch.manual_seed(0)
    layer = shaken(SpatialTransformer(8, heads=2, token_dim=5, depth=1, groups=2)).double()
    x, tokens = torch.randn(2, 8, 3, 4).double(), torch.randn(2, 3, 5).double()
    mask = torch.tensor([[True, False, True], [False, True, True]])
    block = layer.blocks[0]

    def normed(norm: nn.LayerNorm, h: Tensor) -> Tensor:
        middle, spread = h.mean(2, keepdim=True), h.var(2, correction=0, keepdim=True)
        return (h - middle) / (spread + 1e-5).sqrt() * norm.weight + norm.bias

    grouped = x.unflatten(1, (2, 4))
    spread = grouped.var((2, 3, 4), correction=0, keepdim=True)
    grouped = ((grouped - grouped.mean((2, 3, 4), keepdim=True)) / (spread + 1e-6).sqrt()).flatten(1, 2)
    grouped = grouped * layer.norm.weight[:, None, None] + layer.norm.bias[:, None, None]
    h = layer.proj_in(grouped.flatten(2).mT)
    q, k, v = (normed(block.norm1, h) @ block.qkv.weight.T).split(8, dim=2)
    h = h + block.out(by_head(q, k, v, torch.ones(2, 12, dtype=torch.bool)))
    k, v = (tokens @ block.cross.kv.weight.T).split(8, dim=2)
    h = h + block.cross.out(by_head(normed(block.norm2, h) @ block.cross.q.weight.T, k, v, mask))
    value, gate = block.mlp[0].proj(normed(block.norm3, h)).split(32, dim=2)
    h = h + block.mlp[1](value * gate * (1 + (gate / math.sqrt(2)).erf()) / 2)
    expected = x + layer.proj_out(h).mT.unflatten(2, (3, 4))
    torch.testing.assert_close(layer(x, tokens, mask), expected)
    assert (expected - x).abs().mean() > 0.01


def test_only_its_last_layer_starts_at_0() -> None:
    layer = SpatialTransformer(8, heads=2, token_dim=5, depth=2, groups=2)
    still = {n for n, m in layer.named_modules() if isinstance(m, nn.Linear) and not m.weight.any()}
    x = torch.randn(2, 8, 3, 4)
    assert still == {"proj_out"}
    assert torch.equal(layer(x, torch.randn(2, 3, 5), torch.ones(2, 3, dtype=torch.bool)), x)


@pytest.mark.parametrize(("options", "published"), [
    (SD1 | {"token_dim": 768}, 859_520_964),
    (SD1 | {"token_dim": 768, "plane_channels": 5}, 859_535_364),
    (SD2, 865_910_724),
    (SDXL | {"token_dim": 2048, "depths": [1, 2, 10], "cond_dim": 2816, "deep_cond": True}, 2_567_463_684),
], ids=["sd1", "sd1_inpaint", "sd2", "sdxl"])  # fmt: skip
def test_nets_of_the_published_sizes(options: dict[str, Any], published: int) -> None:
    """Of Stable Diffusion 1 (text, inpainting), 2 and XL, as their weights count."""
    with torch.device("meta"):
        net = UNet(image_size=64, image_channels=4, norm_groups=32, **options)
    assert sum(p.numel() for p in net.parameters()) == published


TINY = {"image_size": 8, "image_channels": 4, "width": 8, "n_blocks": 2, "token_dim": 16}
TINY |= {"norm_groups": 4, "norm_eps": 1e-5, "freq_shift": 0}
CROSS, PLAIN = "CrossAttn{}Block2D", "{}Block2D"
NETS = {  # ours, theirs, which levels attend
    "sd1": ({"multipliers": [1, 2], "attention": [8], "heads": 2}, {"attention_head_dim": 2}, [1, 0]),
    "sd2": (
        {"multipliers": [1, 2], "attention": [8], "head_width": 8, "plane_channels": 5},
        {"attention_head_dim": (1, 2), "use_linear_projection": True, "in_channels": 9},
        [1, 0],
    ),
    "sdxl": (
        {"multipliers": [1, 2], "attention": [4], "head_width": 8, "depths": [1, 2]},
        {"attention_head_dim": (1, 2), "use_linear_projection": True, "transformer_layers_per_block": (1, 2)},
        [0, 1],
    ),
}
NAMES = (  # our parts -> theirs
    (r"^time\.1\.", "time_embedding.linear_1."),
    (r"^time\.3\.", "time_embedding.linear_2."),
    (r"^stem\.", "conv_in."),
    (r"^head\.0\.", "conv_norm_out."),
    (r"^head\.2\.", "conv_out."),
    (r"^middle\.(\d)\.residual\.", r"mid_block.resnets.\1."),
    (r"^middle\.0\.attention\.", "mid_block.attentions.0."),
    (r"\.embedding\.", ".time_emb_proj."),
    (r"\.skip\.", ".conv_shortcut."),
    (r"\.blocks\.", ".transformer_blocks."),
    (r"(blocks\.\d+)\.qkv\.", r"\1.attn1.qkv."),
    (r"(blocks\.\d+)\.out\.", r"\1.attn1.to_out.0."),
    (r"\.cross\.out\.", ".attn2.to_out.0."),
    (r"\.cross\.q\.", ".attn2.to_q."),
    (r"\.cross\.kv\.", ".attn2.kv."),
    (r"\.mlp\.0\.", ".ff.net.0."),
    (r"\.mlp\.1\.", ".ff.net.2."),
)


def their_names(name: str) -> list[str]:
    """Of each of the tensors that make one of ours, in a net of two blocks a level."""
    way, number, rest = re.match(r"(?:(down|up)\.(\d+)\.)?(.*)", name).groups()
    if way:
        level, k = divmod(int(number), 3 if way == "down" else 4)
        kind, _, last = rest.partition(".")
        inside = f"{way}samplers.0.{rest}" if kind == "conv" else f"{kind}s.{k}.{last}"
        name = f"{way}_blocks.{level}.{inside.replace('residuals', 'resnets')}"
    for ours, theirs in NAMES:
        name = re.sub(ours, theirs, name)
    kinds = re.search(r"\.(qkv|kv)\.", name)
    return [name.replace(kinds[0], f".to_{part}.") for part in kinds[1]] if kinds else [name]


@pytest.mark.parametrize("name", NETS)
def test_the_nets_of_stable_diffusion_give_the_same(name: str) -> None:
    """diffusers' own, small: their tensors by rule, those of 1x1 convolutions as linear ones."""
    diffusers = pytest.importorskip("diffusers")
    own, options, attends = NETS[name]
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(**{
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "cross_attention_dim": 16,
        "down_block_types": tuple((CROSS if a else PLAIN).format("Down") for a in attends),
        "up_block_types": tuple((CROSS if a else PLAIN).format("Up") for a in attends[::-1]),
        **options,
    })  # fmt: skip
    weights = shaken(theirs.eval()).state_dict()
    ours = UNet(**TINY | own).eval()
    made = {
        name: torch.cat([weights.pop(part) for part in their_names(name)]).reshape(value.shape)
        for name, value in ours.state_dict().items()
    }
    made["time.1.weight"] = made["time.1.weight"].roll(4, dims=1)  # theirs has cosines first
    assert not weights
    ours.load_state_dict(made)
    x, tokens, time = torch.randn(2, theirs.config.in_channels, 8, 8), torch.randn(2, 7, 16), torch.tensor([3, 700])
    mask = torch.arange(7) < torch.tensor([[4], [7]])
    with torch.no_grad():
        output = ours(x[:, :4], time.float(), Condition(tokens=tokens, mask=mask, planes=x[:, 4:]))
        expected = theirs(x, time, encoder_hidden_states=tokens, encoder_attention_mask=mask).sample
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    assert output.std() > 0.1


def test_every_attention_of_the_net_looks_at_tokens() -> None:
    """As many as it has without tokens, each as deep as its level says; the middle as the last."""
    options = {"multipliers": [1, 2, 2], "attention": [8, 2], "heads": 2, "depths": [1, 5, 3]}
    found = [m for m in UNet(**TINY | options).modules() if isinstance(m, SpatialTransformer)]
    assert [len(m.blocks) for m in found] == [1, 1, 3, 3, 3, 3, 3, 3, 1, 1, 1]
    plain = UNet(**TINY | options | {"token_dim": None, "depths": None})
    assert not [m for m in plain.modules() if isinstance(m, SpatialTransformer | CrossAttention)]


@pytest.mark.parametrize(("changes", "line"), [
    ({"depths": [1]}, ".depths=[1]: it says 1 for 2 levels. Fix: .depths=[1,1]"),
    (
        {"depths": [1, 2], "token_dim": None},
        ".depths=[1, 2]: transformer blocks need tokens to look at. Fix: .depths=null",
    ),
    ({"deep_cond": True}, ".deep_cond=True: two layers need a vector to read. Fix: .deep_cond=false"),
])  # fmt: skip
def test_what_does_not_fit_together_is_refused(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        UNet(**TINY | {"multipliers": [1, 2], "attention": None} | changes)
    assert caught.value.line() == f"error: {line}"
