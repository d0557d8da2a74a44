"""Nets that denoise in the folder format of diffusers: what it calls UNet2DModel and DiTTransformer2DModel.

A net of labels comes and goes with its embedder: there the labels are a table inside the net, here a
`ConditionEmbedder` whose vectors the net projects, so that a row of theirs is our projected vector.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atelier.checkpoints import diffusers_files
from atelier.core.errors import UserError
from atelier.nets.conditioning import ConditionEmbedder
from atelier.nets.dit import DiT
from atelier.nets.layers import SelfAttention
from atelier.nets.unet import UNet

DIT = ("DiTTransformer2DModel", "Transformer2DModel")  # the second is its name of before
UNET_NAMES = (  # our parts -> theirs, whatever its attention
    (r"^time\.1\.", "time_embedding.linear_1."),
    (r"^time\.3\.", "time_embedding.linear_2."),
    (r"^stem\.", "conv_in."),
    (r"^head\.0\.", "conv_norm_out."),
    (r"^head\.2\.", "conv_out."),
    (r"^middle\.(\d)\.residual\.", r"mid_block.resnets.\1."),
    (r"^middle\.(\d)\.attention\.", r"mid_block.attentions.\1."),
    (r"\.embedding\.", ".time_emb_proj."),
    (r"\.skip\.", ".conv_shortcut."),
)
ATTENTION = (
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.out\.", r"\1.to_out.0."),
)
DIT_NAMES = (
    (r"^patches\.", "pos_embed.proj."),
    (r"^modulation\.", "proj_out_1."),
    (r"^head\.", "proj_out_2."),
    (r"^blocks\.", "transformer_blocks."),
    (r"\.modulation\.", ".norm1.linear."),
    (r"(\.\d+)\.qkv\.", r"\1.attn1.qkv."),
    (r"\.out\.", ".attn1.to_out.0."),
    (r"\.mlp\.0\.", ".ff.net.0.proj."),
    (r"\.mlp\.2\.", ".ff.net.2."),
)
DIT_TIME = {"time.1.": "timestep_embedder.linear_1.", "time.3.": "timestep_embedder.linear_2."}
DIT_TABLE = "class_embedder.embedding_table.weight"
UNET_ONLY = {  # the values whose layers are ours
    "act_fn": ("silu", "swish"),
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "add_attention": (True,),
    "class_embed_type": (None,),
}
DIT_ONLY = {
    "activation_fn": ("gelu-approximate",),
    "norm_type": ("ada_norm_zero",),
    "attention_bias": (True,),
    "norm_elementwise_affine": (False,),
    "upcast_attention": (False,),
}


def read(folder: Path | str, image_size: int | None = None) -> tuple[UNet | DiT, ConditionEmbedder | None]:
    """The net of a folder, float32 and in eval mode, and the embedder of its labels; None where it has none.

    Label k is row k of their table. The last row of a transformer's is what is known of no image; a U-Net has no such
    row, and its embedder gives nothing there.

    Args:
        folder: folder with config.json and diffusion_pytorch_model.safetensors.
        image_size: height and width of the images; None: the `sample_size` of the config.

    Raises:
        UserError: no such folder, a file is cut, or the net has parts that ours lack.
    """
    folder = Path(folder)
    config = diffusers_files.config(folder, ("UNet2DModel", *DIT), _refused)
    theirs = diffusers_files.weights(folder, _refused)
    is_dit = config["_class_name"] in DIT
    for key, values in (DIT_ONLY if is_dit else UNET_ONLY).items():
        if config.get(key, values[0]) not in values:
            raise _refused(folder, f"{key}={config[key]} is not supported, only {values[0]}")
    size = image_size or diffusers_files.square(folder, config.get("sample_size", 32), _refused)
    try:
        return (_read_dit if is_dit else _read_unet)(folder, config, theirs, size)
    except UserError as error:
        if error.key.startswith((".", "data.")):
            raise _refused(folder, f"{error.key.strip('.')}={error.value}: {error.problem}") from error
        raise


def write(net: UNet | DiT, embedder: ConditionEmbedder | None, folder: Path | str) -> None:
    """Make the folder that `UNet2DModel.from_pretrained` or `DiTTransformer2DModel.from_pretrained` takes.

    Where the embedder has labels, row k of their table is label k, and the last row is what is known of no image.

    Args:
        net: net of parts that diffusers has as well.
        embedder: embedder of its conditions, of none or of labels; None where the net takes none.
        folder: place, made if it is not there; its two files are replaced.

    Raises:
        UserError: the net has a part that diffusers lacks.
    """
    if "tokens" in net.cond_sizes:
        raise lacking("token_dim", net.cond_sizes["tokens"], "tokens in a net of labels", "null")
    if "planes" in net.cond_sizes:
        raise lacking("plane_channels", net.cond_sizes["planes"], "planes in a net of labels", 0)
    if isinstance(net, DiT):
        config, theirs = _their_dit(net, embedder)
    else:
        config, theirs = _their_unet(net, embedder)
    diffusers_files.write(Path(folder), config, theirs)


# ---- the U-Net


def _read_unet(
    folder: Path, config: dict[str, Any], theirs: dict[str, Tensor], size: int
) -> tuple[UNet, ConditionEmbedder | None]:
    classes = config.get("num_class_embeds")
    options = _unet_options(folder, config, size)
    net = UNet(**options, cond_dim=classes and 4 * options["width"])
    table = None if classes is None else _taken(folder, theirs, "class_embedding.weight")
    ours = {name: value for name, value in net.state_dict().items() if not name.startswith("cond.")}
    names = {name: _unet_names(name, net.n_blocks) for name in ours}
    found = diffusers_files.gathered(folder, theirs, names, ours, _refused)
    if config.get("flip_sin_to_cos", True):
        found["time.1.weight"] = sines_first(found["time.1.weight"])
    net.load_state_dict(found, strict=False)
    return net.eval(), None if table is None else _embedder(net, table, torch.zeros(table.shape[1]))


def _unet_options(folder: Path, config: dict[str, Any], size: int) -> dict[str, Any]:
    """The arguments of our U-Net that a config of diffusers describes; what it leaves out has diffusers' default."""
    unsaid = [key for key in ("block_out_channels", "down_block_types", "up_block_types") if key not in config]
    if unsaid:
        raise _refused(folder, f"its {diffusers_files.CONFIG} has no {unsaid[0]}")
    widths, down, up = (config[key] for key in ("block_out_channels", "down_block_types", "up_block_types"))
    if any(width % widths[0] for width in widths) or config.get("time_embedding_dim") not in (None, 4 * widths[0]):
        raise _refused(folder, f"its widths {widths} or its embedding are no multiples of the first")
    attends = [kind.startswith("Attn") for kind in down]
    if attends != [kind.startswith("Attn") for kind in up][::-1] or len(down) != len(widths):
        raise _refused(folder, "its way up is not its way down turned round")
    resized = {_resized_in_blocks(folder, kind, config) for kind in [*down[:-1], *up[:-1]]}
    if len(resized) > 1:
        raise _refused(folder, "some of its maps are resized inside a block and some are not")
    groups, scale_shift = config.get("norm_num_groups", 32), config.get("resnet_time_scale_shift", "default")
    if scale_shift not in ("default", "scale_shift"):
        raise _refused(folder, f"resnet_time_scale_shift={scale_shift} is not supported")
    middle = config.get("attn_norm_num_groups") or (groups if scale_shift == "default" else None)
    if middle != groups:
        raise _refused(folder, "the attention in its middle has no norm, or another than the rest")
    return {
        "image_size": size,
        "image_channels": config.get("in_channels", 3),
        "width": widths[0],
        "multipliers": [width // widths[0] for width in widths],
        "n_blocks": config.get("layers_per_block", 2),
        "attention": [size // 2**i for i, attended in enumerate(attends) if attended],
        "head_width": config.get("attention_head_dim", 8),
        "dropout": config.get("dropout", 0.0),
        "scale_shift": scale_shift == "scale_shift",
        "resample_in_blocks": resized == {True},
        "learned_variance": _gives_variance(folder, config, 3),
        "norm_groups": groups,
        "norm_eps": config.get("norm_eps", 1e-5),
        "pad_below": config.get("downsample_padding", 1) == 0,
        "freq_shift": config.get("freq_shift", 0),
    }


def _resized_in_blocks(folder: Path, kind: str, config: dict[str, Any]) -> bool:
    """Whether a level's map is resized inside a residual block behind it."""
    if kind in ("DownBlock2D", "UpBlock2D"):
        return False
    if kind in ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"):
        return True
    if kind not in ("AttnDownBlock2D", "AttnUpBlock2D"):
        raise _refused(folder, f"it has a {kind}")
    how = config.get("downsample_type" if "Down" in kind else "upsample_type", "conv")
    if how not in ("conv", "resnet"):
        raise _refused(folder, f"it resizes maps by {how}")
    return how == "resnet"


def _their_unet(net: UNet, embedder: ConditionEmbedder | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = _unet_config(net)
    ours = {name: value for name, value in net.state_dict().items() if not name.startswith("cond.")}
    theirs = diffusers_files.spread(ours, {name: _unet_names(name, net.n_blocks) for name in ours})
    rows = _rows(net, embedder)
    if len(rows) == 1:  # every image has this one
        theirs["time_embedding.linear_2.bias"] += rows[0]
        return config, theirs
    return config | {"num_class_embeds": len(rows)}, theirs | {"class_embedding.weight": rows}


def _unet_config(net: UNet) -> dict[str, Any]:
    parts, groups = net.parts, groups_of(net)
    attention = [layer for layer in net.modules() if isinstance(layer, SelfAttention)]
    heads, head_widths = {a.heads for a in attention}, {a.qkv.in_features // a.heads for a in attention}
    if heads != {1} and len(head_widths) > 1:
        problem = f"heads of {sorted(head_widths)} channels in one net"
        raise lacking("head_width", parts.head_width, problem, min(head_widths))
    how = "resnet" if parts.resample_in_blocks else "conv"
    plain = ("ResnetDownsample", "ResnetUpsample") if parts.resample_in_blocks else ("Down", "Up")
    return {
        "_class_name": "UNet2DModel",
        "sample_size": net.shape[1],
        "in_channels": net.shape[0],
        "out_channels": net.head[2].out_channels,
        "block_out_channels": net.widths,
        "down_block_types": [f"{'AttnDown' if a else plain[0]}Block2D" for a in net.attends],
        "up_block_types": [f"{'AttnUp' if a else plain[1]}Block2D" for a in net.attends[::-1]],
        "layers_per_block": net.n_blocks,
        "downsample_type": how,
        "upsample_type": how,
        "downsample_padding": 0 if parts.pad_below else 1,
        "attention_head_dim": None if heads == {1} else min(head_widths),
        "norm_num_groups": groups,
        "attn_norm_num_groups": groups,
        "norm_eps": parts.norm_eps,
        "dropout": parts.dropout,
        "resnet_time_scale_shift": "scale_shift" if parts.scale_shift else "default",
        "freq_shift": net.time[0].shift,
        "flip_sin_to_cos": False,
    }


def groups_of(net: UNet) -> int:
    """The groups of all norms of a U-Net whose maps are as diffusers has them.

    Raises:
        UserError: norms of several groups, patches, or a first level wider than the first layer.
    """
    width = net.stem.out_channels
    groups = {layer.num_groups for layer in net.modules() if isinstance(layer, nn.GroupNorm)}
    if net.patch_size != 1:
        raise lacking("patch_size", net.patch_size, "patches", 1)
    if net.widths[0] != width:
        raise lacking("multipliers", [w // width for w in net.widths], "first level but of one width", "[1,...]")
    if len(groups) > 1:
        problem = f"norms of {sorted(groups)} groups in one net"
        raise lacking("norm_groups", net.parts.norm_groups, problem, min(groups))
    return groups.pop()


def _unet_names(name: str, n_blocks: int) -> list[str]:
    """Under which names diffusers keeps one of our tensors: three for queries, keys and values together."""
    name = renamed(unet_name(name, n_blocks), ATTENTION)
    return [name.replace(".qkv.", f".to_{part}.") for part in "qkv"] if ".qkv." in name else [name]


def unet_name(name: str, n_blocks: int) -> str:
    """Where diffusers keeps one of the tensors of our U-Net, but for the names inside its attention.

    Args:
        name: name of it here.
        n_blocks: residual blocks per level on the way down.
    """
    way, number, rest = re.match(r"(?:(down|up)\.(\d+)\.)?(.*)", name).groups()
    if way:
        level, k = divmod(int(number), n_blocks + (1 if way == "down" else 2))
        kinds = {"residual": f"resnets.{k}", "attention": f"attentions.{k}"}
        kind, _, last = rest.partition(".")
        inside = f"{kinds[kind]}.{last}" if kind in kinds else f"{way}samplers.0.{rest}"
        name = f"{way}_blocks.{level}.{inside}"
    return renamed(name, UNET_NAMES)


def renamed(name: str, rules: Iterable[tuple[str, str]]) -> str:
    """A name with each pattern replaced, one after the other."""
    for ours, theirs in rules:
        name = re.sub(ours, theirs, name)
    return name


# ---- the transformer


def _read_dit(
    folder: Path, config: dict[str, Any], theirs: dict[str, Tensor], size: int
) -> tuple[DiT, ConditionEmbedder]:
    heads = config.get("num_attention_heads", 16)
    width, n_layers = heads * config.get("attention_head_dim", 72), config.get("num_layers", 28)
    net = DiT(
        image_size=size,
        image_channels=config.get("in_channels", 4),
        patch_size=config.get("patch_size", 2),
        width=width,
        n_layers=n_layers,
        heads=heads,
        dropout=config.get("dropout", 0.0),
        cond_dim=width,
        learned_variance=_gives_variance(folder, config, 4),
        freq_shift=1,
        mlp_norm_eps=config.get("norm_eps", 1e-5),
    )
    first = {key: value for key, value in theirs.items() if key.startswith("transformer_blocks.0.norm1.emb.")}
    for key in [key for key in theirs if ".norm1.emb." in key]:  # each block has them, and they are the same
        value, part = theirs.pop(key), key.partition(".norm1.emb.")[2]
        if not torch.equal(value, first.get(f"transformer_blocks.0.norm1.emb.{part}", value[:0])):
            raise _refused(folder, f"{key} is not that of the first block")
    theirs |= {key.partition(".norm1.emb.")[2]: value for key, value in first.items()}
    table = _taken(folder, theirs, DIT_TABLE)
    ours = {name: value for name, value in net.state_dict().items() if not name.startswith("cond.")}
    found = diffusers_files.gathered(folder, theirs, {name: _dit_names(name) for name in ours}, ours, _refused)
    found["time.1.weight"] = sines_first(found["time.1.weight"])
    net.load_state_dict(found, strict=False)
    return net.eval(), _embedder(net, table[:-1], table[-1])


def _their_dit(net: DiT, embedder: ConditionEmbedder | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    block = net.blocks[0]
    if block.query_norm is not None:
        raise lacking("qk_norm", True, "norm of queries and keys", "false")
    if net.time[0].shift != 1:
        raise lacking("freq_shift", net.time[0].shift, "such frequencies of the time", 1)
    ours = {name: value for name, value in net.state_dict().items() if not name.startswith("cond.")}
    ours["time.1.weight"] = sines_first(ours["time.1.weight"])
    theirs = diffusers_files.spread(ours, {name: _dit_names(name) for name in ours})
    rows = _rows(net, embedder)
    theirs[DIT_TABLE] = rows if len(rows) > 1 else rows.repeat(2, 1)  # it has one label or more
    for part in [key for key in theirs if "embedder." in key]:
        value = theirs.pop(part)
        theirs |= {f"transformer_blocks.{k}.norm1.emb.{part}": value.clone() for k in range(len(net.blocks))}
    channels, size, _ = net.shape
    config = {
        "_class_name": DIT[0],
        "sample_size": size,
        "in_channels": channels,
        "out_channels": net.n_out * channels,
        "patch_size": net.patch_size,
        "num_layers": len(net.blocks),
        "num_attention_heads": block.heads,
        "attention_head_dim": block.out.in_features // block.heads,
        "num_embeds_ada_norm": max(1, len(rows) - 1),
        "dropout": block.dropout.p,
        "norm_eps": block.norm2.eps,
        **{key: values[0] for key, values in DIT_ONLY.items()},
    }
    return config, theirs


def _dit_names(name: str) -> list[str]:
    """Under which names diffusers keeps one of our tensors; what its blocks have alike stands in front of them."""
    for ours, theirs in DIT_TIME.items():
        if name.startswith(ours):
            return [theirs + name.removeprefix(ours)]
    name = renamed(name, DIT_NAMES)
    return [name.replace(".qkv.", f".to_{part}.") for part in "qkv"] if ".qkv." in name else [name]


# ---- labels, times and channels of both


def _embedder(net: UNet | DiT, table: Tensor, null: Tensor) -> ConditionEmbedder:
    """Of these rows, which the net takes as they are."""
    n, dim = table.shape
    made = ConditionEmbedder(dim=dim, conditions=["label"], n_classes=n, label_factors=[], n_attributes=0)
    with torch.no_grad():
        made.label[0].weight.copy_(table)
        made.null_embedding.copy_(null)
        net.cond.weight.copy_(torch.eye(dim))
        net.cond.bias.zero_()
    return made.eval()


@torch.no_grad()
def _rows(net: UNet | DiT, embedder: ConditionEmbedder | None) -> Tensor:
    """What the net adds to the time's embedding, for each label and then for no label."""
    if net.cond is None:
        return torch.zeros_like(net.time[3].bias)[None]
    if embedder is None or "attributes" in embedder.conditions:
        problem = "diffusers embeds labels alone"
        raise UserError("data.conditions", embedder and list(embedder.conditions), problem, "data.conditions=[label]")
    null = net.cond(embedder.null(1).vector)  # (1, D)
    if not embedder.conditions:
        return null
    n = math.prod(embedder.factors)
    labels = torch.arange(n, device=null.device)
    return torch.cat([net.cond(embedder({"label": labels}, n).vector), null])  # (n + 1, D)


def sines_first(weight: Tensor) -> Tensor:
    """A layer's weight (D, F) behind sines and cosines for one behind cosines and sines, or the other way round."""
    return weight.roll(weight.shape[1] // 2, dims=1)


def _taken(folder: Path, theirs: dict[str, Tensor], name: str) -> Tensor:
    if name not in theirs:
        raise _refused(folder, f"{diffusers_files.WEIGHTS} lacks {name}")
    return theirs.pop(name)


def _gives_variance(folder: Path, config: dict[str, Any], default: int) -> bool:
    """Whether it gives twice the channels that it takes."""
    taken = config.get("in_channels", default)
    given = config.get("out_channels") or taken
    if given not in (taken, 2 * taken):
        raise _refused(folder, f"it takes {taken} channels and gives {given}")
    return given == 2 * taken


def lacking(argument: str, value: object, what: str, instead: object) -> UserError:
    """What is said of an argument of a net that diffusers has no layer for."""
    return UserError(f"model.net.{argument}", value, f"diffusers has no {what}", f"model.net.{argument}={instead}")


def _refused(folder: Path, problem: str) -> UserError:
    return UserError("folder", folder, problem, "a folder of a UNet2DModel or a DiTTransformer2DModel of diffusers")
