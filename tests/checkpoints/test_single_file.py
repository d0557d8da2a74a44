"""Single files of Stable Diffusion: names by rule, full size and tiny, as diffusers reads them, and back to the bit."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from atelier.checkpoints import single_file
from atelier.checkpoints.single_file_layout import PREFIXES, Version, layout
from tests.checkpoints.test_diffusers_unet_conditional import FULL, TINY, equal
from tests.nets.test_spatial_transformer import shaken

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
theirs = pytest.importorskip("diffusers.loaders.single_file_utils")

Parts = dict[str, dict[str, Tensor]]
FULL_VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32}
SMALL_VAE = {"block_out_channels": [8, 8, 16, 16], "layers_per_block": 1, "norm_num_groups": 4}
BOTH_VAE = {
    "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
CLIP = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
OPEN_H = {"hidden_size": 1024, "num_hidden_layers": 23, "num_attention_heads": 16, "intermediate_size": 4096}
OPEN_G = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 20, "intermediate_size": 5120}
SMALL_CLIP = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
SMALL_CLIP |= {"vocab_size": 40, "max_position_embeddings": 9}
SMALL_G = SMALL_CLIP | {"hidden_size": 24, "projection_dim": 20}
CLASSES = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
TEXTS: dict[str, list[dict[str, Any]]] = {  # of each version, full and small
    "sd1": [{"text_encoder": CLIP}, {"text_encoder": SMALL_CLIP}],
    "sd2": [{"text_encoder": OPEN_H | {"hidden_act": "gelu"}}, {"text_encoder": SMALL_CLIP}],
    "sdxl": [
        {"text_encoder": CLIP, "text_encoder_2": OPEN_G | {"hidden_act": "gelu", "projection_dim": 1280}},
        {"text_encoder": SMALL_CLIP, "text_encoder_2": SMALL_G},
    ],
}
NAMES = ("sd1", "sd1, inpainting", "sd1, editing", "sd2", "sdxl")


def version_of(name: str) -> Version:
    return name.partition(",")[0]


def text(part: str, config: dict[str, Any]) -> nn.Module:
    own = transformers.CLIPTextConfig(**config, bos_token_id=38, eos_token_id=39)
    return getattr(transformers, CLASSES[part])(own)


@cache
def full(name: str) -> dict[str, nn.Module]:
    """A whole model of the published size, on the meta device."""
    with torch.device("meta"):
        texts = {part: text(part, config) for part, config in TEXTS[version_of(name)][0].items()}
        unet, vae = diffusers.UNet2DConditionModel(**FULL[name][0]), diffusers.AutoencoderKL(**FULL_VAE | BOTH_VAE)
    return {"unet": unet, "vae": vae, **texts}


@cache
def tiny(name: str) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    texts = {part: text(part, config) for part, config in TEXTS[version_of(name)][1].items()}
    unet, vae = diffusers.UNet2DConditionModel(**TINY[name]), diffusers.AutoencoderKL(**SMALL_VAE | BOTH_VAE)
    return {part: shaken(net.eval()) for part, net in {"unet": unet, "vae": vae, **texts}.items()}


def parts_of(model: dict[str, nn.Module]) -> Parts:
    return {part: net.state_dict() for part, net in model.items()}


def whole(part: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of a text encoder as older programs want them, and as ours are."""
    plain = part != "text_encoder" or any(name.startswith("text_model.") for name in state)
    return state if plain else {f"text_model.{name}": value for name, value in state.items()}


def converted(name: str, part: str, net: nn.Module, file: dict[str, Tensor]) -> dict[str, Tensor]:
    """What diffusers' own reader makes of a part of a file's tensors."""
    if part == "unet":
        return theirs.convert_ldm_unet_checkpoint(dict(file), config=dict(net.config))
    if part == "vae":
        return theirs.convert_ldm_vae_checkpoint(dict(file), config=dict(net.config))
    prefix = PREFIXES[version_of(name)][part]
    if prefix.endswith("transformer."):
        return theirs.convert_ldm_clip_checkpoint(dict(file), remove_prefix=prefix)
    return theirs.convert_open_clip_checkpoint(getattr(net, "text_model", net), dict(file), prefix=prefix)


@pytest.mark.parametrize("name", NAMES)
def test_names_of_the_published_sizes(name: str) -> None:
    """One to one with diffusers' own, which its converters make of ours again, each with its shape; and its configs."""
    model = full(name)
    sizes = {p: {n: list(v.shape) for n, v in whole(p, state).items()} for p, state in parts_of(model).items()}
    found = layout(Path(name), sizes, single_file._refused)
    assert found.shapes == sizes and found.naming.version == version_of(name)
    for part, net in model.items():
        places = found.places(part)
        assert sorted(name for held in places.values() for name in held) == sorted(sizes[part])
        file = {key: torch.empty(found.shape(part, held), device="meta") for key, held in places.items()}
        again = {n: list(v.shape) for n, v in whole(part, converted(name, part, net, file)).items()}
        assert {n: shape[:2] if "vae" in part and ".to_" in n else shape for n, shape in again.items()} == sizes[part]
        config = net.config if part in ("unet", "vae") else net.config.to_dict()
        own = {k: v for k, v in found.configs[part].items() if k not in TOLD_OTHERWISE and not k.startswith("_")}
        assert own == {key: list(config[key]) if isinstance(config[key], tuple) else config[key] for key in own}


