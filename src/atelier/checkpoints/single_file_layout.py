"""What the names and shapes of a Stable Diffusion tell: version, configs, every tensor that there must be.

A part goes by the name of its folder in diffusers (`unet`, `vae`, `text_encoder`, `text_encoder_2`), and its tensors by
those of diffusers and transformers. XL embeds a vector; version 1 has convolutions around its attention, version 2 has
linear layers there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from atelier.checkpoints import diffusers_conditional, diffusers_folder
from atelier.checkpoints import single_file_names as names
from atelier.checkpoints.weight_files import Refused

Version = Literal["sd1", "sd2", "sdxl"]
Shapes = dict[str, list[int]]  # a tensor by name
UNET, VAE = "model.diffusion_model.", "first_stage_model."
PREFIXES: dict[Version, dict[str, str]] = {  # a part -> what its names begin with
    "sd1": {"unet": UNET, "vae": VAE, "text_encoder": "cond_stage_model.transformer."},
    "sd2": {"unet": UNET, "vae": VAE, "text_encoder": "cond_stage_model.model."},
    "sdxl": {
        "unet": UNET,
        "vae": VAE,
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}
OPEN_CLIP = {("sd2", "text_encoder"), ("sdxl", "text_encoder_2")}
LATENT_SIZE = {"sd1": 64, "sd2": 96, "sdxl": 128}
SCALE = {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}
HEAD_WIDTH, HEADS = 64, 8  # of all but version 1's U-Net, which has 8 heads of any width
SQUEEZED = re.compile(r"attentions\.0\.to_(q|k|v|out\.0)\.weight$")  # of the autoencoder: in the file 1x1 convolutions


class Absent(Exception):
    """A tensor is absent without which nothing is known of a part."""

    def __init__(self, part: str, name: str) -> None:
        super().__init__(part, name)
        self.part, self.name = part, name


@dataclass(frozen=True)
class Naming:
    """Names in the file of tensors of diffusers and transformers.

    Args:
        version: "sd1", "sd2" or "sdxl".
        n_layers: residual blocks per level of the U-Net on the way down.
        attends: levels of the U-Net that have attention, the largest maps first.
        n_levels: levels of the autoencoder.
    """

    version: Version
    n_layers: int
    attends: list[bool]
    n_levels: int

    def key(self, part: str, name: str) -> str:
        """The name in the file of a part's tensor."""
        if part == "unet":
            name = names.unet_to_file(name, self.n_layers, self.attends)
        elif part == "vae":
            name = names.vae_to_file(name, self.n_levels)
        elif (self.version, part) in OPEN_CLIP:
            name = names.open_clip_to_file(name)
        return PREFIXES[self.version][part] + name

    def held(self, part: str, key: str) -> list[str]:
        """The tensors of a part that one of the file holds, one below the other; `key` without the part's prefix."""
        if part == "unet":
            return [names.unet_from_file(key, self.n_layers)]
        if part == "vae":
            return [names.vae_from_file(key, self.n_levels)]
        return names.open_clip_from_file(key) if (self.version, part) in OPEN_CLIP else [key]


@dataclass(frozen=True)
class Described:
    """All parts of a model.

    Args:
        naming: names in the file.
        configs: configs of diffusers and transformers by part, with the heads and groups that were published.
        shapes: tensors that each part has, by name.
    """

    naming: Naming
    configs: dict[str, dict[str, Any]]
    shapes: dict[str, Shapes]

    def places(self, part: str) -> dict[str, list[str]]:
        """Every tensor of a part in the file, and which of the part it holds."""
        prefix = PREFIXES[self.naming.version][part]
        keys = dict.fromkeys(self.naming.key(part, name) for name in self.shapes[part])
        return {key: self.naming.held(part, key.removeprefix(prefix)) for key in keys}

    def shape(self, part: str, held: list[str]) -> list[int]:
        """The shape in the file of what holds these tensors of a part."""
        first, *rest = self.shapes[part][held[0]]
        if held[0] == "text_projection.weight":
            return [*rest, first]
        return [first * len(held), *rest, *([1, 1] if SQUEEZED.search(held[0]) else [])]


