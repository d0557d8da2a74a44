"""Single files of Stable Diffusion: names by rule, full size and tiny, as diffusers reads them, and back to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from atelier.checkpoints import (
    diffusers_conditional,
    diffusers_folder,
    diffusers_scheduler,
    single_file,
    transformers_folder,
)
from atelier.checkpoints.single_file_layout import PREFIXES, Version, described
from atelier.core.errors import UserError
from atelier.diffusion.schedules import ScaledLinear
from atelier.diffusion.targets import Epsilon, Velocity
from tests.checkpoints.test_diffusers_unet_conditional import FULL, SDXL, SMALL, TINY, blocks, equal, same
from tests.checkpoints.test_transformers_folder import MERGES, ROWS
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
    found = described(Path(name), sizes, single_file._refused)
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
    naming = described(Path(name), sizes, single_file._refused).naming
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


PIPELINES = {
    "sd1": "StableDiffusionPipeline",
    "sd1, inpainting": "StableDiffusionInpaintPipeline",
    "sd1, editing": "StableDiffusionInstructPix2PixPipeline",
    "sd2": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
}


def pipeline_in(folder: Path, name: str) -> type:
    """The tiny model as a folder of diffusers, with a tokenizer; the class that reads it."""
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(ROWS))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES))
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    tokenizer, model = transformers.CLIPTokenizer(*files, model_max_length=9), tiny(name)
    beside = {"tokenizer_2": tokenizer} if name == "sdxl" else UNCHECKED | {"requires_safety_checker": False}
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    kind = getattr(diffusers, PIPELINES[name])
    kind(scheduler=scheduler, tokenizer=tokenizer, **model, **beside).save_pretrained(folder)
    return kind


UNCHECKED = {"safety_checker": None, "feature_extractor": None}


@pytest.mark.parametrize("name", NAMES)
def test_what_we_write_they_read(name: str, tmp_path: Path) -> None:
    """`from_single_file`, with the configs of a folder: all tensors are equal; so are those that we read."""
    model, file = tiny(name), tmp_path / "model.safetensors"
    kind = pipeline_in(tmp_path / "folder", name)
    single_file.write(file, parts_of(model))
    beside = {} if name == "sdxl" else UNCHECKED
    made = kind.from_single_file(str(file), config=str(tmp_path / "folder"), local_files_only=True, **beside)
    for part, net in model.items():
        equal(getattr(made, part).state_dict(), net.state_dict())
    found = single_file.read(file)
    task = {"inpainting": "inpaint", "editing": "edit"}.get(name.partition(", ")[2], "text")
    assert (found.version, found.task, found.passed_over) == (version_of(name), task, places_of(name))
    parts = {part: found.tensors(part) for part in model}
    for part, net in model.items():
        equal(parts[part], whole(part, net.state_dict()))
    single_file.write(tmp_path / "again.safetensors", parts)
    equal(load_file(tmp_path / "again.safetensors"), load_file(file))


def places_of(name: str) -> list[str]:
    """The tensor that numbers the places of OpenAI's encoder, which older programs ask for and none reads."""
    front = {"sd1": "cond_stage_model.transformer.", "sdxl": "conditioner.embedders.0.transformer."}
    return [f"{front[version]}text_model.embeddings.position_ids"] if (version := version_of(name)) in front else []


def written(file: Path, name: str = "sd1", half: bool = False) -> dict[str, Tensor]:
    """A tiny model in a file, and its tensors by their names in it."""
    single_file.write(file, parts_of(tiny(name)))
    state = load_file(file)
    if half:
        state = {key: value.half() for key, value in state.items()}
        save_file(state, file)
    return state


BESIDE = (  # what published files hold beside the model
    "model_ema.diffusion_modelinput_blocks00weight",
    "model_ema.decay",
    "betas",
    "alphas_cumprod_prev",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_mean_coef2",
    "cond_stage_model.transformer.text_model.embeddings.position_ids",
)


def test_what_published_files_hold_beside_it_is_passed_over(tmp_path: Path) -> None:
    """And told; halves stay halves."""
    state = written(tmp_path / "a.safetensors", half=True)
    save_file(state | {key: torch.zeros(2) for key in BESIDE}, tmp_path / "b.safetensors")
    plain, found = single_file.read(tmp_path / "a.safetensors"), single_file.read(tmp_path / "b.safetensors")
    assert (plain.passed_over, found.passed_over) == (places_of("sd1"), sorted(BESIDE))
    for part in found.configs:
        equal(found.tensors(part), plain.tensors(part))
    assert found.tensors("vae")["quant_conv.bias"].dtype == torch.float16


