"""Names of tensors in a single file of Stable Diffusion and in the folders of diffusers and transformers, by rule.

A name is what stands behind the part's prefix in the file. L is the number of residual blocks of a level on the way
down, of which the way up has one more.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

RESIDUAL = {  # theirs -> in the file
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.attentions.0": "middle_block.1",
}
MIDDLE = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
IN_MIDDLE, VAE_ATTENDED = r"middle_block\.[02]\.", r"mid\.attn_1\."
VAE_MIDDLE = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "conv_norm_out": "norm_out",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
VAE_RESIDUAL = {"conv_shortcut": "nin_shortcut"}
OPEN_CLIP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def unet_to_file(name: str, n_layers: int, attends: Sequence[bool]) -> str:
    """A name of the U-Net in the file.

    Args:
        name: name of it in a UNet2DConditionModel.
        n_layers: L.
        attends: levels that have attention, the largest maps first.
    """
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
    if found is None:
        before = _front(name, MIDDLE)
        return _front(name, ENDS) if before == name else _behind(before, IN_MIDDLE, RESIDUAL)
    way, level, kind, k, rest = found.groups()
    first = int(level) * (n_layers + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + n_layers + 1}.0.{_front(rest, {'conv': 'op'})}"
    if kind == "upsamplers":
        return f"output_blocks.{first + n_layers}.{1 + attends[len(attends) - 1 - int(level)]}.{rest}"
    block = f"input_blocks.{1 + first + int(k)}" if way == "down" else f"output_blocks.{first + int(k)}"
    return f"{block}.0.{_front(rest, RESIDUAL)}" if kind == "resnets" else f"{block}.1.{rest}"


def unet_from_file(name: str, n_layers: int) -> str:
    """The inverse of `unet_to_file`.

    Args:
        name: name in the file.
        n_layers: L.
    """
    found = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d)\.(.+)", name)
    if found is None or name.startswith("input_blocks.0."):
        if re.match(IN_MIDDLE, name):
            return _front(_behind(name, IN_MIDDLE, _turned(RESIDUAL)), _turned(MIDDLE))
        return _front(name, _turned(ENDS))
    side, number, slot, rest = found.groups()
    way = "down" if side == "input" else "up"
    level, k = divmod(int(number) - (side == "input"), n_layers + 1)
    if rest.startswith(("op.", "conv.")):
        return f"{way}_blocks.{level}.{way}samplers.0.{_front(rest, {'op': 'conv'})}"
    inside = f"resnets.{k}.{_front(rest, _turned(RESIDUAL))}" if slot == "0" else f"attentions.{k}.{rest}"
    return f"{way}_blocks.{level}.{inside}"


def vae_to_file(name: str, n_levels: int) -> str:
    """A name of the autoencoder in the file, whose levels on the way up are counted from the largest maps.

    Args:
        name: name of it in an AutoencoderKL.
        n_levels: number of its levels.
    """
    side, _, rest = name.partition(".")
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", rest)
    if found is None:
        return f"{side}.{_behind(_front(rest, VAE_MIDDLE), VAE_ATTENDED, VAE_ATTENTION)}"
    way, level, kind, k, last = found.groups()
    level = int(level) if way == "down" else n_levels - 1 - int(level)
    inside = f"block.{k}.{_front(last, VAE_RESIDUAL)}" if kind == "resnets" else f"{way}sample.{last}"
    return f"{side}.{way}.{level}.{inside}"


def vae_from_file(name: str, n_levels: int) -> str:
    """The inverse of `vae_to_file`.

    Args:
        name: name in the file.
        n_levels: number of levels.
    """
    side, _, rest = name.partition(".")
    found = re.fullmatch(r"(down|up)\.(\d+)\.(block\.(\d+)|\w+sample)\.(.+)", rest)
    if found is None:
        return f"{side}.{_front(_behind(rest, VAE_ATTENDED, _turned(VAE_ATTENTION)), _turned(VAE_MIDDLE))}"
    way, level, kind, k, last = found.groups()
    level = int(level) if way == "down" else n_levels - 1 - int(level)
    inside = f"{way}samplers.0.{last}" if k is None else f"resnets.{k}.{_front(last, _turned(VAE_RESIDUAL))}"
    return f"{side}.{way}_blocks.{level}.{inside}"


def open_clip_to_file(name: str) -> str:
    """A name of a text encoder of OpenCLIP in the file, where queries, keys and values are one tensor.

    Args:
        name: name of it in a CLIPTextModelWithProjection.
    """
    found = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)", name)
    if found is None:
        return OPEN_CLIP.get(name, name)
    layer, rest = found.groups()
    rest = re.sub(r"^self_attn\.[qkv]_proj\.(\w+)$", r"attn.in_proj_\1", rest)
    return f"transformer.resblocks.{layer}.{_front(rest, OPEN_CLIP_LAYER)}"


def open_clip_from_file(name: str) -> list[str]:
    """The inverse of `open_clip_to_file`: three names where queries, keys and values are one tensor.

    Args:
        name: name in the file.
    """
    found = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name)
    if found is None:
        return [_turned(OPEN_CLIP).get(name, name)]
    layer, rest = f"text_model.encoder.layers.{found[1]}.", found[2]
    together = re.fullmatch(r"attn\.in_proj_(\w+)", rest)
    if together:
        return [f"{layer}self_attn.{part}_proj.{together[1]}" for part in "qkv"]
    return [layer + _front(rest, _turned(OPEN_CLIP_LAYER))]


def _front(name: str, parts: dict[str, str]) -> str:
    """The name with the parts that it begins with replaced."""
    for before, after in parts.items():
        if name.startswith(f"{before}."):
            return after + name.removeprefix(before)
    return name


def _behind(name: str, pattern: str, parts: dict[str, str]) -> str:
    """The name with the parts replaced that stand behind what it begins with."""
    found = re.match(pattern, name)
    return found[0] + _front(name.removeprefix(found[0]), parts) if found else name


def _turned(parts: dict[str, str]) -> dict[str, str]:
    return {after: before for before, after in parts.items()}
