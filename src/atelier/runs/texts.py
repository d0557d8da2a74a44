"""The text cache of a run: which texts it is of, by which encoder, and that all ranks make it together."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from omegaconf import DictConfig
from torch import nn

from atelier.core.errors import UserError
from atelier.data.base import DataModule
from atelier.data.text_cache import KEY, TextCache
from atelier.models.base import Model
from atelier.nets.contracts import TextReader
from atelier.runs import keeping
from atelier.runs.preflight import texts_of

AT_ONCE = 32  # texts that are encoded at once, on however many ranks: rounding depends on it


def keep(cfg: DictConfig, model: Model, data: DataModule) -> None:
    """Where there is a `text_cache`, training looks its texts up in it from here on; it is made where there is none.

    Raises:
        UserError: this model reads no texts, this set keeps none, or the folder holds a cache of something else.
    """
    if cfg[KEY] is None:
        return
    readers = {name: module for name, module in model.named_modules() if isinstance(module, TextReader)}
    if not readers:
        problem = f"{type(model).__name__} reads no texts by a frozen encoder"
        raise UserError(KEY, cfg[KEY], problem, f"{KEY}=null")
    for name, reader in readers.items():
        cache = _cache(cfg[KEY], name, reader, data)
        cache.check()
        data.beforehand.append(partial(_made, cache=cache, reader=reader))


def _cache(asked: str, name: str, reader: TextReader, data: DataModule) -> TextCache:
    """That of one reader: a folder in `asked` with its name, or for `auto` one of its own."""
    (field,), encoder = reader.conditions, reader.encoder
    texts = trained_on(data, field)
    n_tokens = encoder.max_tokens if "tokens" in reader.cond_sizes else 0
    of = identity(encoder, n_tokens, texts)
    folder = keeping.automatic("texts", of) if asked == "auto" else Path(asked) / name
    return TextCache(folder, of, texts, (encoder.vector_dim, n_tokens, encoder.token_dim))


def trained_on(data: DataModule, field: str) -> list[str]:
    """The different texts of the images that are trained on, and the empty one, sorted.

    Raises:
        UserError: the set draws them on the spot.
    """
    texts = texts_of(data.split("train"), field, data.trained_on())
    if not texts:
        problem = f"it draws its {field}s on the spot, so there is no list of them to be kept"
        raise UserError("data", type(data).__name__, problem, f"{KEY}=null")
    return sorted({"", *texts})


def identity(encoder: nn.Module, n_tokens: int, texts: list[str]) -> dict[str, Any]:
    """Name to plain value of all that decides the encodings of texts."""
    content = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    net = {"text encoder": keeping.net_hash(encoder), "tokenizer": _tokenizers_hash(encoder)}
    return {"tokens of a text": n_tokens} | net | {"content of the texts": content}


def _tokenizers_hash(encoder: nn.Module) -> str:
    """sha256 of the objects of this house that the modules of a net hold beside modules and plain values."""
    found = hashlib.sha256()
    for name, module in encoder.named_modules():
        for key, held in sorted(vars(module).items()):
            if type(held).__module__.startswith("atelier.") and not isinstance(held, nn.Module):
                public = {k: v for k, v in sorted(vars(held).items()) if k[0] != "_"}
                found.update(f"{name} {key} {type(held).__name__} {public}\n".encode())
    return found.hexdigest()


def _made(trainer: Trainer, cache: TextCache, reader: TextReader) -> None:
    """Hand the reader its kept texts, once all ranks have made what is missing of them."""

    def fill() -> None:
        reader.encoder.to(trainer.strategy.root_device)
        cache.fill(reader.encode, AT_ONCE, trainer.global_rank, trainer.world_size)

    keeping.made(trainer, cache, fill)
    reader.kept = cache
