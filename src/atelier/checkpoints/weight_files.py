"""Which files of a published folder hold its weights: one, several with an index of them, or those of a variant.

NAME.safetensors, or NAME-00001-of-00002.safetensors ... by NAME.safetensors.index.json; of a variant, as fp16,
NAME.fp16.safetensors or what NAME.safetensors.index.fp16.json lists. So diffusers and transformers name them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from atelier.core.errors import UserError

Refused = Callable[[Path, str], UserError]  # the folder and the problem -> one line
SUFFIX = ".safetensors"
PRECISIONS = {"F16": torch.float16, "BF16": torch.bfloat16}  # of files, beside float32


class Found(NamedTuple):
    """Names of files: `index` lists `shards`; without one there is a single file. `variant`: "" of the plain ones."""

    shards: tuple[str, ...]
    index: str | None = None
    variant: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        return self.shards if self.index is None else (self.index, *self.shards)


def found(folder: Path, name: str, refused: Refused) -> Found | None:
    """The files with the weights that are called `name` where they are one file; None where there are none.

    The plain ones go before a variant, one file before several.

    Args:
        folder: folder that they lie in.
        name: file name that ends in .safetensors.
        refused: maker of the error.

    Raises:
        UserError: an index cannot be read or lists what is not there, or there are several variants and nothing else.
    """
    stem = re.escape(name.removesuffix(SUFFIX))
    ways = rf"{stem}\.(\w+)\.safetensors", rf"{stem}\.safetensors\.index\.(\w+)\.json"
    there = [path.name for path in sorted(folder.glob("*"))] if folder.is_dir() else []
    variants = sorted({match[1] for way in ways for one in there if (match := re.fullmatch(way, one))})
    if name in there or f"{name}.index.json" in there:
        variants = [""]
    if len(variants) > 1:
        raise refused(folder, f"it has no {name}, but the variants {', '.join(variants)}: leave one of them")
    return _of_variant(folder, name, variants[0], there, refused) if variants else None


def _of_variant(folder: Path, name: str, variant: str, there: list[str], refused: Refused) -> Found:
    dotted = f".{variant}" if variant else ""
    one, index = f"{name.removesuffix(SUFFIX)}{dotted}{SUFFIX}", f"{name}.index{dotted}.json"
    if one in there:
        return Found((one,), None, variant)
    return Found(tuple(sorted(set(_listed(folder, index, refused).values()))), index, variant)


def _listed(folder: Path, index: str, refused: Refused) -> dict[str, str]:
    """Which file holds a tensor, as an index says; all of them are there."""
    try:
        listed = json.loads((folder / index).read_text(encoding="utf-8"), object_pairs_hook=_once)["weight_map"]
        names = set(listed.values())
    except _Twice as twice:
        raise refused(folder, f"{index} lists {twice} twice") from twice
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise refused(folder, f"{index} is no index of weights") from error
    for name in sorted(map(str, names)):
        if not name.endswith(SUFFIX) or Path(name).name != name:
            raise refused(folder, f"{index} lists {name}; only {SUFFIX} beside it are read, no pickled weights")
        if not (folder / name).is_file():
            raise refused(folder, f"it lacks {name}, which {index} lists")
    if not names:
        raise refused(folder, f"{index} lists nothing")
    return listed


class _Twice(Exception):
    """A name that an object of JSON has twice."""


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    for name, times in Counter(name for name, _ in pairs).items():
        if times > 1:
            raise _Twice(name)
    return dict(pairs)


def read(
    folder: Path, name: str, refused: Refused, joined: str = "", wanted: Callable[[str], bool] = bool
) -> dict[str, Tensor]:
    """The tensors of a folder by name, float32, of which only what is used later stays in memory.

    They are parts of the mapped files where those are float32. All numbers are looked at in a mapping of their own, and
    so are tensors that are only there to be joined to others: a mapping goes with the last tensor of it.

    Args:
        folder: folder that they lie in.
        name: name of the file of weights where they are one.
        refused: maker of the error.
        joined: regular expression of what is in the names of tensors that will be joined; "": none are.
        wanted: whether a tensor of this name is read.

    Raises:
        UserError: there are none, a file is cut, not all numbers are finite, or the files hold other tensors than
            their index lists.
    """
    there = found(folder, name, refused)
    if there is None:
        raise refused(folder, f"it has no {name}; pickled weights (.bin) are not read")
    listed = None if there.index is None else _listed(folder, there.index, refused)
    tensors: dict[str, Tensor] = {}
    for shard in there.shards:
        try:
            with safe_open(folder / shard, "pt") as file:
                held = list(file.keys())
                if listed is not None:
                    _check(folder, shard, held, listed, refused)
                keys = [key for key in held if wanted(key)]
                if broken := next((key for key in keys if not file.get_tensor(key).isfinite().all()), None):
                    raise refused(folder, f"not all numbers of {broken} are finite")
            apart = {key for key in keys if joined and re.search(joined, key)}
            for together in (apart, set(keys) - apart):
                with safe_open(folder / shard, "pt") as file:
                    tensors |= {key: file.get_tensor(key).float() for key in keys if key in together}
        except SafetensorError as error:
            raise refused(folder, f"{shard} is cut ({error})") from error
    return tensors


def precision(folder: Path, name: str) -> torch.dtype:
    """The half precision that all numbers of a folder's weights have that are no whole ones; else float32."""
    files = found(folder, name, lambda place, problem: UserError("folder", place, problem, "whole weights"))
    kinds: set[str] = set()
    for shard in () if files is None else files.shards:
        with safe_open(folder / shard, "pt") as file:
            kinds |= {file.get_slice(key).get_dtype() for key in file.keys()}
    kinds -= {"I64", "I32"}
    return PRECISIONS.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32


def _check(folder: Path, shard: str, held: list[str], listed: dict[str, str], refused: Refused) -> None:
    """Refuse a file that holds other tensors than the index says."""
    for key in held:
        if listed.get(key) != shard:
            where = f"is in {listed[key]} too" if key in listed else "the index does not list"
            raise refused(folder, f"{shard} holds {key}, which {where}")
    if missing := sorted({key for key, file in listed.items() if file == shard} - set(held)):
        raise refused(folder, f"{shard} lacks {missing[0]}")


def patterns(name: str) -> list[str]:
    """Names of the files, as a download asks for them: the plain ones, whether one or several."""
    return [name, f"{name}.index.json", f"{name.removesuffix(SUFFIX)}-?????-of-?????{SUFFIX}"]
