"""Adapters of low rank: their equations, peft's layers, merging to and from the bit, two ranks."""

from __future__ import annotations

import copy
import os
import socket
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from atelier.callbacks.ema import average_of
from atelier.core.condition import Condition
from atelier.core.errors import UserError
from atelier.models.base import Model
from atelier.nets import lora
from atelier.nets.layers import SelfAttention
from atelier.nets.unet import UNet
from tests.nets.lora_ranks import adapted, gradients
from tests.nets.test_spatial_transformer import SD1, SDXL, TINY, shaken
from tests.programs import ROOT, Program

LAYERS = {
    "linear": (nn.Linear(6, 10), (3, 7, 6)),
    "1x1": (nn.Conv2d(6, 10, 1), (3, 6, 7, 5)),
    "3x3": (nn.Conv2d(6, 10, 3, padding=1, bias=False), (3, 6, 7, 5)),
    "strided": (nn.Conv2d(6, 10, 3, stride=2, padding=1), (3, 6, 7, 5)),
}


def unet(**options: object) -> UNet:
    torch.manual_seed(0)
    return shaken(UNet(**TINY | {"multipliers": [1, 2], "attention": [8], "heads": 2} | options))


def given(net: UNet) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, tokens = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
    planes = torch.randn(2, net.cond_sizes.get("planes", 0), 8, 8, generator=generator)
    return net(x, torch.tensor([3.0, 700.0]), Condition(tokens=tokens, planes=planes))


def adapted_by(net: nn.Module) -> nn.Module:
    """With an adapter wherever there can be one."""
    lora.attach(net, "style", dict.fromkeys(lora.places(net), (2, 1.0)))
    return net


