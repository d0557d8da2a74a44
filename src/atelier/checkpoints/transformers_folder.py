"""CLIP's text encoder in the folder format of transformers: config.json, model.safetensors and the tokenizer's files.

Reads what transformers calls CLIPTextModel, CLIPTextModelWithProjection and the text half of CLIPModel, by keys alone:
transformers itself is not needed.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atelier.checkpoints import diffusers_files, weight_files
from atelier.core.errors import UserError
from atelier.core.ranges import Name
from atelier.nets.contracts import Layer
from atelier.nets.transformers_text import TransformersText
from atelier.nets.words import BytePairs

CONFIG, WEIGHTS = "config.json", "model.safetensors"
TOKENIZER = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
KINDS = ("clip", "clip_text_model")
DEFAULTS = {  # of transformers' CLIPTextConfig, for what a config leaves out
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
NAMES = (  # our parts -> theirs
    (r"^rows\.", "embeddings.token_embedding."),
    (r"^places\.", "embeddings.position_embedding."),
    (r"^norm\.", "final_layer_norm."),
    (r"^out\.", "text_projection."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"\.mlp_in\.", ".mlp.fc1."),
    (r"\.mlp_out\.", ".mlp.fc2."),
    (r"(layers\.\d+)\.(qkv|out)\.", r"\1.self_attn.\2_proj."),
)
JOINED = r"self_attn\.[qkv]_proj\."  # one layer of ours


def text_encoder(folder: Name, layer: Layer = "last", final_norm: bool = True, fetch: bool = False) -> TransformersText:
    """The text encoder of a folder, float32, in eval mode and without gradients.

    Args:
        folder: folder on disk, `text_encoder` of a diffusers folder for instance, or OWNER/NAME of the hub, with a
            folder in it behind a third slash: OWNER/NAME/text_encoder.
        layer: block whose states are the tokens (`TransformersText`).
        final_norm: whether the last norm follows it.
        fetch: may download what the hub's cache on disk lacks.

    Raises:
        UserError: it is not there, a file is absent, cut or pickled, or it is no CLIP.
    """
    place = located(folder, fetch)
    config = _config(place)
    theirs, words = _weights(place), _tokenizer(place)
    projection = theirs.get("text_projection.weight")
    with torch.device("meta"):
        net = TransformersText(
            words=words,
            width=config["hidden_size"],
            n_layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            hidden_dim=config["intermediate_size"],
            max_tokens=config["max_position_embeddings"],
            n_rows=config["vocab_size"],
            vector_dim=None if projection is None else len(projection),
            activation=config["hidden_act"],
            eps=config["layer_norm_eps"],
            end=config["eos_token_id"],
            layer=layer,
            final_norm=final_norm,
        )
    found = {name: _one(place, theirs, name, value) for name, value in net.state_dict().items()}
    net.load_state_dict(found, assign=True)
    return net.eval().requires_grad_(False)


def located(folder: Name, fetch: bool) -> Path:
    """The folder on disk, that of the hub's cache, or the one that is downloaded where `fetch` allows it.

    Raises:
        UserError: there is none.
    """
    place = Path(folder).expanduser()
    if place.is_dir():
        return place
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w.-]+)?", str(folder)) or str(folder).startswith("."):
        raise _refused(folder, "there is no such folder")
    owner, name, *inside = str(folder).split("/")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ModuleNotFoundError as error:
        raise _refused(folder, "there is no such folder, and huggingface-hub is not installed") from error
    files = (CONFIG, *weight_files.patterns(WEIGHTS), *TOKENIZER)
    wanted = [f"{part}{file}" for part in _parts(inside) for file in files]
    for local in (True, False) if fetch else (True,):
        try:
            found = Path(snapshot_download(f"{owner}/{name}", allow_patterns=wanted, local_files_only=local))
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError):
            continue
        if weight_files.found(found.joinpath(*inside), WEIGHTS, _refused):
            return found.joinpath(*inside)
    if fetch:
        raise _refused(folder, f"the hub could not be reached, or has no {WEIGHTS} there")
    raise UserError(
        ".folder", folder, "no such folder, and the hub's cache on disk lacks it", ".fetch=true downloads it"
    )


def _parts(inside: list[str]) -> list[str]:
    """The folder of the encoder in a snapshot and that of its tokenizer, with their slash."""
    return [f"{inside[0]}/", f"{_tokenizers(inside[0])}/"] if inside else [""]


def _tokenizers(name: str) -> str:
    """`tokenizer_2` of `text_encoder_2`, as diffusers names them."""
    return name.replace("text_encoder", "tokenizer")


def _config(folder: Path) -> dict[str, Any]:
    """What CLIPTextConfig says, by its names."""
    found = diffusers_files.told(folder, folder / CONFIG, _refused)
    if found.get("model_type") not in KINDS:
        raise _refused(folder, f"it holds a {found.get('model_type')}, no CLIP text encoder")
    found = DEFAULTS | found.get("text_config", found)
    if found["hidden_act"] not in ("quick_gelu", "gelu"):
        raise _refused(folder, f"hidden_act={found['hidden_act']} is not supported, only quick_gelu and gelu")
    return found


def _weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of the text half, float32, under their names in CLIPTextModel."""
    of_images = ("vision_model.", "visual_projection.")
    theirs = weight_files.read(folder, WEIGHTS, _refused, JOINED, lambda name: not name.startswith(of_images))
    return {name.removeprefix("text_model."): value for name, value in theirs.items()}