def described(place: Path, sizes: dict[str, Shapes], refused: Refused) -> Described:
    """The model of these shapes; that it has all of them and no others is not looked at.

    Args:
        place: file that they are of.
        sizes: shapes by part and name.
        refused: maker of the error.

    Raises:
        Absent: a tensor is missing that others are told from.
        UserError: its U-Net or its autoencoder is none of ours.
    """
    naming = naming_of(sizes)
    version, texts = naming.version, [part for part in PREFIXES[naming.version] if part.startswith("text")]
    configs = {part: _text_config(version, part, sizes.get(part, {})) for part in texts}
    configs["vae"] = vae = _vae_config(version, sizes.get("vae", {}))
    configs["unet"] = unet = _unet_config(version, sizes.get("unet", {}))
    if version == "sdxl":
        unet |= _vector_config(place, sizes["unet"], configs[texts[-1]]["projection_dim"], refused)
    shapes = {part: _text_shapes(configs[part]) for part in texts}
    shapes["vae"] = diffusers_folder.shapes(place, vae | {"norm_num_groups": 1})  # which no shape depends on
    unet = unet | {"attention_head_dim": 1, "norm_num_groups": 1}
    shapes["unet"] = diffusers_conditional.shapes(place, unet, refused)
    return Described(naming, configs, shapes)


def naming_of(sizes: dict[str, Shapes]) -> Naming:
    """How tensors of these shapes are called in the file, by part and name."""
    unet, vae = sizes.get("unet", {}), sizes.get("vae", {})
    attends = [f"down_blocks.{level}.attentions.0.norm.weight" in unet for level in range(_n_levels(unet, ""))]
    return Naming(version_of(unet), _n_layers(unet, ""), attends, _n_levels(vae, "encoder."))


def version_of(unet: Shapes) -> Version:
    """Which version a U-Net of these shapes is of."""
    if any(name.startswith("add_embedding.") for name in unet):
        return "sdxl"
    linear = any(len(shape) == 2 for name, shape in unet.items() if name.endswith(".proj_in.weight"))
    return "sd2" if linear else "sd1"


def _unet_config(version: Version, unet: Shapes) -> dict[str, Any]:
    """Of UNet2DConditionModel, but for what XL says of its vector."""
    widths, middle = _widths("unet", unet, ""), "mid_block.attentions.0."
    attends = naming_of({"unet": unet}).attends
    depths = [_depth(unet, f"down_blocks.{level}.attentions.0.") for level in range(len(widths) - 1)]
    depths.append(_depth(unet, middle))
    cross, plain = diffusers_conditional.CROSS, diffusers_conditional.PLAIN
    return {
        "_class_name": diffusers_conditional.KIND,
        "sample_size": LATENT_SIZE[version],
        "in_channels": _get("unet", unet, "conv_in.weight")[1],
        "out_channels": _get("unet", unet, "conv_out.weight")[0],
        "down_block_types": [(cross if attended else plain).format("Down") for attended in attends],
        "up_block_types": [(cross if attended else plain).format("Up") for attended in attends[::-1]],
        "block_out_channels": widths,
        "layers_per_block": _n_layers(unet, ""),
        "cross_attention_dim": _get("unet", unet, f"{middle}transformer_blocks.0.attn2.to_k.weight")[1],
        "transformer_layers_per_block": depths if len(set(depths)) > 1 else depths[0],
        "attention_head_dim": HEADS if version == "sd1" else [max(1, width // HEAD_WIDTH) for width in widths],
        "use_linear_projection": version != "sd1",
    }


def _vector_config(place: Path, unet: Shapes, text_dim: int, refused: Refused) -> dict[str, Any]:
    """Of the vector of XL, the first `text_dim` numbers of which are a text's."""
    dim = _get("unet", unet, "add_embedding.linear_1.weight")[1]
    each, odd = divmod(dim - text_dim, diffusers_conditional.N_SIZES)
    if odd or each < 1:
        problem = f"a vector of {dim} numbers is no text of {text_dim} and {diffusers_conditional.N_SIZES} sizes"
        raise refused(place, problem)
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": each,
        "projection_class_embeddings_input_dim": dim,
    }


def _vae_config(version: Version, vae: Shapes) -> dict[str, Any]:
    """Of AutoencoderKL."""
    widths = _widths("vae", vae, "encoder.")
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": _get("vae", vae, "encoder.conv_in.weight")[1],
        "out_channels": _get("vae", vae, "decoder.conv_out.weight")[0],
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "block_out_channels": widths,
        "layers_per_block": _n_layers(vae, "encoder."),
        "latent_channels": _get("vae", vae, "post_quant_conv.weight")[0],
        "norm_num_groups": 32,
        "sample_size": LATENT_SIZE[version] * 8,
        "scaling_factor": SCALE[version],
    }


