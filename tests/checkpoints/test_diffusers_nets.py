"""Denoising nets in diffusers' folders: what they write we read, what we write they read, with the same outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from atelier.checkpoints import diffusers_nets
from atelier.checkpoints.diffusers_files import CONFIG, WEIGHTS
from atelier.core.condition import Condition
from atelier.core.errors import UserError
from atelier.nets.conditioning import ConditionEmbedder
from atelier.nets.dit import DiT
from atelier.nets.unet import UNet
from tests.checkpoints.test_diffusers_folder import shaken

diffusers = pytest.importorskip("diffusers")

CLOSE = {"rtol": 0, "atol": 1e-5}
DDPM = {  # google/ddpm-cifar10-32, of an eighth of the width
    "sample_size": 16,
    "block_out_channels": [16, 32, 32, 32],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 8,
}
ADM = {  # Dhariwal & Nichol 2021: labels, learned variance, heads of one width, resampling inside blocks
    "sample_size": 16,
    "out_channels": 6,
    "block_out_channels": [16, 32, 48],
    "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "norm_num_groups": 4,
    "attn_norm_num_groups": 4,
    "resnet_time_scale_shift": "scale_shift",
    "num_class_embeds": 5,
}
PLAIN = {  # what diffusers does unless it is told otherwise
    "sample_size": [8, 8],
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 8,
}
UNETS = {"ddpm": DDPM, "adm": ADM, "plain": PLAIN}
TRANSFORMER = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 6,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_embeds_ada_norm": 5,
    "norm_num_groups": 8,
}
OUR_UNET = {
    "image_size": 16,
    "image_channels": 3,
    "width": 16,
    "multipliers": [1, 2],
    "n_blocks": 2,
    "attention": [8],
    "cond_dim": 6,
    "norm_groups": 4,
}
OUR_DIT = {
    "image_size": 8,
    "image_channels": 3,
    "patch_size": 2,
    "width": 16,
    "n_layers": 2,
    "heads": 2,
    "cond_dim": 6,
    "freq_shift": 1,
}


def calm(net: nn.Module) -> nn.Module:
    """Weights of a transformer whose answers are of about unit size, as its gates multiply what norms do not hold."""
    with torch.no_grad():
        for layer in shaken(net).modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.weight.mul_(0.5)
    return net


def their_dit() -> nn.Module:
    """With one embedding for all blocks, as every published one has."""
    net = calm(diffusers.DiTTransformer2DModel(**TRANSFORMER))
    for block in net.transformer_blocks:
        block.norm1.emb.load_state_dict(net.transformer_blocks[0].norm1.emb.state_dict())
    return net


def given(channels: int, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, channels, size, size, generator=generator), torch.tensor([0, 311, 999])


@torch.no_grad()
def same(ours: UNet | DiT, embedder: ConditionEmbedder | None, theirs: nn.Module, rows: list[list[int]]) -> None:
    """Equal outputs of both; `rows` has labels of ours, and those of theirs that say the same."""
    x, time = given(*ours.shape[:2])
    cond = None if embedder is None else embedder({"label": torch.tensor(rows[0])}, 3)
    labels = {"class_labels": torch.tensor(rows[1])} if rows else {}
    output = ours(x, time.float(), cond)
    torch.testing.assert_close(output, theirs(x, time, **labels).sample, **CLOSE)
    assert 0.1 < output.std() < 10


@pytest.mark.parametrize("name", UNETS)
def test_their_unets_are_read(name: str, tmp_path: Path) -> None:
    theirs = shaken(diffusers.UNet2DModel(**UNETS[name]))
    theirs.save_pretrained(tmp_path)
    net, embedder = diffusers_nets.read(tmp_path)
    assert not net.training and net.shape[1] == 8 * (1 + (name != "plain"))
    assert (embedder is not None) == (name == "adm")
    same(net, embedder, theirs, [[0, 4, 2]] * 2 if embedder else [])


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "Transformer2DModel"])
def test_their_transformers_are_read(name: str, tmp_path: Path) -> None:
    theirs = their_dit()
    theirs.save_pretrained(tmp_path)
    changed(tmp_path, _class_name=name)
    net, embedder = diffusers_nets.read(tmp_path)
    same(net, embedder, theirs, [[0, 4, 2]] * 2)
    x, time = given(3, 8)
    with torch.no_grad():
        free = theirs(x, time, class_labels=torch.tensor([5, 5, 5])).sample  # the row behind the last label
        torch.testing.assert_close(net(x, time.float(), embedder.null(3)), free, **CLOSE)


OURS: dict[str, tuple[type, dict[str, Any]]] = {
    "unet": (UNet, {}),
    "unet, adm": (UNet, {"scale_shift": True, "resample_in_blocks": True, "head_width": 8, "learned_variance": True}),
    "unet, ddpm": (UNet, {"pad_below": True, "attention": [16], "dropout": 0.1}),
    "unet, adm's times": (UNet, {"freq_shift": 0, "norm_eps": 1e-5, "attention": [], "resample_in_blocks": True}),
    "dit": (DiT, {}),
    "dit of one colour": (DiT, {"image_channels": 1, "learned_variance": True, "mlp_norm_eps": 1e-3, "dropout": 0.2}),
}


def ours(name: str, **changes: Any) -> UNet | DiT:
    kind, options = OURS[name]
    if kind is DiT:
        return calm(DiT(**OUR_DIT | options | changes))
    return shaken(UNet(**OUR_UNET | options | changes))


def embedder_of(conditions: list[str]) -> ConditionEmbedder:
    """Of labels of two things, 2 x 3 of them, whose vectors none is 0."""
    torch.manual_seed(2)
    made = ConditionEmbedder(dim=6, conditions=conditions, n_classes=6, label_factors=[2, 3], n_attributes=4)
    nn.init.normal_(made.null_embedding)
    return made


def theirs_in(folder: Path, net: UNet | DiT) -> nn.Module:
    """diffusers' own reading of a folder, which misses nothing and is told nothing more."""
    kind = diffusers.UNet2DModel if isinstance(net, UNet) else diffusers.DiTTransformer2DModel
    made, told = kind.from_pretrained(folder, output_loading_info=True)
    assert not [names for names in told.values() if names]
    return made


