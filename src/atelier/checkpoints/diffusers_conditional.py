"""The U-Net of Stable Diffusion in the folder format of diffusers: what it calls UNet2DConditionModel.

Versions 1, 2 and XL, with further channels beside the noisy ones (inpainting, editing by instructions). The vector of
XL is a text's and then sines of six sizes, which an embedder makes; here it is `cond_dim` numbers.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atelier.checkpoints import diffusers_files
from atelier.checkpoints.diffusers_nets import groups_of, lacking, renamed, sines_first, unet_name
from atelier.checkpoints.weight_files import Refused
from atelier.core.errors import UserError
from atelier.nets.layers import TimeEmbedding
from atelier.nets.spatial_transformer import SpatialTransformer
from atelier.nets.two_texts import N_SIZES
from atelier.nets.unet import UNet

KIND = "UNet2DConditionModel"
CROSS, PLAIN = "CrossAttn{}Block2D", "{}Block2D"
DEFAULTS: dict[str, Any] = {  # of diffusers, for what a config leaves out
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": [CROSS.format("Down")] * 3 + [PLAIN.format("Down")],
    "up_block_types": [PLAIN.format("Up")] + [CROSS.format("Up")] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "downsample_padding": 1,
    "dropout": 0.0,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "freq_shift": 0,
    "resnet_time_scale_shift": "default",
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "use_linear_projection": False,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
    "time_embedding_dim": None,
    "upcast_attention": False,  # of no meaning in float32
    "addition_embed_type_num_heads": 64,  # of no layer that is ours
}
ONLY: dict[str, tuple[Any, ...]] = {  # the values whose layers are ours, the default first
    "act_fn": ("silu", "swish"),
    "center_input_sample": (False,),
    "flip_sin_to_cos": (True,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "only_cross_attention": (False,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "reverse_transformer_layers_per_block": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "num_attention_heads": (None,),
    "dual_cross_attention": (False,),
    "cross_attention_norm": (None,),
    "attention_type": ("default",),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "class_embeddings_concat": (False,),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1.0,),
    "time_embedding_type": ("positional",),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
}
MAY_BE = {"addition_embed_type": (None, "text_time"), "resnet_time_scale_shift": ("default", "scale_shift")}
COUNTS = ("in_channels", "out_channels", "layers_per_block", "norm_num_groups")
PROJECTION = re.compile(r"attentions\.\d+\.proj_(in|out)\.weight$")  # a 1x1 convolution's unless the config says linear
NAMES = (  # our parts -> theirs
    (r"^cond\.0\.", "add_embedding.linear_1."),
    (r"^cond\.2\.", "add_embedding.linear_2."),
    (r"\.blocks\.", ".transformer_blocks."),
    (r"(blocks\.\d+)\.qkv\.", r"\1.attn1.qkv."),
    (r"(blocks\.\d+)\.out\.", r"\1.attn1.to_out.0."),
    (r"\.cross\.q\.", ".attn2.to_q."),
    (r"\.cross\.kv\.", ".attn2.kv."),
    (r"\.cross\.out\.", ".attn2.to_out.0."),
    (r"\.mlp\.0\.", ".ff.net.0."),
    (r"\.mlp\.1\.", ".ff.net.2."),
)


def holds(folder: Path | str) -> bool:
    """Whether the config.json of a folder is of such a net."""
    folder = Path(folder)
    return diffusers_files.told(folder, folder / diffusers_files.CONFIG, _refused).get("_class_name") == KIND


def read(folder: Path | str, image_size: int | None = None) -> UNet:
    """The net of a folder, float32 and in eval mode.

    Args:
        folder: folder with config.json and diffusion_pytorch_model.safetensors.
        image_size: height and width of what it denoises; None: the `sample_size` of the config.

    Raises:
        UserError: no such folder, a file is cut, or the net has parts that ours lack.
    """
    folder = Path(folder)
    config = diffusers_files.config(folder, (KIND,), _refused)
    _options(folder, config, image_size, _refused)  # before gigabytes are read
    return built(folder, config, diffusers_files.weights(folder, _refused), image_size, _refused)


def built(
    place: Path, config: dict[str, Any], theirs: dict[str, Tensor], image_size: int | None, refused: Refused
) -> UNet:
    """The net of a config and tensors of diffusers, float32 and in eval mode.

    Args:
        place: folder or file that they are from.
        config: config of diffusers.
        theirs: tensors by diffusers' names, some of which become the net's own.
        image_size: height and width of what it denoises; None: the `sample_size` of the config.
        refused: maker of the error.

    Raises:
        UserError: it has a part that ours lacks, or a tensor is missing, too many or of another shape.
    """
    net = _empty(place, config, image_size, refused)
    linear = config.get("use_linear_projection", False)
    flat = {name: _flat(place, name, value, linear, refused) for name, value in theirs.items()}
    ours = net.state_dict()
    found = diffusers_files.gathered(place, flat, _names(net), ours, refused)
    found["time.1.weight"] = sines_first(found["time.1.weight"])
    net.load_state_dict({name: value.float() for name, value in found.items()}, assign=True)
    net.time[0] = TimeEmbedding(net.widths[0], net.time[0].shift)  # its frequencies are in no file
    return net.eval()


def shapes(place: Path, config: dict[str, Any], refused: Refused) -> dict[str, list[int]]:
    """The tensors that diffusers has for a config, by name; nothing of their size is made.

    Args:
        place: folder or file that it is from.
        config: config of diffusers.
        refused: maker of the error.

    Raises:
        UserError: it has a part that ours lacks.
    """
    net = _empty(place, config, None, refused)
    square = [] if config.get("use_linear_projection", False) else [1, 1]
    found = diffusers_files.shapes(net.state_dict(), _names(net))
    return {name: shape + square if PROJECTION.search(name) else shape for name, shape in found.items()}


def write(net: UNet, folder: Path | str, linear: bool | None = None, size_dim: int = 256) -> None:
    """Make the folder that `UNet2DConditionModel.from_pretrained` takes.

    Args:
        net: net of tokens, of parts that diffusers has as well.
        folder: place, made if it is not there; its two files are replaced.
        linear: whether the first and the last layer of an attention are linear ones there (versions 2 and XL) or 1x1
            convolutions (version 1), which is the same but for the tensors' shapes; None: linear where the net's heads
            have one width, as in those versions.
        size_dim: numbers of each of the six sizes in the vector, behind those of the text.

    Raises:
        UserError: the net has a part that diffusers lacks, or no tokens.
    """
    diffusers_files.write(Path(folder), *exported(net, linear, size_dim))


def exported(net: UNet, linear: bool | None = None, size_dim: int = 256) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors that diffusers has for a net; the arguments are those of `write`.

    Raises:
        UserError: the net has a part that diffusers lacks, or no tokens.
    """
    config = config_of(net, linear, size_dim)
    linear = config["use_linear_projection"]
    ours = dict(net.state_dict())
    ours["time.1.weight"] = sines_first(ours["time.1.weight"])
    theirs = diffusers_files.spread(ours, _names(net))
    if not linear:
        theirs = {n: value[:, :, None, None] if PROJECTION.search(n) else value for n, value in theirs.items()}
    return config, theirs


