"""What a run keeps on disk for those after it: of which net, in which folder, and that all ranks make it together."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn

from atelier.core import ranks
from atelier.core.errors import UserError
from atelier.core.lines import say
from atelier.data.latent_cache import LatentCache
from atelier.data.text_cache import TextCache

PLAIN = (bool, int, float, str)  # and tuples of these


def net_hash(net: nn.Module) -> str:
    """sha256 of all that decides what a net computes: its modules' classes and plain attributes, its state dict.

    An attribute may be all that tells two first stages apart: whether one was trained without noise.
    """
    found = hashlib.sha256()
    for name, module in net.named_modules():
        plain = {k: v for k, v in sorted(vars(module).items()) if k[0] != "_" and k != "training" and _is_plain(v)}
        found.update(f"{name} {type(module).__name__} {plain}\n".encode())
    for name, tensor in sorted(net.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def _is_plain(value: Any) -> bool:
    return all(isinstance(one, PLAIN) for one in value) if isinstance(value, tuple) else isinstance(value, PLAIN)


def automatic(room: str, of: dict[str, Any]) -> Path:
    """A folder of its own for each identity, in a room of what is kept for all runs."""
    root = Path(os.environ.get("ATELIER_CACHE", "~/.cache/atelier")).expanduser()
    name = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:24]
    return root / room / name


def made(trainer: Trainer, cache: LatentCache | TextCache, fill: Callable[[], None]) -> None:
    """Have all ranks make together what is missing of a cache.

    Args:
        trainer: trainer of the run.
        cache: cache that is whole afterwards.
        fill: the part of this rank in it.

    Raises:
        UserError: that of the first rank that has one, on every rank.
    """
    first = trainer.is_global_zero
    if not all(everywhere(cache.check)):
        everywhere(cache.begin if first else lambda: None)
        if first:
            say(f"making {cache.describe()}")
        everywhere(fill)
        everywhere(cache.finish if first else lambda: None)
    everywhere(cache.check)
    if first:
        say(f"training reads {cache.describe()}")


def everywhere(work: Callable[[], Any]) -> list[Any]:
    """What some work gives on each rank, when all have done it.

    Raises:
        UserError: that of the first rank that has one, on every rank.
    """
    try:
        told = work()
    except UserError as error:
        told = error
    told = ranks.everyones(told)
    for one in told:
        if isinstance(one, UserError):
            raise one
    return told
