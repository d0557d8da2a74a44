"""diffusers' UNet2DConditionModel: the nets of Stable Diffusion 1, 2 and XL read and written, with the same outputs."""

from __future__ import annotations

import inspect
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from atelier.checkpoints import diffusers_conditional
from atelier.checkpoints.diffusers_conditional import CROSS, DEFAULTS, KIND, ONLY, PLAIN
from atelier.checkpoints.diffusers_files import CONFIG, WEIGHTS
from atelier.core.condition import Condition
from atelier.core.errors import UserError
from atelier.nets.unet import UNet
from tests.nets.test_spatial_transformer import shaken

diffusers = pytest.importorskip("diffusers")


def blocks(*attends: int) -> dict[str, list[str]]:
    """The levels on the way down that attend, 1 or 0 each."""
    down, up = ([(CROSS if a else PLAIN).format(way) for a in attends] for way in ("Down", "Up"))
    return {"down_block_types": down, "up_block_types": up[::-1]}


SDXL = {
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    **blocks(0, 1, 1),
}
FULL = {  # config -> parameters and tensors, as published
    "sd1": ({"cross_attention_dim": 768}, 859_520_964, 686),
    "sd1, inpainting": ({"cross_attention_dim": 768, "in_channels": 9}, 859_535_364, 686),
    "sd1, editing": ({"cross_attention_dim": 768, "in_channels": 8}, 859_532_484, 686),
    "sd2": (
        {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
        865_910_724,
        686,
    ),
    "sdxl": (
        SDXL
        | {
            "block_out_channels": [320, 640, 1280],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        2_567_463_684,
        1680,
    ),
}
SMALL = {"sample_size": 8, "norm_num_groups": 4, "cross_attention_dim": 16}
SD1 = SMALL | blocks(1, 1, 1, 0) | {"block_out_channels": [8, 16, 32, 32], "attention_head_dim": 2}
SMALL_XL = {
    "block_out_channels": [8, 16, 32],
    "transformer_layers_per_block": [1, 2, 3],
    "attention_head_dim": [1, 2, 4],
    "cross_attention_dim": 40,
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 20 + 6 * 4,
}
TINY = {
    "sd1": SD1,
    "sd1, inpainting": SD1 | {"in_channels": 9},
    "sd1, editing": SD1 | {"in_channels": 8},
    "sd2": SD1 | {"attention_head_dim": [1, 2, 4, 4], "use_linear_projection": True},
    "sdxl": SMALL | SDXL | SMALL_XL,
    "another": SMALL
    | blocks(1, 1)
    | {
        "sample_size": [4, 4],
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [8, 24],
        "attention_head_dim": [2, 2],
        "transformer_layers_per_block": 2,
        "layers_per_block": 1,
        "downsample_padding": 0,
        "resnet_time_scale_shift": "scale_shift",
        "norm_eps": 1e-4,
        "freq_shift": 1,
        "dropout": 0.1,
    },
}


@cache
def theirs_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return shaken(diffusers.UNet2DConditionModel(**TINY[name]).eval())


def sizes_as_sines(sizes: Tensor, each: int) -> Tensor:
    """Six numbers of each image (B, 6), every one as cosines and then sines (B, 6 each), by the formula in float64."""
    frequencies = torch.tensor([math.exp(-math.log(10_000) * i / (each // 2)) for i in range(each // 2)]).double()
    angles = sizes.double()[:, :, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=2).flatten(1).float()


def given(channels: int, tokens: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, channels, size, size, generator=generator)
    return x, torch.tensor([3, 700]), torch.randn(2, 7, tokens, generator=generator)


@torch.no_grad()
def same(ours: UNet, theirs: nn.Module) -> None:
    """Equal outputs, within 1e-5 of the greatest, of the same noisy channels, planes, tokens and vector."""
    config = theirs.config
    x, time, tokens = given(config.in_channels, config.cross_attention_dim, ours.shape[1])
    vector, added = None, {}
    if config.addition_embed_type:
        each = config.addition_time_embed_dim
        text = torch.randn(2, config.projection_class_embeddings_input_dim - 6 * each)
        sizes = torch.tensor([[1024, 768, 0, 64, 1024, 1024], [300, 200, 10, 0, 512, 512]])
        vector = torch.cat([text, sizes_as_sines(sizes, each)], dim=1)
        added = {"added_cond_kwargs": {"text_embeds": text, "time_ids": sizes}}
    n = ours.shape[0]
    output = ours(x[:, :n], time.float(), Condition(vector=vector, tokens=tokens, planes=x[:, n:]))
    expected = theirs(x, time, encoder_hidden_states=tokens, **added).sample
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert output.std() > 0.05


def of_folder(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS)


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """The same names, each with the same shape and bits."""
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("name", FULL)
def test_tensors_of_the_published_sizes(name: str) -> None:
    """Names, shapes and number of parameters, on the meta device."""
    config, n_parameters, n_tensors = FULL[name]
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(**config).state_dict()
    shapes = diffusers_conditional.shapes(Path(name), config | {"sample_size": 64}, diffusers_conditional._refused)
    assert shapes == {key: list(value.shape) for key, value in theirs.items()}
    assert sum(math.prod(shape) for shape in shapes.values()) == n_parameters and len(shapes) == n_tensors


@pytest.mark.parametrize("name", TINY)
def test_their_nets_are_read_and_written(name: str, tmp_path: Path) -> None:
    """Same outputs, and the folder that is written again has the same tensors to the bit, and the same config."""
    theirs = theirs_of(name)
    theirs.save_pretrained(tmp_path / "theirs")
    net = diffusers_conditional.read(tmp_path / "theirs")
    assert not net.training and all(p.requires_grad and p.device.type == "cpu" for p in net.parameters())
    same(net, theirs)
    diffusers_conditional.write(net, tmp_path / "ours", size_dim=4)
    equal(of_folder(tmp_path / "ours"), of_folder(tmp_path / "theirs"))
    again, told = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not [names for names in told.values() if names]
    kept = {key: value for key, value in again.config.items() if not key.startswith("_")}
    wanted = {key: value for key, value in theirs.config.items() if not key.startswith("_")}
    if name == "another":  # written as one number
        wanted |= {"attention_head_dim": 2, "sample_size": 4}
    assert kept == wanted
    same(net, again)


OURS: dict[str, dict[str, Any]] = {
    "heads by number": {"heads": 2, "plane_channels": 5},
    "heads by width": {"head_width": 8, "attention": [4], "depths": [1, 2]},
    "a vector": {"head_width": 8, "cond_dim": 20, "deep_cond": True, "freq_shift": 0},
    "otherwise": {"scale_shift": True, "pad_below": True, "norm_eps": 1e-6, "freq_shift": 1, "multipliers": [1, 2, 2]},
}


def ours_of(**options: Any) -> UNet:
    torch.manual_seed(0)
    plain = {"image_size": 8, "image_channels": 4, "width": 8, "multipliers": [1, 2], "n_blocks": 2, "token_dim": 16}
    return shaken(UNet(**plain | {"attention": [8, 4], "norm_groups": 4} | options).eval())


@pytest.mark.parametrize("linear", [True, False, None])
@pytest.mark.parametrize("name", OURS)
def test_what_we_write_they_read(name: str, linear: bool | None, tmp_path: Path) -> None:
    net = ours_of(**OURS[name])
    diffusers_conditional.write(net, tmp_path, linear, size_dim=2)
    theirs, told = diffusers.UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not [names for names in told.values() if names]
    assert theirs.config.use_linear_projection == (("head_width" in OURS[name]) if linear is None else linear)
    same(net, theirs)
    again = diffusers_conditional.read(tmp_path)
    equal(again.state_dict(), net.state_dict())
    assert again.parts == net.parts and again.cond_sizes == net.cond_sizes and again.shape == net.shape


def test_defaults_are_diffusers_own() -> None:
    """Of every key of its config, and none is unknown."""
    signature = inspect.signature(diffusers.UNet2DConditionModel.__init__).parameters.values()
    theirs = {p.name: list(p.default) if isinstance(p.default, tuple) else p.default for p in signature}
    theirs.pop("self")
    assert DEFAULTS | {key: choices[0] for key, choices in ONLY.items()} == theirs


def test_another_size_and_halves(tmp_path: Path) -> None:
    """The maps may be of another size than the config says; halves become floats."""
    diffusers_conditional.write(ours_of(), tmp_path)
    halves = {name: value.half() for name, value in of_folder(tmp_path).items()}
    save_file(halves, tmp_path / WEIGHTS)
    net = diffusers_conditional.read(tmp_path, image_size=16)
    assert net.shape == (4, 16, 16) and all(p.dtype == torch.float32 for p in net.parameters())
    diffusers_conditional.write(net, tmp_path / "again")
    equal(of_folder(tmp_path / "again"), {name: value.float() for name, value in halves.items()})


@pytest.mark.parametrize(("changes", "line"), [
    ({"token_dim": None}, "diffusers has no such net without tokens. Fix: model.net.token_dim=768"),
    ({"patch_size": 2, "attention": None}, "diffusers has no patches. Fix: model.net.patch_size=1"),
    ({"multipliers": [2, 2]}, "Fix: model.net.multipliers=[1,...]"),
    ({"norm_groups": None}, "Fix: model.net.norm_groups=2"),
    ({"learned_variance": True}, "Fix: model.net.learned_variance=false"),
    ({"resample_in_blocks": True}, "Fix: model.net.resample_in_blocks=false"),
    ({"cond_dim": 5}, "diffusers has no single layer for a vector beside tokens. Fix: model.net.deep_cond=true"),
    (
        {"cond_dim": 15, "deep_cond": True},
        "diffusers has no other frequencies of the sizes than of the time. Fix: model.net.freq_shift=0",
    ),
    (
        {"cond_dim": 15, "deep_cond": True, "freq_shift": 0},
        "size_dim=256: 6 sizes leave none of the net's 15 numbers to a text. Fix: size_dim=2",
    ),
])  # fmt: skip
def test_what_they_have_not_cannot_be_written(changes: dict[str, Any], line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        diffusers_conditional.write(ours_of(**changes), tmp_path)
    assert line in caught.value.line() and not list(tmp_path.iterdir())


def changed(folder: Path, **config: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def reshaped(folder: Path, name: str, *shape: int) -> None:
    """One tensor of another shape; gone where there is none."""
    state = of_folder(folder)
    state.pop(name, None)
    save_file(state | ({name: torch.zeros(shape)} if shape else {}), folder / WEIGHTS)


def pickled(folder: Path) -> None:
    torch.save(of_folder(folder), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()


KEY = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v.weight"
PROJ = "mid_block.attentions.0.proj_in.weight"


@pytest.mark.parametrize(("break_it", "problem"), [
    (lambda f: changed(f, _class_name="UNet2DModel"), "it holds a UNet2DModel, not a UNet2DConditionModel"),
    (lambda f: changed(f, class_embed_type="projection"), "class_embed_type=projection is not supported, only None"),
    (lambda f: changed(f, addition_embed_type="text"), "addition_embed_type=text is not supported, only None or text_"),
    (lambda f: changed(f, encoder_hid_dim_type="text_proj"), "encoder_hid_dim_type=text_proj is not supported"),
    (lambda f: changed(f, time_cond_proj_dim=256), "time_cond_proj_dim=256 is not supported, only None"),
    (lambda f: changed(f, resnet_time_scale_shift="spatial"), "resnet_time_scale_shift=spatial is not supported"),
    (lambda f: changed(f, new_idea=3), "new_idea=3 is not known"),
    (lambda f: changed(f, layers_per_block=[1, 2]), "layers_per_block=[1, 2] is no whole number from 1 up"),
    (lambda f: changed(f, in_channels="four"), "in_channels=four is no whole number"),
    (lambda f: changed(f, out_channels=8), "it takes 4 channels and gives 8"),
    (lambda f: changed(f, block_out_channels=None), "block_out_channels=None are no widths"),
    (lambda f: changed(f, block_out_channels=[8, 12]), "are no multiples of the first"),
    (lambda f: changed(f, time_embedding_dim=16), "are no multiples of the first"),
    (lambda f: changed(f, down_block_types=["Odd", "DownBlock2D"]), "it has a Odd"),
    (lambda f: changed(f, **blocks(1)), "its way up is not its way down turned round"),
    (lambda f: changed(f, up_block_types=None), "its way up is not its way down turned round"),
    (lambda f: changed(f, cross_attention_dim=[16, 8]), "cross_attention_dim=[8, 16], not one number"),
    (lambda f: changed(f, transformer_layers_per_block=[1]), "transformer_layers_per_block=[1] is no number, nor 2"),
    (lambda f: changed(f, transformer_layers_per_block=[[1], [1]]), "is no number, nor 2 of them"),
    (lambda f: changed(f, attention_head_dim=[1, 4]), "attention_head_dim=[1, 4] is neither one number of heads"),
    (lambda f: changed(f, attention_head_dim=3), "heads=3: attention over 8 channels needs a divisor"),
    (lambda f: changed(f, norm_num_groups=3), "norm_groups=3: it does not divide the width 8"),
    (lambda f: changed(f, sample_size=None), "sample_size=None is no side of a square"),
    (lambda f: changed(f, sample_size=[8, 4]), "sample_size=[8, 4] is no side of a square"),
    (lambda f: changed(f, sample_size=7), "data.image_size=7: 2 levels"),
    (lambda f: changed(f, addition_time_embed_dim=4), "a vector of 20 numbers holds no text and 6 sizes of 4"),
    (lambda f: changed(f, projection_class_embeddings_input_dim=None), "a vector of None numbers holds no text"),
    (lambda f: changed(f, freq_shift=1), "freq_shift=1 is not supported beside sizes, only 0"),
    (lambda f: changed(f, use_linear_projection=False), "attentions.0.proj_in.weight is no 1x1 convolution: [8, 8]"),
    (lambda f: changed(f, addition_embed_type=None), "also holds add_embedding.linear_1.bias"),
    (lambda f: reshaped(f, KEY), f"lacks {KEY}"),
    (lambda f: reshaped(f, "label_emb.weight", 3), "also holds label_emb.weight"),
    (lambda f: reshaped(f, KEY, 16, 15), f"{KEY} has another shape than config.json says: [16, 15]"),
    (lambda f: reshaped(f, PROJ, 16, 16, 1, 1), f"{PROJ} has another shape than config.json says: [16, 16, 1, 1]"),
    (lambda f: reshaped(f, "conv_in.weight", 8, 9, 3, 3), "conv_in.weight has another shape than config.json says:"),
    (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), "is cut"),
    (pickled, "pickled weights (.bin) are not read"),
], ids=lambda part: part if isinstance(part, str) else "")  # fmt: skip
def test_what_cannot_be_read_is_one_line(break_it: Any, problem: str, tmp_path: Path) -> None:
    diffusers_conditional.write(ours_of(**OURS["a vector"]), tmp_path, size_dim=2)
    break_it(tmp_path)
    with pytest.raises(UserError) as caught:
        diffusers_conditional.read(tmp_path)
    line = caught.value.line()
    assert line.startswith("error: folder=") and problem in str(caught.value)
    assert len(line) <= 200 and KIND in str(caught.value)