@pytest.mark.parametrize("name", OURS)
def test_what_we_write_they_read(name: str, tmp_path: Path) -> None:
    net, embedder = ours(name), embedder_of(["label"])
    diffusers_nets.write(net, embedder, tmp_path / "new")
    theirs = theirs_in(tmp_path / "new", net)
    same(net, embedder, theirs, [[0, 5, 2]] * 2)
    x, time = given(*net.shape[:2])
    labels = {"label": torch.tensor([0, 5, 2])}
    with torch.no_grad():
        output = net(x, time.float(), embedder(labels, 3))
        free = theirs(x, time, class_labels=torch.tensor([6, 6, 6])).sample
        torch.testing.assert_close(net(x, time.float(), embedder.null(3)), free, **CLOSE)
        again, read = diffusers_nets.read(tmp_path / "new")
        cond = read(labels, 3)
        torch.testing.assert_close(again(x, time.float(), cond), output, **CLOSE)
    if isinstance(net, UNet):
        assert again.parts == net.parts
    else:
        assert again.blocks[0].dropout.p == net.blocks[0].dropout.p
    own = {k: v for k, v in net.state_dict().items() if not k.startswith("cond.")}
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in own.items())


@pytest.mark.parametrize("name", ["unet", "dit"])
@pytest.mark.parametrize("embedded", [True, False])
def test_a_net_without_conditions_goes_there(name: str, embedded: bool, tmp_path: Path) -> None:
    """What an embedder of nothing gives each image is part of the time's embedding there, or of every label."""
    net = ours(name, cond_dim=6 if embedded else None)
    embedder = embedder_of([]) if embedded else None
    diffusers_nets.write(net, embedder, tmp_path)
    x, time = given(*net.shape[:2])
    cond = Condition(embedder.null_embedding.expand(3, -1)) if embedded else None
    labels = {} if name == "unet" else {"class_labels": torch.tensor([0, 1, 0])}
    with torch.no_grad():
        theirs = theirs_in(tmp_path, net)(x, time, **labels).sample
        torch.testing.assert_close(net(x, time.float(), cond), theirs, **CLOSE)


