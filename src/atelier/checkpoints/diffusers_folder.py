"""First stages in the folder format of diffusers: config.json beside diffusion_pytorch_model.safetensors.

Reads and writes what diffusers calls AutoencoderKL and VQModel, by keys alone: diffusers itself is not needed.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atelier.checkpoints import diffusers_files
from atelier.core.errors import UserError
from atelier.nets.autoencoder import Layout
from atelier.nets.autoencoder_kl import KLNet
from atelier.nets.quantizers import VectorQuantizer
from atelier.nets.vqgan import VQGANNet

CONFIG, WEIGHTS = diffusers_files.CONFIG, diffusers_files.WEIGHTS
KINDS = ("AutoencoderKL", "VQModel")
OUR_QUANTIZER = {
    "update": "ema",
    "ema_decay": 0.99,
    "commitment_weight": 0.25,
    "kmeans_init": False,
    "dead_code_threshold": 0.0,
}
ONLY = {"act_fn": "silu", "norm_type": "group"}  # the values whose layers are ours
NAMES = (  # our parts -> theirs
    (r"^(encoder|decoder)\.stem\.", r"\1.conv_in."),
    (r"^(encoder|decoder)\.head\.0\.", r"\1.conv_norm_out."),
    (r"^(encoder|decoder)\.head\.2\.", r"\1.conv_out."),
    (r"\.middle\.(\d)\.residual\.", r".mid_block.resnets.\1."),
    (r"\.middle\.(\d)\.attention\.", r".mid_block.attentions.\1."),
    (r"^encoder\.levels\.", "encoder.down_blocks."),
    (r"^decoder\.levels\.", "decoder.up_blocks."),
    (r"\.blocks\.(\d+)\.residual\.", r".resnets.\1."),
    (r"\.blocks\.(\d+)\.attention\.", r".attentions.\1."),
    (r"(down_blocks\.\d+)\.resample\.", r"\1.downsamplers.0."),
    (r"(up_blocks\.\d+)\.resample\.", r"\1.upsamplers.0."),
    (r"\.skip\.", ".conv_shortcut."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.out\.", r"\1.to_out.0."),
    (r"^(post_)?quant\.", r"\1quant_conv."),
    (r"^quantizer\.codebook$", "quantize.embedding.weight"),
)


def read(folder: Path | str, image_size: int | None = None, channels: int | None = None) -> KLNet | VQGANNet:
    """The net of a folder, float32 and in eval mode; what diffusion multiplies latents by is not part of it.

    Args:
        folder: folder with config.json and diffusion_pytorch_model.safetensors.
        image_size: height and width that `latent_shape` is for; None: the `sample_size` of the config.
        channels: channels of the images; None: whatever the config has.

    Raises:
        UserError: no such folder, a file is cut, or the net has parts that ours lack.
    """
    folder = Path(folder)
    config = diffusers_files.config(folder, KINDS, _refused)
    for key, value in ONLY.items():
        if config.get(key, value) != value:
            raise _refused(folder, f"{key}={config[key]} is not supported, only {value}")
    theirs = diffusers_files.weights(folder, _refused)
    net = _net(folder, config, image_size or _size(config))
    if channels not in (None, net.layout.image_channels):
        raise _refused(folder, f"it is of images of {net.layout.image_channels} channels, these have {channels}")
    state = net.state_dict()
    parts = {name: _their_names(name) for name in state if not _our_own(name)}
    found = diffusers_files.gathered(folder, theirs, parts, state, _refused)
    net.load_state_dict(found, strict=False, assign=True)
    if isinstance(net, VQGANNet):
        net.quantizer.sums.copy_(net.quantizer.codebook)
    return net.eval()


def shapes(folder: Path, config: dict[str, Any]) -> dict[str, list[int]]:
    """The tensors that diffusers has for a config, by name; nothing of their size is made.

    Args:
        folder: folder or file that it is from.
        config: config of diffusers.

    Raises:
        UserError: it has a part that ours lacks.
    """
    with torch.device("meta"):
        state = _net(folder, config, _size(config)).state_dict()
    return diffusers_files.shapes(state, {name: _their_names(name) for name in state if not _our_own(name)})


def fits(net: nn.Module | None) -> bool:
    """Whether `write` can make a folder of it."""
    return isinstance(net, KLNet) or (isinstance(net, VQGANNet) and isinstance(net.quantizer, VectorQuantizer))


def write(net: KLNet | VQGANNet, folder: Path | str, scaling_factor: float = 1.0, shift_factor: float = 0.0) -> None:
    """Make the folder that `diffusers.AutoencoderKL.from_pretrained` or `VQModel.from_pretrained` takes.

    Args:
        net: net with norms, attention and quantiser as diffusers has them.
        folder: place, made if it is not there; its two files are replaced.
        scaling_factor: number that latents are multiplied by before a diffusion model sees them.
        shift_factor: number that is subtracted from them before, of an AutoencoderKL.

    Raises:
        UserError: the quantiser is none that diffusers has.
    """
    diffusers_files.write(Path(folder), *exported(net, scaling_factor, shift_factor))


def exported(
    net: KLNet | VQGANNet, scaling_factor: float = 1.0, shift_factor: float = 0.0
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors that diffusers has for a net; the arguments are those of `write`.

    Raises:
        UserError: the quantiser is none that diffusers has.
    """
    if not fits(net):
        problem = f"diffusers has no {type(net.quantizer).__name__}"
        raise UserError(
            "model.net.quantizer", type(net.quantizer).__name__, problem, "quantizer@model.net.quantizer=vq"
        )
    state = {name: value for name, value in net.state_dict().items() if not _our_own(name)}
    theirs = diffusers_files.spread(state, {name: _their_names(name) for name in state})
    shift = {"shift_factor": shift_factor} if shift_factor else {}
    return _their_config(net) | {"scaling_factor": scaling_factor} | shift, theirs