TOLD_OTHERWISE = {"sample_size", "scaling_factor", "bos_token_id", "eos_token_id", "architectures", "model_type"}
TALES = {  # of a name in the file -> the name in diffusers, in versions 1 and XL
    "sd1": {
        "input_blocks.0.0.weight": "conv_in.weight",
        "input_blocks.1.0.in_layers.0.weight": "down_blocks.0.resnets.0.norm1.weight",
        "input_blocks.3.0.op.bias": "down_blocks.0.downsamplers.0.conv.bias",
        "input_blocks.8.1.proj_in.weight": "down_blocks.2.attentions.1.proj_in.weight",
        "input_blocks.10.0.emb_layers.1.weight": "down_blocks.3.resnets.0.time_emb_proj.weight",
        "middle_block.2.out_layers.3.bias": "mid_block.resnets.1.conv2.bias",
        "output_blocks.2.1.conv.weight": "up_blocks.0.upsamplers.0.conv.weight",
        "output_blocks.5.2.conv.weight": "up_blocks.1.upsamplers.0.conv.weight",
        "output_blocks.11.0.skip_connection.weight": "up_blocks.3.resnets.2.conv_shortcut.weight",
        "time_embed.2.weight": "time_embedding.linear_2.weight",
        "out.2.weight": "conv_out.weight",
    },
    "sdxl": {
        "input_blocks.3.0.op.weight": "down_blocks.0.downsamplers.0.conv.weight",
        "input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": (
            "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k.weight"
        ),
        "label_emb.0.2.bias": "add_embedding.linear_2.bias",
        "output_blocks.2.2.conv.weight": "up_blocks.0.upsamplers.0.conv.weight",
    },
}


@pytest.mark.parametrize("name", TALES)
def test_names_that_are_known_by_heart(name: str) -> None:
    """Of published files, which need neither diffusers nor the inverse."""
    sizes = {p: {n: list(v.shape) for n, v in whole(p, s).items()} for p, s in parts_of(full(name)).items()}
    naming = layout(Path(name), sizes, single_file._refused).naming
    for key, known in TALES[name].items():
        assert naming.key("unet", known) == f"model.diffusion_model.{key}" and naming.held("unet", key) == [known]
    vae = {
        "decoder.up.3.block.2.conv1.weight": "decoder.up_blocks.0.resnets.2.conv1.weight",
        "decoder.up.1.upsample.conv.bias": "decoder.up_blocks.2.upsamplers.0.conv.bias",
        "encoder.mid.attn_1.proj_out.weight": "encoder.mid_block.attentions.0.to_out.0.weight",
        "encoder.down.1.block.0.nin_shortcut.weight": "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
        "post_quant_conv.bias": "post_quant_conv.bias",
    }
    for key, known in vae.items():
        assert naming.key("vae", known) == f"first_stage_model.{key}" and naming.held("vae", key) == [known]


@pytest.mark.parametrize("name", NAMES)
def test_what_we_write_they_read(name: str, tmp_path: Path) -> None:
    """`from_single_file` of each part, with the configs of a folder: all tensors are equal; so are those we read."""
    model, file = tiny(name), tmp_path / "model.safetensors"
    for part, net in model.items():
        net.config.save_pretrained(tmp_path / part) if "text" in part else net.save_config(tmp_path / part)
    single_file.write(file, parts_of(model))
    for part, kind in (("unet", diffusers.UNet2DConditionModel), ("vae", diffusers.AutoencoderKL)):
        made = kind.from_single_file(str(file), config=str(tmp_path), subfolder=part, local_files_only=True)
        equal(made.state_dict(), model[part].state_dict())
    for part in [part for part in model if "text" in part]:
        state = load_file(file)
        kind = getattr(transformers, CLASSES[part])
        made = theirs.create_diffusers_clip_model_from_ldm(kind, state, part, str(tmp_path), local_files_only=True)
        equal(made.state_dict(), model[part].state_dict())
    found = single_file.read(file)
    task = {"inpainting": "inpaint", "editing": "edit"}.get(name.partition(", ")[2], "text")
    assert (found.version, found.task, found.passed_over) == (version_of(name), task, [])
    parts = {part: found.tensors(part) for part in model}
    for part, net in model.items():
        equal(parts[part], whole(part, net.state_dict()))
    single_file.write(tmp_path / "again.safetensors", parts)
    equal(load_file(tmp_path / "again.safetensors"), load_file(file))