def test_the_last_block_of_version_2_is_passed_over(tmp_path: Path) -> None:
    """Of a published text encoder, whose tokens are those before it: it has a projection."""
    file, prefix = tmp_path / "a.safetensors", PREFIXES["sd2"]["text_encoder"]
    state = written(file, "sd2")
    last = {key.replace("resblocks.2.", "resblocks.3."): value for key, value in state.items() if "resblocks.2." in key}
    last |= {f"{prefix}text_projection": torch.zeros(16, 16), f"{prefix}logit_scale": torch.zeros(())}
    save_file(state | {key: value.clone() for key, value in last.items()}, file)
    found = single_file.read(file)
    assert found.passed_over == sorted(last) and found.configs["text_encoder"]["num_hidden_layers"] == 3
    equal(found.tensors("text_encoder"), whole("text_encoder", tiny("sd2")["text_encoder"].state_dict()))


WIDE: dict[str, dict[str, Any]] = {  # of widths that the published heads and groups divide
    "sd1": SMALL | blocks(1, 0) | {"block_out_channels": [32, 64], "norm_num_groups": 32, "in_channels": 9},
    "sd2": SMALL
    | blocks(1, 0)
    | {
        "block_out_channels": [64, 128],
        "attention_head_dim": [1, 2],
        "norm_num_groups": 32,
        "use_linear_projection": True,
    },
    "sdxl": SMALL
    | SDXL
    | blocks(0, 1)
    | {
        "block_out_channels": [64, 128],
        "attention_head_dim": [1, 2],
        "norm_num_groups": 32,
        "transformer_layers_per_block": [1, 2],
        "cross_attention_dim": 40,
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 44,
    },
}


WIDE_TEXT = {"hidden_size": 64, "num_attention_heads": 1, "vocab_size": len(ROWS)}
WIDE_TEXT_2 = {"hidden_size": 128, "num_attention_heads": 2, "hidden_act": "gelu"}


@cache
def wide(name: Version) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    vae = SMALL_VAE | BOTH_VAE | {"block_out_channels": [32] * 4, "norm_num_groups": 32}
    texts = {"text_encoder": text("text_encoder", SMALL_CLIP | WIDE_TEXT | {"hidden_act": ACTIVATIONS[name]})}
    if name == "sdxl":
        texts["text_encoder_2"] = text("text_encoder_2", SMALL_G | WIDE_TEXT_2)
    unet = diffusers.UNet2DConditionModel(**WIDE[name] | {"layers_per_block": 1})
    model = {"unet": unet, "vae": diffusers.AutoencoderKL(**vae), **texts}
    return {part: shaken(net.eval()) for part, net in model.items()}


ACTIVATIONS = {"sd1": "quick_gelu", "sd2": "gelu", "sdxl": "quick_gelu"}


@pytest.mark.parametrize("name", WIDE)
def test_its_u_net_gives_the_same(name: Version, tmp_path: Path) -> None:
    """With the heads and groups that were published, which no shape tells."""
    single_file.write(tmp_path / "a.safetensors", parts_of(wide(name)))
    found = single_file.read(tmp_path / "a.safetensors")
    assert found.task == ("inpaint" if name == "sd1" else "text")
    assert found.unet().shape == (4, *[{"sd1": 64, "sd2": 96, "sdxl": 128}[name]] * 2)
    same(found.unet(image_size=8), wide(name)["unet"])


@torch.no_grad()
@pytest.mark.parametrize("name", WIDE)
def test_folders_of_its_parts_give_the_same(name: Version, tmp_path: Path) -> None:
    """Read by us, and by diffusers and transformers with nothing missing and nothing more."""
    model = wide(name)
    single_file.write(tmp_path / "a.safetensors", parts_of(model))
    single_file.read(tmp_path / "a.safetensors").unpack(tmp_path)
    same(diffusers_conditional.read(tmp_path / "unet", image_size=8), model["unet"])
    z = torch.randn(1, 4, 2, 2)
    pixels = model["vae"].decode(z).sample
    torch.testing.assert_close(diffusers_folder.read(tmp_path / "vae").decode(z), pixels, rtol=0, atol=1e-5)
    made = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae")
    equal(made.state_dict(), model["vae"].state_dict())
    assert made.config.scaling_factor == {"sdxl": 0.13025}.get(name, 0.18215)
    rows = torch.tensor([[5, 6, 7, 2]])
    for part in [part for part in model if "text" in part]:
        made, told = getattr(transformers, CLASSES[part]).from_pretrained(tmp_path / part, output_loading_info=True)
        assert not [names for names in told.values() if names]
        states = model[part](rows, output_hidden_states=True)
        torch.testing.assert_close(made(rows, output_hidden_states=True).hidden_states, states.hidden_states)
        (tmp_path / part / "vocab.json").write_text(json.dumps(ROWS))
        (tmp_path / part / "merges.txt").write_text("\n".join(MERGES))
        ours = transformers_folder.text_encoder(str(tmp_path / part), layer="penultimate", final_norm=False)
        torch.testing.assert_close(ours(rows).tokens, states.hidden_states[-2], rtol=0, atol=1e-5)


Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def without(key: str) -> Change:
    return lambda state: {name: value for name, value in state.items() if name != key}