def _their_names(name: str) -> list[str]:
    """Under which names diffusers keeps one of our tensors: three for queries, keys and values together."""
    for ours, theirs in NAMES:
        name = re.sub(ours, theirs, name)
    return [name.replace(".qkv.", f".to_{part}.") for part in "qkv"] if ".qkv." in name else [name]


def _our_own(name: str) -> bool:
    """What diffusers has no place for: the running statistics of a codebook."""
    return name.startswith("quantizer.") and name != "quantizer.codebook"


def _net(folder: Path, config: dict[str, Any], size: int) -> KLNet | VQGANNet:
    """A net of the layout that a config of diffusers describes; what it leaves out has diffusers' default."""
    widths = config.get("block_out_channels", [64])
    down = _attended(folder, config.get("down_block_types", ["DownEncoderBlock2D"]), "DownEncoderBlock2D")
    up = _attended(folder, config.get("up_block_types", ["UpDecoderBlock2D"]), "UpDecoderBlock2D")
    if down != up[::-1] or len(down) != len(widths):
        raise _refused(folder, "its decoder is not its encoder turned round")
    channels = config.get("in_channels", 3)
    if channels != config.get("out_channels", 3):
        raise _refused(folder, "it takes and gives different channels")
    shared = {
        "image_size": size,
        "image_channels": channels,
        "width": math.gcd(*widths),
        "multipliers": [width // math.gcd(*widths) for width in widths],
        "n_blocks": config.get("layers_per_block", 1),
        "attention": [size // 2**i for i, attended in enumerate(down) if attended],
        "middle_attention": config.get("mid_block_add_attention", True),
        "norm_groups": config.get("norm_num_groups", 32),
        "dropout": 0.0,
    }
    if config["_class_name"] == "VQModel":
        latent = config.get("latent_channels", 3)
        dim = config.get("vq_embed_dim") or latent
        quantizer = VectorQuantizer(n_codes=config.get("num_vq_embeddings", 256), dim=dim, **OUR_QUANTIZER)
        return VQGANNet(**shared, latent_channels=latent, quantizer=quantizer)
    quant = config.get("use_quant_conv", True)
    if quant != config.get("use_post_quant_conv", True):
        raise _refused(folder, "it has a convolution on one side of the latent alone")
    return KLNet(**shared, latent_channels=config.get("latent_channels", 4), quant_conv=quant)


def _attended(folder: Path, types: list[str], plain: str) -> list[bool]:
    """Which levels have attention."""
    unknown = [kind for kind in types if kind not in (plain, f"Attn{plain}")]
    if unknown:
        raise _refused(folder, f"it has a {unknown[0]}")
    return [kind != plain for kind in types]


def _size(config: dict[str, Any]) -> int:
    """`sample_size`, which may be [height, width]."""
    given = config.get("sample_size", 32)
    return given[0] if isinstance(given, list) else given


def _their_config(net: KLNet | VQGANNet) -> dict[str, Any]:
    layout: Layout = net.layout
    attended = [size in layout.attention for size in layout.sizes]
    config = {
        "in_channels": layout.image_channels,
        "out_channels": layout.image_channels,
        "down_block_types": [f"{'Attn' * a}DownEncoderBlock2D" for a in attended],
        "up_block_types": [f"{'Attn' * a}UpDecoderBlock2D" for a in attended[::-1]],
        "block_out_channels": layout.widths,
        "layers_per_block": layout.n_blocks,
        "act_fn": "silu",
        "sample_size": layout.image_size,
        "norm_num_groups": layout.groups,
        "mid_block_add_attention": layout.middle_attention,
        "latent_channels": net.latent_channels,
    }
    if isinstance(net, VQGANNet):
        codes = {"num_vq_embeddings": net.n_codes, "vq_embed_dim": net.quantizer.dim}
        return {"_class_name": "VQModel"} | config | codes
    quant = isinstance(net.quant, nn.Conv2d)
    return {"_class_name": "AutoencoderKL"} | config | {"use_quant_conv": quant, "use_post_quant_conv": quant}


def _refused(folder: Path, problem: str) -> UserError:
    fix = "model.first_stage.run=FOLDER with an AutoencoderKL or a VQModel of diffusers"
    return UserError("model.first_stage.run", folder, problem, fix)
