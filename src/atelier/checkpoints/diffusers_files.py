"""The two files of a folder of diffusers, and tensors that go under other names there, some in parts."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from atelier.core.errors import UserError

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
PRECISIONS = {"F16": torch.float16, "BF16": torch.bfloat16}  # of files, beside float32
EARLIER = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
Refused = Callable[[Path, str], UserError]  # the folder and the problem -> one line
Names = dict[str, list[str]]  # one of our tensors -> theirs that make it, one below the other


def told(folder: Path, path: Path, refused: Refused) -> dict[str, Any]:
    """What a JSON file of a folder, or beside it, says.

    Raises:
        UserError: it cannot be read, or is none.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise refused(folder, f"it has no readable {path.name} ({error.strerror})") from error
    except ValueError as error:
        raise refused(folder, f"{path.name} is no JSON") from error


def config(folder: Path, kinds: Collection[str], refused: Refused) -> dict[str, Any]:
    """The config.json of a folder, of a net of one of these classes.

    Raises:
        UserError: there is none, or it is of another class.
    """
    found = told(folder, folder / CONFIG, refused)
    kind = found.get("_class_name")
    if kind not in kinds:
        raise refused(folder, f"it holds a {kind}, not {_one_of(kinds)}")
    return found


def weights(folder: Path, refused: Refused) -> dict[str, Tensor]:
    """Its tensors, float32, those of attention under their present names.

    Raises:
        UserError: there is no file of them, or it is cut.
    """
    path = folder / WEIGHTS
    if not path.exists():
        raise refused(folder, f"it has no {WEIGHTS}; pickled weights are not read")
    try:
        theirs = load_file(path)
    except SafetensorError as error:
        raise refused(folder, f"{WEIGHTS} is cut ({error})") from error
    renamed = {}
    for name, value in theirs.items():
        for earlier, now in EARLIER.items():
            name = name.replace(earlier, now) if "attentions." in name else name
        renamed[name] = value.float()
    return renamed


def precision(path: Path) -> torch.dtype:
    """The half precision that all numbers of a .safetensors have that are no whole ones; else float32."""
    with safe_open(path, "pt") as file:
        found = {file.get_slice(name).get_dtype() for name in file.keys()} - {"I64", "I32"}
    return PRECISIONS.get(found.pop(), torch.float32) if len(found) == 1 else torch.float32


def gathered(
    folder: Path, theirs: dict[str, Tensor], names: Names, ours: dict[str, Tensor], refused: Refused
) -> dict[str, Tensor]:
    """Our tensors, made of theirs; one that is made of one alone is that itself, so that a large net lies here once.

    Args:
        folder: folder that they are from.
        theirs: tensors of `folder` by name.
        names: names of theirs that make each of ours.
        ours: tensors of the shapes that are wanted.
        refused: maker of the error.

    Raises:
        UserError: one is missing, another is there, or one has another shape.
    """
    wanted, given = {part for parts in names.values() for part in parts}, set(theirs)
    if missing := sorted(wanted - given):
        raise refused(folder, f"{WEIGHTS} lacks {missing[0]}")
    if more := sorted(given - wanted):
        raise refused(folder, f"{WEIGHTS} also holds {more[0]}")
    for part, shape in shapes(ours, names).items():
        if list(theirs[part].shape) != shape:
            raise refused(folder, f"{part} has another shape than {CONFIG} says: {list(theirs[part].shape)}")
    return {name: _whole([theirs[part] for part in parts]) for name, parts in names.items()}


def shapes(ours: dict[str, Tensor], names: Names) -> dict[str, list[int]]:
    """The shapes of their tensors that make ours."""
    return {
        part: [size // len(parts) if axis == 0 else size for axis, size in enumerate(ours[name].shape)]
        for name, parts in names.items()
        for part in parts
    }


def square(folder: Path, given: Any, refused: Refused) -> int:
    """The side of images of a `sample_size`, which may be [height, width].

    Raises:
        UserError: it is of no square.
    """
    sides = set(given) if isinstance(given, list) else {given}
    if len(sides) > 1 or None in sides:
        raise refused(folder, f"sample_size={given} is no side of a square")
    return sides.pop()


def spread(ours: dict[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Their tensors, made of ours: copies."""
    theirs = {}
    for name, value in ours.items():
        parts = value.chunk(len(names[name]))
        theirs |= {n: part.clone() for n, part in zip(names[name], parts, strict=True)}
    return theirs


def write(folder: Path, config: dict[str, Any], theirs: dict[str, Tensor], weights: str = WEIGHTS) -> None:
    """Both files, the second of which is named `weights`; the folder is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(theirs, folder / weights, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _whole(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _one_of(kinds: Collection[str]) -> str:
    return " or ".join(f"a{'n' * (kind[0] == 'A')} {kind}" for kind in kinds)