def put(key: str, *shape: int) -> Change:
    return lambda state: state | {key: torch.zeros(shape)}


def both(*changes: Change) -> Change:
    def made(state: dict[str, Tensor]) -> dict[str, Tensor]:
        for change in changes:
            state = change(state)
        return state

    return made


U, V, T1 = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."
TO_K = f"{U}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
Q = f"{V}decoder.mid.attn_1.q.weight"
G = "conditioner.embedders.1.model."


def refiner(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The second encoder alone, in the first one's place."""
    first = "conditioner.embedders.0."
    kept = {key: value for key, value in state.items() if not key.startswith(first)}
    return {key.replace("conditioner.embedders.1.", first): value for key, value in kept.items()}


@pytest.mark.parametrize(("name", "change", "problem"), [
    ("sd1", without(TO_K), f"it lacks {TO_K}"),
    ("sd1", without(f"{U}input_blocks.0.0.weight"), f"it lacks {U}input_blocks.0.0.weight"),
    ("sd1", without(f"{U}input_blocks.4.0.in_layers.2.weight"), f"it lacks {U}input_blocks.4.0.in_layers.2.weight"),
    ("sd1", without(f"{U}output_blocks.5.2.conv.bias"), f"it lacks {U}output_blocks.5.2.conv.bias"),
    ("sd1", without(f"{V}decoder.conv_out.weight"), f"it lacks {V}decoder.conv_out.weight"),
    ("sd1", without(f"{V}encoder.down.1.block.0.norm1.bias"), f"it lacks {V}encoder.down.1.block.0.norm1.bias"),
    ("sd1", without(f"{T1}encoder.layers.1.mlp.fc1.bias"), f"it lacks {T1}encoder.layers.1.mlp.fc1.bias"),
    ("sd1", without(f"{T1}embeddings.token_embedding.weight"), f"it lacks {T1}embeddings.token_embedding.weight"),
    ("sdxl", without(f"{G}text_projection"), f"it lacks {G}text_projection"),
    ("sdxl", without(f"{G}transformer.resblocks.0.attn.in_proj_bias"), "lacks conditioner.embedders.1.model.transf"),
    ("sdxl", without(f"{U}label_emb.0.0.weight"), f"it lacks {U}label_emb.0.0.weight"),
    ("sd1", put("control_model.zero_convs.0.0.weight", 2), "it also holds control_model.zero_convs.0.0.weight"),
    ("sd1", put(f"{U}output_blocks.5.1.conv.bias", 2), f"it also holds {U}output_blocks.5.1.conv.bias"),
    ("sd1", put(f"{U}input_blocks.4.2.norm.bias", 2), f"it also holds {U}input_blocks.4.2.norm.bias"),
    ("sd1", put(f"{V}encoder.down.0.attn.0.q.weight", 8, 8, 1, 1), f"it also holds {V}encoder.down.0.attn.0.q.weight"),
    ("sdxl", put(f"{G}visual.proj", 2), f"it also holds {G}visual.proj"),
    ("sd1", put(TO_K, 16, 17), f"{TO_K} has shape [16, 17], not [16, 16]"),
    ("sd1", put(Q, 16, 16), f"{Q} has shape [16, 16], not [16, 16, 1, 1]"),
    ("sdxl", put(f"{G}text_projection", 24, 21), "a vector of 44 numbers is no text of 21 and 6 sizes"),
    ("sdxl", put(f"{G}transformer.resblocks.0.attn.in_proj_bias", 71), "in_proj_bias has shape [71], not [72]"),
    ("sd1", put(f"{U}input_blocks.0.0.weight", 8, 7, 3, 3), "its U-Net takes 7 channels, not 4, 8 or 9"),
    ("sd1", put(f"{U}input_blocks.0.0.weight", 8, 3, 3, 3), "it takes 3 channels and gives 4"),
    ("sd1", lambda state: {key: v for key, v in state.items() if not key.startswith(U)}, "it holds no U-Net"),
    ("sd1", lambda state: {key: v for key, v in state.items() if not key.startswith(V)}, f"it lacks {V}"),
    ("sd1", lambda state: {key.replace(T1, G): v for key, v in state.items()}, f"it lacks {T1}"),
    ("sdxl", refiner, "it is SDXL's refiner, which reads one text encoder and an aesthetic score, not two encoders"),
], ids=lambda part: part if isinstance(part, str) else "")  # fmt: skip
def test_a_file_that_is_another_is_refused(name: str, change: Change, problem: str, tmp_path: Path) -> None:
    """By the name of the tensor that is missing, too many or of another shape."""
    file = tmp_path / "a.safetensors"
    save_file(change(written(file, name)), file)
    with pytest.raises(UserError) as caught:
        single_file.read(file)
    assert problem in str(caught.value) and len(caught.value.line()) <= 200


@pytest.mark.parametrize(("file", "content", "problem"), [
    ("a.ckpt", b"", "it is no .safetensors; pickled weights (.ckpt, .pt) are not read"),
    ("a.pt", b"", "pickled weights"),
    ("a.safetensors", None, "it cannot be read"),
    ("a.safetensors", b"PK\x03\x04 and so on, as torch.save writes", "it is cut, or no .safetensors"),
])  # fmt: skip
def test_what_is_no_safetensors_is_never_read(file: str, content: bytes | None, problem: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError) as caught:
        single_file.read(tmp_path / file)
    assert problem in str(caught.value)


def with_part(part: str, change: Change) -> Callable[[Parts], Parts]:
    return lambda parts: parts | {part: change(parts[part])}


@pytest.mark.parametrize(("change", "problem"), [
    (lambda parts: {name: parts[name] for name in ("unet", "vae")}, "text_encoder lacks text_model.embeddings.token_"),
    (lambda parts: parts | {"text_encoder_2": parts["text_encoder"]}, "sd1 has no text_encoder_2"),
    (with_part("unet", without("conv_in.bias")), "unet lacks conv_in.bias"),
    (with_part("vae", put("quantize.weight", 3)), "vae also holds quantize.weight"),
    (with_part("unet", put("conv_in.bias", 9)), "conv_in.bias has shape [9], not [8]"),
    (with_part("text_encoder", without("encoder.layers.1.self_attn.q_proj.bias")), "lacks text_model.encoder.layers.1"),
], ids=lambda part: part if isinstance(part, str) else "")  # fmt: skip
def test_parts_that_do_not_fit_are_not_written(change: Callable[[Parts], Parts], problem: str, tmp_path: Path) -> None:
    parts = {part: whole(part, state) for part, state in parts_of(tiny("sd1")).items()}
    parts["text_encoder"] = {n.removeprefix("text_model."): value for n, value in parts["text_encoder"].items()}
    with pytest.raises(UserError) as caught:
        single_file.write(tmp_path / "a.safetensors", change(parts))
    assert problem in str(caught.value) and not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="pickled"):
        single_file.write(tmp_path / "a.ckpt", parts)


@pytest.mark.parametrize(("said", "wanted", "kind"), [
    ({"modelspec.prediction_type": "v"}, "v", Velocity), ({"modelspec.prediction_type": "epsilon"}, "eps", Epsilon),
    ({"modelspec.prediction_type": "other"}, None, None), (None, None, None),
])  # fmt: skip
def test_a_file_may_say_its_target(
    said: dict[str, str] | None, wanted: str | None, kind: type | None, tmp_path: Path
) -> None:
    """Which makes a scheduler beside the parts; of most files none is made."""
    file = tmp_path / "a.safetensors"
    save_file(written(file, "sd2"), file, metadata=said)
    found = single_file.read(file)
    assert found.target == single_file.target(file) == wanted
    found.unpack(tmp_path / "parts")
    assert (tmp_path / "parts/scheduler").exists() == (kind is not None)
    if kind is not None:
        meaning = diffusers_scheduler.meaning(tmp_path / "parts/scheduler")
        assert type(meaning.target) is kind
        torch.testing.assert_close(meaning.schedule.logsnrs, ScaledLinear().logsnrs, atol=1e-9, rtol=1e-9)