@pytest.mark.parametrize(("name", "changes", "line"), [
    ("unet", {"patch_size": 2}, "model.net.patch_size=2: diffusers has no patches. Fix: model.net.patch_size=1"),
    ("unet", {"multipliers": [2, 2]}, "Fix: model.net.multipliers=[1,...]"),
    ("unet", {"norm_groups": None}, "Fix: model.net.norm_groups=4"),
    ("unet", {"heads": 2, "attention": [16, 8]}, "Fix: model.net.head_width=8"),
    ("dit", {"token_dim": 4}, "token_dim=4: diffusers has no tokens in a net of labels. Fix: model.net.token_dim=null"),
    ("unet", {"plane_channels": 2}, "no planes in a net of labels. Fix: model.net.plane_channels=0"),
    ("dit", {"qk_norm": True}, "Fix: model.net.qk_norm=false"),
    ("dit", {"freq_shift": 0}, "Fix: model.net.freq_shift=1"),
])  # fmt: skip
def test_what_they_have_not_cannot_be_written(name: str, changes: dict[str, Any], line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        diffusers_nets.write(ours(name, **changes), embedder_of(["label"]), tmp_path)
    assert line in caught.value.line() and not list(tmp_path.iterdir())


@pytest.mark.parametrize("conditions", [["label", "attributes"], None])
def test_conditions_that_are_no_labels_cannot_be_written(conditions: list[str] | None, tmp_path: Path) -> None:
    embedder = conditions and embedder_of(conditions)
    with pytest.raises(UserError, match=r"data.conditions=.* labels alone. Fix: data.conditions=\[label\]"):
        diffusers_nets.write(ours("unet"), embedder, tmp_path)


def changed(folder: Path, **config: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def without(folder: Path, name: str) -> None:
    state = load_file(folder / WEIGHTS)
    save_file({key: value for key, value in state.items() if key != name}, folder / WEIGHTS)


def apart(folder: Path) -> None:
    """The second block embeds the time otherwise."""
    state = load_file(folder / WEIGHTS)
    state["transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"] += 1
    save_file(state, folder / WEIGHTS)


@pytest.mark.parametrize(("name", "break_it", "problem"), [
    ("unet", lambda f: changed(f, _class_name="VQModel"), "it holds a VQModel, not a UNet2DModel or a DiTTransformer"),
    ("unet", lambda f: changed(f, time_embedding_type="fourier"), "time_embedding_type=fourier is not supported"),
    ("unet", lambda f: changed(f, block_out_channels=[16, 24]), "are no multiples of the first"),
    ("unet", lambda f: changed(f, time_embedding_dim=32), "are no multiples of the first"),
    ("unet", lambda f: changed(f, up_block_types=["UpBlock2D", "AttnUpBlock2D"]), "is not its way down turned round"),
    ("unet", lambda f: changed(f, down_block_types=["Odd", "AttnDownBlock2D"]), "it has a Odd"),
    ("unet", lambda f: changed(f, down_block_types=["ResnetDownsampleBlock2D", "AttnDownBlock2D"]), "and some are not"),
    ("unet", lambda f: changed(f, resnet_time_scale_shift="spatial"), "resnet_time_scale_shift=spatial"),
    ("unet", lambda f: changed(f, attn_norm_num_groups=2), "the attention in its middle"),
    ("unet", lambda f: changed(f, resnet_time_scale_shift="scale_shift", attn_norm_num_groups=None), "in its middle"),
    ("unet", lambda f: changed(f, norm_num_groups=5, attn_norm_num_groups=5), "norm_groups=5: it does not divide"),
    ("unet", lambda f: changed(f, out_channels=4), "it takes 3 channels and gives 4"),
    ("unet", lambda f: changed(f, out_channels=6), "conv_out.weight has another shape than config.json says: [3, 16"),
    ("unet", lambda f: changed(f, layers_per_block=3), "lacks down_blocks.0.resnets.2."),
    ("unet", lambda f: changed(f, layers_per_block=1), "also holds down_blocks.0.resnets.1."),
    ("unet", lambda f: changed(f, sample_size=[16, 8]), "sample_size=[16, 8] is no side of a square"),
    ("unet", lambda f: changed(f, sample_size=15), "data.image_size=15: 2 levels"),
    ("unet", lambda f: without(f, "class_embedding.weight"), "lacks class_embedding.weight"),
    ("unet", lambda f: (f / CONFIG).write_text('{"_class_name": "UNet2DModel"}'), "has no block_out_channels"),
    ("dit", lambda f: changed(f, activation_fn="geglu"), "activation_fn=geglu is not supported"),
    ("dit", lambda f: changed(f, num_layers=1), "also holds transformer_blocks.1."),
    ("dit", lambda f: changed(f, num_layers=3), "lacks transformer_blocks.2."),
    ("dit", lambda f: changed(f, patch_size=3), "data.image_size=8: patches of 3 do not fill it"),
    ("dit", apart, "linear_1.bias is not that of the first block"),
    ("dit", lambda f: without(f, f"transformer_blocks.0.norm1.emb.{diffusers_nets.DIT_TABLE}"), "is not that of the"),
], ids=lambda part: part if isinstance(part, str) else "")  # fmt: skip
def test_what_cannot_be_read_is_one_line(name: str, break_it: Any, problem: str, tmp_path: Path) -> None:
    diffusers_nets.write(ours(name), embedder_of(["label"]), tmp_path)
    break_it(tmp_path)
    with pytest.raises(UserError) as caught:
        diffusers_nets.read(tmp_path)
    assert caught.value.line().startswith("error: folder=") and problem in str(caught.value)