def moved(net: nn.Module, name: str) -> nn.Module:
    """B off its 0."""
    for block in lora.adapters(net, name).values():
        nn.init.normal_(block.up.weight, std=0.2)
    return net


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_gives_what_pefts_gives(kind: str) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    layer, shape = LAYERS[kind]
    net = nn.Sequential(copy.deepcopy(layer))
    theirs = peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(r=4, lora_alpha=3, target_modules=["0"]))
    lora.add(net, name="style", targets=["0"], rank=4, alpha=3)
    block = lora.adapters(moved(net, "style"), "style")["0"]
    their_layer = theirs.base_model.model[0]
    their_layer.lora_A["default"].weight.data.copy_(block.down.weight)
    their_layer.lora_B["default"].weight.data.copy_(block.up.weight)
    x = torch.randn(shape)
    torch.testing.assert_close(net(x), theirs(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(block.change(1.0), their_layer.get_delta_weight("default"), rtol=1e-6, atol=1e-7)
    net(x).square().sum().backward()
    theirs(x).square().sum().backward()
    for ours, other in ((block.down, their_layer.lora_A), (block.up, their_layer.lora_B)):
        torch.testing.assert_close(ours.weight.grad, other["default"].weight.grad, rtol=1e-4, atol=1e-5)


def test_every_convolution_without_groups_has_its_own_way_in_its_adapter() -> None:
    """Of a kernel, dilation, padding and mode that peft's leaves out: against the layer of W + (alpha / r) B A."""
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 10, (3, 2), stride=(1, 2), dilation=2, padding=(2, 1), padding_mode="reflect")
    net, x = nn.Sequential(copy.deepcopy(layer)), torch.randn(3, 6, 7, 5)
    lora.add(net, name="style", targets=["0"], rank=4, alpha=3)
    block = lora.adapters(moved(net, "style"), "style")["0"]
    for o in range(10):
        for i in range(6):
            layer.weight.data[o, i] += (
                3 / 4 * sum(block.up.weight[o, r, 0, 0] * block.down.weight[r, i] for r in range(4))
            )
    torch.testing.assert_close(net(x), layer(x))


def test_it_starts_as_the_net_with_its_names() -> None:
    for net in (unet(), unet(plane_channels=3).requires_grad_(False)):
        before = given(net)
        assert torch.equal(given(adapted_by(net)), before)
    net = unet()
    state, expected = net.state_dict(), list(net.state_dict())
    lora.add(net, name="style", targets=["qkv", "kv", "out", r".*conv\d?", "stem"], rank=2, alpha=1)
    assert [key for key in net.state_dict() if ".lora." not in key] == expected
    found = net.load_state_dict(state, strict=False)
    assert not found.unexpected_keys and all(".lora.style." in key for key in found.missing_keys)
    for block in lora.adapters(net, "style").values():
        weight = block.down.weight
        bound = weight[0].numel() ** -0.5  # of a uniform distribution by Kaiming with a gain of sqrt(1/3)
        assert weight.abs().max() <= bound and not block.up.weight.any()
    drawn = torch.cat(
        [b.down.weight.flatten() * b.down.weight[0].numel() ** 0.5 for b in lora.adapters(net, "style").values()]
    )
    assert len(drawn) > 1000 and drawn.std().item() == pytest.approx(3**-0.5, rel=0.05)


def test_it_alone_is_trained_and_averaged() -> None:
    class Toy(Model):
        ema_nets = ("net",)

    model = Toy()
    model.net = unet()
    lora.add(model.net, name="style", targets=["qkv.v", "out"], rank=2, alpha=1)
    trained = model.trained()
    assert trained and all(".lora.style." in name for name in trained)
    assert sum(w.numel() for w in trained.values()) == sum(
        2 * (at.shape[0] + at.shape[1])
        for name, at in lora.places(model.net).items()
        if name.endswith((".qkv.v", ".out"))
    )
    moved(model.net, "style")
    given(model.net).square().mean().backward()
    assert all((p.grad is not None) == (name in trained) for name, p in model.named_parameters())
    assert all(p.grad.any() for p in trained.values())
    average = average_of(model)["net"]
    shared = {name for name, p in average.named_parameters() if p is dict(model.net.named_parameters())[name]}
    assert {f"net.{name}" for name, _ in model.net.named_parameters() if name not in shared} == set(trained)
    assert torch.equal(given(average), given(model.net))
    moved(average, "style")
    assert not torch.equal(given(average), given(model.net))
    lora.remove(average)
    assert lora.names(model.net) == ["style"] and not lora.names(average)


def test_merged_is_the_same_and_unmerged_the_same_bits() -> None:
    net = unet().requires_grad_(False)
    plain, state = given(net), copy.deepcopy(net.state_dict())
    lora.add(net, name="style", targets=["qkv.q", "qkv.v", "cross.kv", "out", "proj", r".*conv\d?"], rank=3, alpha=2)
    lora.add(net, name="other", targets=["qkv", "skip", "proj_out"], rank=2, alpha=4)
    moved(moved(net, "style"), "other")
    with torch.no_grad():
        for weights in ({"style": 1, "other": 1}, {"style": 0.7}, {"other": -1.5, "style": 0.5}):
            lora.weigh(net, weights)
            expected = given(net)
            lora.merge(net)
            torch.testing.assert_close(given(net), expected, rtol=0, atol=1e-5)
            assert (expected - plain).abs().max() > 0.1
            lora.unmerge(net)
            assert torch.equal(given(net), expected)
        assert all(torch.equal(net.state_dict()[key], value) for key, value in state.items())
        lora.merge(net)
        lora.weigh(net, {"style": 1})  # of merged ones
        merged = given(net)
        lora.merge(net)
        assert torch.equal(given(net), merged)
        lora.unmerge(net)
        torch.testing.assert_close(given(net), merged, rtol=0, atol=1e-5)
        lora.weigh(net, {})
        assert torch.equal(given(net), plain)
        lora.merge(net)
        lora.weigh(net, {"style": 1})
        lora.attach(net, "third", {"stem": (2, 1.0)})
        torch.testing.assert_close(given(net), merged, rtol=0, atol=1e-5)
        block, key = lora.adapters(net, "other")["middle.0.attention.proj_out"], "middle.0.attention.proj_out.weight"
        assert torch.equal(net.state_dict()[key], state[key])
        assert not torch.equal(state[key] + block.change(1.0) - block.change(1.0), state[key])


def test_taken_off_it_is_a_plain_net() -> None:
    net = unet()
    plain, keys = given(net), list(net.state_dict())
    lora.add(net, name="style", targets=["qkv", "conv1"], rank=2, alpha=4)
    with torch.no_grad():
        adapted = given(moved(net, "style"))
        lora.merge(net)
    lora.remove(net)
    assert list(net.state_dict()) == keys and not lora.names(net)
    torch.testing.assert_close(given(net), adapted, rtol=0, atol=1e-5)
    lora.add(net, name="style", targets=["qkv"], rank=2, alpha=4)
    lora.remove(net)
    assert (given(net) - plain).abs().max() > 0.1


@pytest.mark.parametrize(("options", "published"), [
    (SD1 | {"token_dim": 768}, 797_184),
    (SDXL | {"token_dim": 2048, "depths": [1, 2, 10]}, 5_806_080),
], ids=["sd1", "sdxl"])  # fmt: skip
def test_adapters_of_the_published_sizes(options: dict, published: int) -> None:
    """Of rank 4 on all attention of Stable Diffusion, as the script of diffusers trains them."""
    with torch.device("meta"):
        net = UNet(image_size=64, image_channels=4, norm_groups=32, **options)
    lora.add(net, name="style", targets=["qkv", "cross.q", "kv", "out"], rank=4, alpha=4)
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == published


def test_several_add_by_weight() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 9)), torch.randn(4, 6)
    lora.add(net, name="a", targets=["0"], rank=2, alpha=4)
    lora.add(net, name="b", targets=["0"], rank=3, alpha=1)
    a, b = (lora.adapters(moved(net, name), name)["0"] for name in "ab")
    assert lora.names(net) == ["a", "b"] and not a.up.weight.requires_grad and b.up.weight.requires_grad
    plain = x @ net[0].weight.T + net[0].bias
    by_a, by_b = x @ a.down.weight.T @ a.up.weight.T * 2, x @ b.down.weight.T @ b.up.weight.T / 3
    torch.testing.assert_close(net(x), plain + by_a + by_b)
    lora.weigh(net, {"a": 0.25, "b": -2})
    torch.testing.assert_close(net(x), plain + 0.25 * by_a - 2 * by_b)
    lora.weigh(net, {"b": 1})
    torch.testing.assert_close(net(x), plain + by_b)


