"""The layout of latent diffusion's first stages: counts of the published nets, maps, ranges, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from atelier.core.errors import UserError
from atelier.nets.autoencoder import Halve, Layout
from atelier.nets.autoencoder_kl import KLNet
from atelier.nets.quantizers import VectorQuantizer
from atelier.nets.vqgan import VQGANNet

SMALL = {
    "image_size": 16,
    "image_channels": 3,
    "width": 8,
    "multipliers": [1, 2, 2],
    "n_blocks": 1,
    "attention": [],
    "middle_attention": True,
    "norm_groups": None,
    "dropout": 0.0,
}
PUBLISHED = {
    "image_size": 256,
    "image_channels": 3,
    "width": 128,
    "multipliers": [1, 2, 4, 4],
    "n_blocks": 2,
    "attention": [],
    "middle_attention": True,
    "norm_groups": 32,
    "dropout": 0.0,
}


def quantizer(n_codes: int = 16, dim: int = 4) -> VectorQuantizer:
    options = {
        "update": "ema",
        "ema_decay": 0.99,
        "commitment_weight": 0.25,
        "kmeans_init": False,
        "dead_code_threshold": 0.0,
    }
    return VectorQuantizer(n_codes=n_codes, dim=dim, **options)


def kl(**changes: Any) -> KLNet:
    torch.manual_seed(0)
    return KLNet(**(SMALL | {"latent_channels": 3} | changes))


def vq(**changes: Any) -> VQGANNet:
    torch.manual_seed(0)
    net = VQGANNet(**(SMALL | {"latent_channels": 5, "quantizer": quantizer()} | changes))
    nn.init.normal_(net.quantizer.codebook)  # codes as far apart as latents
    return net


def n_weights(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_the_published_autoencoder_has_its_number_of_weights() -> None:
    """KL-f8, the first stage of Stable Diffusion 1: 83,653,863."""
    with torch.device("meta"):
        assert n_weights(KLNet(**PUBLISHED, latent_channels=4)) == 83_653_863


@pytest.mark.parametrize(("multipliers", "latent"), [([1, 2], 8), ([1, 2, 2], 4), ([1, 1, 2, 2], 2)])
def test_maps_are_halved_between_levels(multipliers: list[int], latent: int) -> None:
    net, x = kl(multipliers=multipliers), torch.rand(2, 3, 16, 16)
    mean, logvar = net.encode(x)
    assert mean.shape == logvar.shape == (2, *net.latent_shape) == (2, 3, latent, latent)
    assert net.decode(mean).shape == x.shape
    assert vq(multipliers=multipliers).latent_shape == (4, latent, latent)


def test_log_variances_stay_within_their_range() -> None:
    net = kl()
    for value, held in ((1e3, 20.0), (-1e3, -30.0), (7.0, 7.0)):
        nn.init.zeros_(net.quant.weight)
        nn.init.constant_(net.quant.bias, value)
        mean, logvar = net.encode(torch.zeros(1, 3, 16, 16))
        assert (mean == value).all() and (logvar == held).all()


def test_halving_pads_below_and_right() -> None:
    """A picture that is 1 at its last pixel alone is seen by the last output; weights 1..9 say where."""
    halve = Halve(1)
    with torch.no_grad():
        halve.conv.weight.copy_(torch.arange(1.0, 10).view(1, 1, 3, 3))
        halve.conv.bias.zero_()
    x = torch.zeros(1, 1, 4, 4)
    x[..., 3, 3] = 1
    assert halve(x)[0, 0].tolist() == [[0, 0], [0, 5]]
    assert halve(torch.ones(1, 1, 4, 4))[0, 0].tolist() == [[45, 45 - 18], [45 - 24, 1 + 2 + 4 + 5]]


def test_attention_stands_where_it_is_asked_for() -> None:
    def places(net: KLNet) -> set[str]:
        found = {n.removesuffix(".attention.qkv.bias") for n, _ in net.named_parameters() if n.endswith("qkv.bias")}
        return {name for name in found if name.startswith("encoder")}

    assert places(kl()) == {"encoder.middle.0"}
    assert places(kl(middle_attention=False)) == set()
    assert places(kl(attention=[8], n_blocks=2)) == {
        "encoder.middle.0", "encoder.levels.1.blocks.0", "encoder.levels.1.blocks.1"
    }  # fmt: skip


@pytest.mark.parametrize(("width", "given", "groups"), [(8, None, 2), (4, None, 1), (128, None, 32), (96, None, 8),
                                                        (32, None, 8), (8, 4, 4)])  # fmt: skip
def test_norms_have_up_to_32_groups_of_four_or_more(width: int, given: int | None, groups: int) -> None:
    with torch.device("meta"):
        net = kl(width=width, norm_groups=given)
    assert {m.num_groups for m in net.modules() if isinstance(m, nn.GroupNorm)} == {groups}
    assert {m.eps for m in net.modules() if isinstance(m, nn.GroupNorm)} == {1e-6}


def test_dropout_is_off_when_judged() -> None:
    net, x = kl(dropout=0.5), torch.rand(1, 3, 16, 16)
    assert not torch.equal(net.encode(x)[0], net.encode(x)[0])
    net.eval()
    assert torch.equal(net.encode(x)[0], net.encode(x)[0])


def test_latents_of_a_quantised_net_come_before_the_quantiser() -> None:
    net, x = vq().eval(), torch.rand(4, 3, 16, 16)
    z, logvar = net.encode(x)
    assert (logvar == -20).all() and z.shape == (4, 4, 4, 4)
    codes = net.codes(x)
    far = torch.cdist(z.movedim(1, 3).flatten(0, 2), net.quantizer.codebook)
    assert torch.equal(codes.flatten(), far.argmin(1))
    assert codes.shape == (4, *net.code_shape) and codes.dtype == torch.int64 and len(codes.unique()) > 2
    assert torch.equal(net.decode(z), net.decode_codes(codes))
    assert torch.equal(net.decode(z), net.decode(net.quantizer.embed(codes)))
    assert not torch.allclose(net.decode(z), net.image(z))


def test_everything_that_is_decoded_is_heard_by_every_weight() -> None:
    for net in (kl(attention=[16]), vq(attention=[16])):
        for name, parameter in net.named_parameters():
            if name.endswith("attention.out.weight"):
                nn.init.normal_(parameter)  # starts at 0, which stops the gradient behind it
        mean, logvar = net.encode(torch.rand(2, 3, 16, 16))
        (net.decode(mean) + logvar.sum()).square().sum().backward()
        assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]


def test_both_sides_of_the_latent_are_float32_under_bf16() -> None:
    for net in (kl(), vq()):
        seen: list[torch.dtype] = []
        net.decoder.register_forward_hook(lambda net, args, out, seen=seen: seen.append(out.dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mean, logvar = net.encode(torch.rand(1, 3, 16, 16))
            image = net.decode(mean)
        assert seen == [torch.bfloat16]  # autocast was on
        assert {mean.dtype, logvar.dtype, image.dtype} == {torch.float32}


def test_a_residual_block_by_hand() -> None:
    block = kl().encoder.levels[1].blocks[0].residual
    x = torch.randn(2, 8, 5, 5)
    h = F.conv2d(F.silu(F.group_norm(x, 2, block.norm1.weight, block.norm1.bias, 1e-6)), block.conv1.weight, padding=1)
    h = F.silu(F.group_norm(h + block.conv1.bias[:, None, None], 2, block.norm2.weight, block.norm2.bias, 1e-6))
    h = F.conv2d(h, block.conv2.weight, block.conv2.bias, padding=1)
    torch.testing.assert_close(block(x), F.conv2d(x, block.skip.weight, block.skip.bias) + h)


@pytest.mark.parametrize(("changes", "line"), [
    ({"image_size": 18}, "error: data.image_size=18: 3 levels need a multiple of 4. Fix: data.image_size=16"),
    ({"attention": [5]}, "error: .attention=[5]: no map has size 5; the levels have [16, 8, 4]. Fix: "),
    ({"norm_groups": 3}, "error: .norm_groups=3: it does not divide the widths [8, 16, 16]. Fix: "),
])  # fmt: skip
def test_what_does_not_fit_is_one_line(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        Layout(**(SMALL | changes))
    assert caught.value.line().startswith(line)