def their_names(name: str) -> list[str]:
    """Under which names CLIPTextModel keeps one of our tensors: three for queries, keys and values together."""
    for own, other in NAMES:
        name = re.sub(own, other, name)
    return [name.replace(".qkv_proj.", f".{part}_proj.") for part in "qkv"] if ".qkv_proj." in name else [name]


def _one(folder: Path, theirs: dict[str, Tensor], name: str, ours: Tensor) -> Tensor:
    """One of our tensors, made of theirs."""
    names = their_names(name)
    if missing := [part for part in names if part not in theirs]:
        raise _refused(folder, f"{WEIGHTS} lacks {missing[0]}")
    found = theirs[names[0]] if len(names) == 1 else torch.cat([theirs[part] for part in names])
    if found.shape != ours.shape:
        raise _refused(folder, f"{names[0]} has another shape than {CONFIG} says: {list(theirs[names[0]].shape)}")
    return found


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """The files of the tokenizer of an encoder, beside its weights or in the folder that diffusers has for it."""
    for place in (folder, folder.parent / _tokenizers(folder.name)):
        found = {name: place / name for name in TOKENIZER if (place / name).exists()}
        if {"vocab.json", "merges.txt"} <= found.keys() or "tokenizer.json" in found:
            return found
    return {}


def exported(net: TransformersText) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of CLIPTextModel, or of CLIPTextModelWithProjection where there is a projection.

    Their names have `text_model.` in front, which older programs look for and transformers itself does without.
    """
    block, projects = net.blocks[0], isinstance(net.out, nn.Linear)
    config = {
        "architectures": ["CLIPTextModelWithProjection" if projects else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_size": net.token_dim,
        "intermediate_size": block.mlp_in.out_features,
        "num_hidden_layers": len(net.blocks),
        "num_attention_heads": block.heads,
        "max_position_embeddings": net.max_tokens,
        "vocab_size": net.rows.num_embeddings,
        "hidden_act": "quick_gelu" if block.quick else "gelu",
        "layer_norm_eps": block.norm1.eps,
        "projection_dim": net.vector_dim,
        "bos_token_id": net.words.start,
        "eos_token_id": net.end,
        "pad_token_id": net.words.pad,
    }
    state = net.state_dict()
    theirs = diffusers_files.spread(state, {name: their_names(name) for name in state})
    return config, {n if n.startswith("text_projection.") else f"text_model.{n}": v for n, v in theirs.items()}


def write(net: TransformersText, folder: Path | str) -> None:
    """Make the folder that `CLIPTextModel.from_pretrained` takes; it is made if it is not there."""
    diffusers_files.write(Path(folder), *exported(net), weights=WEIGHTS)


def write_tokenizer(words: BytePairs, folder: Path, pad: str, max_tokens: int) -> None:
    """Make the folder of a tokenizer; it is made if it is not there.

    Args:
        words: tokenizer.
        folder: place.
        pad: name of its padding.
        max_tokens: tokens of a text that are read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pairs = "\n".join(" ".join(pair) for pair in words.order)
    (folder / "vocab.json").write_text(json.dumps(words.rows, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(f"#version: 0.2\n{pairs}\n", encoding="utf-8")
    told = {"tokenizer_class": "CLIPTokenizer", "pad_token": pad, "bos_token": "<|startoftext|>"}
    told |= {"eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "model_max_length": max_tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(told, indent=2))


def _tokenizer(folder: Path) -> BytePairs:
    """The tokenizer with its padding.

    Where that is "!", as of Stable Diffusion 2, a "!" in a text stays the word that it was in training; transformers
    makes padding of it.
    """
    found = tokenizer_files(folder)
    if not found:
        raise _refused(folder, "it has no vocab.json and merges.txt, and no tokenizer.json")
    if "vocab.json" in found and "merges.txt" in found:
        rows = diffusers_files.told(folder, found["vocab.json"], _refused)
        lines = [line.split() for line in found["merges.txt"].read_text(encoding="utf-8").split("\n")]
        pairs = [(line[0], line[1]) for line in lines if len(line) == 2 and line[0] != "#version:"]
    else:
        model = diffusers_files.told(folder, found["tokenizer.json"], _refused)["model"]
        rows = model["vocab"]
        pairs = [tuple(pair.split() if isinstance(pair, str) else pair) for pair in model["merges"]]
    return BytePairs(rows, pairs, rows.get(_pad(folder, found)))


def _pad(folder: Path, found: dict[str, Path]) -> str:
    """The padding that a tokenizer's config names; else the end mark, as transformers has it."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if name in found:
            pad = diffusers_files.told(folder, found[name], _refused).get("pad_token")
            if pad is not None:
                return pad["content"] if isinstance(pad, dict) else pad
    return "<|endoftext|>"


def _refused(folder: Path | str, problem: str) -> UserError:
    return UserError(".folder", folder, problem, ".folder=FOLDER with a CLIP text encoder of transformers")