# ---- names and shapes


def _names(net: UNet) -> diffusers_files.Names:
    return {name: their_names(name, net.n_blocks) for name in net.state_dict()}


def their_names(name: str, n_blocks: int) -> list[str]:
    """Under which names diffusers keeps one of our tensors: several for queries, keys and values together.

    Args:
        name: name of it here.
        n_blocks: residual blocks per level on the way down.
    """
    name = renamed(unet_name(name, n_blocks), NAMES)
    together = re.search(r"\.(qkv|kv)\.", name)
    return [name.replace(together[0], f".to_{part}.") for part in together[1]] if together else [name]


def _flat(place: Path, name: str, value: Tensor, linear: bool, refused: Refused) -> Tensor:
    """The weight of a 1x1 convolution as that of a linear layer, all others as they are."""
    if linear or not PROJECTION.search(name):
        return value
    if value.ndim != 4 or value.shape[2:] != (1, 1):
        raise refused(place, f"{name} is no 1x1 convolution: {list(value.shape)}")
    return value[:, :, 0, 0]


# ---- configs


def _empty(place: Path, config: dict[str, Any], image_size: int | None, refused: Refused) -> UNet:
    """The net of a config, without numbers."""
    options = _options(place, config, image_size, refused)
    try:
        with torch.device("meta"):
            return UNet(**options)
    except UserError as error:
        raise refused(place, f"{error.key.strip('.')}={error.value}: {error.problem}") from error