def _text_config(version: Version, part: str, text: Shapes) -> dict[str, Any]:
    """Of CLIPTextModel, or CLIPTextModelWithProjection where there is one."""
    rows, width = _get(part, text, "text_model.embeddings.token_embedding.weight")
    projection = _get(part, text, "text_projection.weight") if part == "text_encoder_2" else None
    return {
        "architectures": ["CLIPTextModelWithProjection" if projection else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": rows,
        "hidden_size": width,
        "intermediate_size": _get(part, text, "text_model.encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": 1 + max(numbers(text, r"text_model\.encoder\.layers\.(\d+)\.")),
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "max_position_embeddings": _get(part, text, "text_model.embeddings.position_embedding.weight")[0],
        "hidden_act": "gelu" if (version, part) in OPEN_CLIP else "quick_gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        **({"projection_dim": projection[0]} if projection else {}),
    }


def _text_shapes(config: dict[str, Any]) -> Shapes:
    """The tensors that transformers has for a config."""
    width, hidden = config["hidden_size"], config["intermediate_size"]
    layer = {
        **{f"layer_norm{k}.{kind}": [width] for k in (1, 2) for kind in ("weight", "bias")},
        **{f"self_attn.{part}_proj.weight": [width, width] for part in ("q", "k", "v", "out")},
        **{f"self_attn.{part}_proj.bias": [width] for part in ("q", "k", "v", "out")},
        "mlp.fc1.weight": [hidden, width],
        "mlp.fc1.bias": [hidden],
        "mlp.fc2.weight": [width, hidden],
        "mlp.fc2.bias": [width],
    }
    inside = {
        "embeddings.token_embedding.weight": [config["vocab_size"], width],
        "embeddings.position_embedding.weight": [config["max_position_embeddings"], width],
        "final_layer_norm.weight": [width],
        "final_layer_norm.bias": [width],
        **{f"encoder.layers.{k}.{n}": shape for k in range(config["num_hidden_layers"]) for n, shape in layer.items()},
    }
    projection = {"text_projection.weight": [config["projection_dim"], width]} if "projection_dim" in config else {}
    return {f"text_model.{name}": shape for name, shape in inside.items()} | projection


def _get(part: str, shapes: Shapes, name: str) -> list[int]:
    if name not in shapes:
        raise Absent(part, name)
    return shapes[name]


def _widths(part: str, shapes: Shapes, front: str) -> list[int]:
    """Channels of each level on the way down."""
    convs = (f"{front}down_blocks.{level}.resnets.0.conv1.weight" for level in range(_n_levels(shapes, front)))
    return [_get(part, shapes, name)[0] for name in convs]


def _n_levels(shapes: Shapes, front: str) -> int:
    return 1 + max(numbers(shapes, rf"{front}down_blocks\.(\d+)\."), default=0)


def _n_layers(shapes: Shapes, front: str) -> int:
    return 1 + max(numbers(shapes, rf"{front}down_blocks\.0\.resnets\.(\d+)\."), default=0)


def _depth(unet: Shapes, attention: str) -> int:
    """Transformer blocks of an attention; 1 where there is none."""
    return 1 + max(numbers(unet, rf"{re.escape(attention)}transformer_blocks\.(\d+)\."), default=0)


def numbers(shapes: Iterable[str], pattern: str) -> list[int]:
    """The numbers in the names that begin so, in the pattern's group."""
    return [int(found[1]) for name in shapes if (found := re.match(pattern, name))]