def test_parts_of_a_layer_have_adapters_of_their_own() -> None:
    """Queries of rank 1, values of rank 3 and no keys, against three layers."""
    torch.manual_seed(0)
    net, x = nn.Sequential(shaken(SelfAttention(8, heads=2))), torch.randn(2, 8, 3, 3)
    lora.add(net, name="style", targets=["qkv.q"], rank=1, alpha=2)
    lora.add(net, name="style", targets=[r".*\.v"], rank=3, alpha=1)
    found = lora.adapters(moved(net, "style"), "style")
    assert list(found) == ["0.qkv.q", "0.qkv.v"]
    assert {key for key in net.state_dict() if "up" in key} == {f"0.qkv.lora.style.{p}.up.weight" for p in "qv"}
    q, k, v = net[0].qkv.weight.chunk(3)
    q = q + 2 * found["0.qkv.q"].up.weight @ found["0.qkv.q"].down.weight
    v = v + found["0.qkv.v"].up.weight @ found["0.qkv.v"].down.weight / 3
    single = copy.deepcopy(net)
    lora.remove(single)
    single[0].qkv.weight.data = torch.cat([q, k, v])
    torch.testing.assert_close(net(x), single(x))
    lora.merge(net)
    torch.testing.assert_close(net[0].qkv.weight, single[0].qkv.weight)


def test_stopped_and_resumed_is_exact(tmp_path: Path) -> None:
    """From the weights that are trained, the optimizer's state and the plain net."""

    def trained(steps: int, file: Path | None = None) -> dict[str, Tensor]:
        net = unet()
        lora.add(net, name="style", targets=["qkv", "cross.kv", "conv1"], rank=2, alpha=3)
        own = {name: weight for name, weight in net.named_parameters() if weight.requires_grad}
        optimizer = torch.optim.AdamW(own.values(), lr=0.01)
        if file is not None and file.exists():
            kept = torch.load(file, weights_only=True)
            assert not net.load_state_dict(kept["weights"], strict=False).unexpected_keys
            optimizer.load_state_dict(kept["optimizer"])
        for _ in range(steps):
            optimizer.zero_grad()
            given(net).square().mean().backward()
            optimizer.step()
        if file is not None:
            torch.save({"weights": own, "optimizer": optimizer.state_dict()}, file)
        return net.state_dict()

    whole = trained(4)
    trained(2, tmp_path / "half.pt")
    halves = trained(2, tmp_path / "half.pt")
    assert all(torch.equal(whole[name], weight) for name, weight in halves.items())
    assert not torch.equal(whole["middle.0.attention.blocks.0.qkv.lora.style.v.up.weight"], torch.zeros(16, 2))