def _options(place: Path, config: dict[str, Any], image_size: int | None, refused: Refused) -> dict[str, Any]:
    """The arguments of our U-Net that a config describes."""
    whole = _whole(place, config, refused)
    widths, taken, given = (whole[key] for key in ("block_out_channels", "in_channels", "out_channels"))
    if given > taken:
        raise refused(place, f"it takes {taken} channels and gives {given}")
    attends = _attends(place, whole, refused)
    size = image_size or diffusers_files.square(place, whole["sample_size"], refused)
    token_dims = set(_per_level(place, whole, "cross_attention_dim", refused))
    if len(token_dims) > 1:
        raise refused(place, f"cross_attention_dim={sorted(token_dims)}, not one number")
    return {
        "image_size": size,
        "image_channels": given,
        "plane_channels": taken - given,
        "width": widths[0],
        "multipliers": [width // widths[0] for width in widths],
        "n_blocks": whole["layers_per_block"],
        "attention": [size // 2**i for i, attended in enumerate(attends) if attended],
        **_heads(place, whole, attends, refused),
        "dropout": whole["dropout"],
        "scale_shift": whole["resnet_time_scale_shift"] == "scale_shift",
        "norm_groups": whole["norm_num_groups"],
        "norm_eps": whole["norm_eps"],
        "pad_below": whole["downsample_padding"] == 0,
        "freq_shift": whole["freq_shift"],
        "token_dim": token_dims.pop(),
        "depths": _per_level(place, whole, "transformer_layers_per_block", refused),
        **_vector(place, whole, refused),
    }


def _whole(place: Path, config: dict[str, Any], refused: Refused) -> dict[str, Any]:
    """A config with diffusers' defaults, none of whose values asks for a layer that is not ours."""
    for key, value in config.items():
        if key.startswith("_"):  # of the file, not of the net
            continue
        if key not in DEFAULTS and key not in ONLY:
            raise refused(place, f"{key}={value} is not known")
        choices = ONLY.get(key) or MAY_BE.get(key)
        if choices and value not in choices:
            raise refused(place, f"{key}={value} is not supported, only {' or '.join(map(str, choices))}")
    whole = DEFAULTS | config
    for key in COUNTS:
        if not _is_count(whole[key]):
            raise refused(place, f"{key}={whole[key]} is no whole number from 1 up")
    widths = whole["block_out_channels"]
    if not isinstance(widths, list) or not widths or not all(map(_is_count, widths)):
        raise refused(place, f"block_out_channels={widths} are no widths")
    if any(width % widths[0] for width in widths) or whole["time_embedding_dim"] not in (None, 4 * widths[0]):
        raise refused(place, f"its widths {widths} or its embedding are no multiples of the first")
    return whole


def _attends(place: Path, whole: dict[str, Any], refused: Refused) -> list[bool]:
    """Which levels have attention."""
    ways = []
    for way in ("Down", "Up"):
        kinds = whole[f"{way.lower()}_block_types"] or []
        odd = [kind for kind in kinds if kind not in (CROSS.format(way), PLAIN.format(way))]
        if odd:
            raise refused(place, f"it has a {odd[0]}")
        ways.append([kind == CROSS.format(way) for kind in kinds])
    if ways[0] != ways[1][::-1] or len(ways[0]) != len(whole["block_out_channels"]):
        raise refused(place, "its way up is not its way down turned round")
    return ways[0]


def _heads(place: Path, whole: dict[str, Any], attends: list[bool], refused: Refused) -> dict[str, int]:
    """Heads by number, or by width where each level has a number of its own; `attention_head_dim` is their number."""
    given, widths = _per_level(place, whole, "attention_head_dim", refused), whole["block_out_channels"]
    attended = [*attends[:-1], True]  # the last also in the middle
    heads = {n for n, there in zip(given, attended, strict=True) if there}
    of_width = {width / n for width, n, there in zip(widths, given, attended, strict=True) if there}
    if isinstance(whole["attention_head_dim"], list) and len(of_width) == 1 and min(of_width) % 1 == 0:
        return {"head_width": int(of_width.pop())}
    if len(heads) > 1:
        raise refused(place, f"attention_head_dim={given} is neither one number of heads nor heads of one width")
    return {"heads": heads.pop()}


def _vector(place: Path, whole: dict[str, Any], refused: Refused) -> dict[str, Any]:
    """What our net takes of the vector of XL; nothing where there is none."""
    if whole["addition_embed_type"] is None:
        return {}
    each, dim = whole["addition_time_embed_dim"], whole["projection_class_embeddings_input_dim"]
    if not (_is_count(each) and _is_count(dim) and N_SIZES * each < dim):
        raise refused(place, f"a vector of {dim} numbers holds no text and {N_SIZES} sizes of {each}")
    if whole["freq_shift"] != 0:  # they are those of the sizes too
        raise refused(place, f"freq_shift={whole['freq_shift']} is not supported beside sizes, only 0")
    return {"cond_dim": dim, "deep_cond": True}


def _per_level(place: Path, whole: dict[str, Any], key: str, refused: Refused) -> list[int]:
    """A number for each level of what is one number, or a number a level, in a config."""
    value, n = whole[key], len(whole["block_out_channels"])
    numbers = value if isinstance(value, list) else [value] * n
    if len(numbers) != n or not all(map(_is_count, numbers)):
        raise refused(place, f"{key}={value} is no number, nor {n} of them")
    return numbers


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def config_of(net: UNet, linear: bool | None = None, size_dim: int = 256) -> dict[str, Any]:
    """The config that diffusers has for a net; the arguments are those of `write`.

    Raises:
        UserError: the net has a part that diffusers lacks, or no tokens.
    """
    linear = net.parts.head_width is not None if linear is None else linear
    parts, groups = net.parts, groups_of(net)
    sizes, own = net.cond_sizes, net.shape[0]
    if "tokens" not in sizes:
        raise lacking("token_dim", None, "such net without tokens", 768)
    if net.head[2].out_channels != own:
        raise lacking("learned_variance", True, "variance in a net of tokens", "false")
    if parts.resample_in_blocks:
        raise lacking("resample_in_blocks", True, "such blocks in a net of tokens", "false")
    depths = _depths(net)
    config = {
        "_class_name": KIND,
        "sample_size": net.shape[1],
        "in_channels": own + sizes.get("planes", 0),
        "out_channels": own,
        "down_block_types": [(CROSS if attended else PLAIN).format("Down") for attended in net.attends],
        "up_block_types": [(CROSS if attended else PLAIN).format("Up") for attended in net.attends[::-1]],
        "block_out_channels": net.widths,
        "layers_per_block": net.n_blocks,
        "downsample_padding": 0 if parts.pad_below else 1,
        "dropout": parts.dropout,
        "norm_num_groups": groups,
        "norm_eps": parts.norm_eps,
        "freq_shift": net.time[0].shift,
        "resnet_time_scale_shift": "scale_shift" if parts.scale_shift else "default",
        "cross_attention_dim": sizes["tokens"],
        "transformer_layers_per_block": depths if len(set(depths)) > 1 else depths[0],
        "attention_head_dim": parts.heads if parts.head_width is None else [max(1, n) for n in _heads_of(net)],
        "use_linear_projection": linear,
        **{key: choices[0] for key, choices in ONLY.items()},
    }
    return config | (_their_vector(net, size_dim) if "vector" in sizes else {})


def _heads_of(net: UNet) -> list[int]:
    return [net.parts.heads_of(width) for width in net.widths]


def _depths(net: UNet) -> list[int]:
    """Transformer blocks of an attention of each level, 1 where there is none; the last has the middle's."""
    first = [net.down[level * (net.n_blocks + 1)].attention for level in range(len(net.widths))]
    layers = [*first[:-1], net.middle[0].attention]
    return [len(layer.blocks) if isinstance(layer, SpatialTransformer) else 1 for layer in layers]


def _their_vector(net: UNet, size_dim: int) -> dict[str, Any]:
    dim = net.cond_sizes["vector"]
    if isinstance(net.cond, torch.nn.Linear):
        raise lacking("deep_cond", False, "single layer for a vector beside tokens", "true")
    if net.time[0].shift != 0:
        raise lacking("freq_shift", net.time[0].shift, "other frequencies of the sizes than of the time", 0)
    if N_SIZES * size_dim >= dim:
        problem = f"{N_SIZES} sizes leave none of the net's {dim} numbers to a text"
        raise UserError("size_dim", size_dim, problem, f"size_dim={(dim - 1) // N_SIZES // 2 * 2}")
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": size_dim,
        "projection_class_embeddings_input_dim": dim,
    }


def _refused(folder: Path, problem: str) -> UserError:
    return UserError("folder", folder, problem, f"a folder of a {KIND} of diffusers, as unet/ of Stable Diffusion")