def test_half_precision_stays_and_is_near() -> None:
    net = adapted(checkpointing=False)
    expected = given(net)
    with torch.autocast("cpu", torch.bfloat16):
        seen = {}
        net.middle[0].attention.blocks[0].qkv.register_forward_hook(lambda _, x, y: seen.update(out=y))
        found = given(net)
    assert seen["out"].dtype == torch.bfloat16
    assert (found - expected).abs().mean() < 0.02 * expected.abs().mean()
    net = nn.Sequential(nn.Linear(4, 4)).bfloat16()
    lora.add(net, name="style", targets=["0"], rank=2, alpha=1)
    assert net(torch.ones(1, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_two_ranks_and_checkpoints_give_the_gradients_of_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    environment = os.environ | environment | {"PYTHONPATH": str(ROOT)}
    words = ["-m", "tests.nets.lora_ranks", str(tmp_path)]
    programs = [Program(words, ROOT, environment | {"RANK": str(rank)}) for rank in range(2)]
    ended = [program.done(200) for program in programs]
    assert not any(end.returncode for end in ended), "".join(end.stderr[-3000:] for end in ended)
    first, second = (torch.load(tmp_path / f"gradients_{rank}.pt", weights_only=True) for rank in range(2))
    one = gradients(adapted(checkpointing=False), slice(0, 4))
    assert len(first) == len(second) == 2 * len(one) > 80
    for name, gradient in one.items():
        assert gradient.any()
        for checkpointing in (False, True):
            found = first[f"{checkpointing} {name}"]
            assert torch.equal(found, second[f"{checkpointing} {name}"])
            torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)


class Odd(nn.Module):
    """Layers of other kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.grouped = nn.Embedding(4, 6), nn.Conv2d(6, 6, 3, groups=2)
        self.turned, self.norm, self.last = nn.ConvTranspose2d(6, 6, 3), nn.LayerNorm(6), nn.Linear(6, 6)


@pytest.mark.parametrize(("targets", "line"), [
    (["table"], "table: table is of Embedding; adapters go on Linear, and Conv2d without groups"),
    (["last", "grouped"], "grouped: grouped is of Conv2d; adapters go on Linear, and Conv2d without groups"),
    ([r".*ur.*"], ".*ur.*: turned is of ConvTranspose2d; adapters go on Linear, and Conv2d without groups"),
    (["norm"], "norm: no Linear or Conv2d of the net is called so"),
    (["lost"], "lost: no Linear or Conv2d of the net is called so"),
    (["*.last"], "*.last: no end of a name, and no regular expression: nothing to repeat at position 0"),
])  # fmt: skip
def test_targets_that_are_no_layers_are_refused(targets: list[str], line: str) -> None:
    net = Odd()
    with pytest.raises(UserError) as caught:
        lora.add(net, name="style", targets=targets, rank=2, alpha=1)
    assert caught.value.line() == f"error: .targets={line}. Fix: .targets=[last]"
    assert not lora.names(net)


def test_names_that_cannot_be_are_refused() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    for name in ("my.style", "items", "kept", "2d", ""):
        with pytest.raises(UserError, match="no word that an adapter can be called"):
            lora.add(net, name=name, targets=["0"], rank=1, alpha=1)
    lora.add(net, name="style", targets=["0"], rank=1, alpha=1)
    with pytest.raises(UserError, match=r"0 has an adapter of this name. Fix: .name=style_2"):
        lora.add(net, name="style", targets=["1", "0"], rank=1, alpha=1)
    with pytest.raises(UserError, match=r"error: .weights=stile: no adapter is called so, but \['style'\]"):
        lora.weigh(net, {"stile": 1.0})
