"""What can be known to fail before anything starts: keys, types, ranges, and what a model needs of its data."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf
from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from atelier.errors import UserError, nearest
from atelier.ranges import Name, NonNegFloat, NonNegInt, PositiveInt

CONF = Path(__file__).parents[2] / "conf"
ALLOWED = ("atelier.", "torch.nn.", "torch.optim.", "lightning.pytorch.loggers.", "torchvision.transforms.")
SPECIAL = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_", "first_stage")
MARGIN = 1.2
ROOT: dict[str, Any] = {
    "seed": NonNegInt,
    "run_dir": Name,
    "resume": Literal["auto", "never"],
    "compile": bool,
    "check": bool,
    "objective": Name | None,
    "run": Name,
    "n": PositiveInt,
    "out": Name | None,
    "batch_size": PositiveInt,
    "do": Name | None,
    "guidance": NonNegFloat | None,
    "label": NonNegInt | None,
    "ema": bool,
    "precision": Literal["auto", "32-true", "bf16-mixed", "16-mixed"] | None,
}


def overrides(given: list[str]) -> None:
    """Refuse `+key` and `~key`: they would be read by nothing, or take something needed away."""
    for text in given:
        if text.startswith(("+", "~")) and not text.startswith(("++hydra", "+hydra")):
            key = text.lstrip("+~").split("=")[0]
            close = nearest(key, known_keys())
            fix = f"{close}=VALUE" if close else "python train.py --cfg job lists every key"
            raise UserError(text.split("=")[0], text.partition("=")[2], "keys are neither added nor removed", fix)


@functools.cache
def known_keys() -> tuple[str, ...]:
    """Every dotted key that some page of conf/ has, and the names of the groups; to suggest the nearest."""
    keys: set[str] = set()
    for path in sorted(CONF.rglob("*.yaml")):
        node = OmegaConf.load(path)
        group = "" if path.parent in (CONF, CONF / "experiment") else path.parent.name
        if group:
            keys.add(group)
        keys.update(_dotted(OmegaConf.to_container(node), group))
    return tuple(sorted(keys))


def _dotted(node: Any, prefix: str) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key not in ("_target_", "_partial_", "defaults", "hydra"):
                yield from _dotted(value, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix


def check(cfg: DictConfig) -> None:
    """Check every leaf of a composed config against the annotation of the argument it becomes.

    Raises:
        UserError: the first leaf that does not fit.
    """
    for key, expected in ROOT.items():
        if key in cfg:
            _fits(cfg, key, key, expected)
    for key, node in _nodes(cfg, ""):
        _check_call(node, key)


def _nodes(node: DictConfig | ListConfig, prefix: str) -> Iterator[tuple[str, DictConfig]]:
    """Each dictionary with a `_target_`, and its dotted key."""
    if isinstance(node, DictConfig) and "_target_" in node:
        yield prefix, node
    keys = range(len(node)) if isinstance(node, ListConfig) else [k for k in node if k != "hydra"]
    for key in keys:
        if OmegaConf.is_missing(node, key):
            name = f"{prefix}.{key}" if prefix else str(key)
            raise UserError(name, "???", "it has no value", f"{name}=VALUE")
        if OmegaConf.is_interpolation(node, key) and isinstance(node[key], DictConfig):
            continue  # checked at its own place
        child = node[key]
        if isinstance(child, (DictConfig, ListConfig)):
            yield from _nodes(child, f"{prefix}.{key}" if prefix else str(key))


def _check_call(node: DictConfig, prefix: str) -> None:
    target = _target(node, prefix)
    named = inspect.signature(target).parameters
    parameters = {k: p for k, p in named.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    annotated = target if inspect.isfunction(target) or is_dataclass(target) else target.__init__
    hints = get_type_hints(annotated, include_extras=True)
    given = [key for key in node if key not in SPECIAL]
    for key in given:
        name = f"{prefix}.{key}"
        if key not in parameters:
            close = nearest(str(key), parameters)
            raise UserError(name, node[key], f"{node._target_} has no such argument", f"{prefix}.{close}=VALUE")
        _fits(node, key, name, hints.get(key, Any))
    missing = [p.name for p in parameters.values() if p.default is p.empty and p.name not in given]
    if missing and not node.get("_partial_") and "first_stage" not in node:
        raise UserError(f"{prefix}.{missing[0]}", "", "it has no value", f"{prefix}.{missing[0]}=VALUE")


def _target(node: DictConfig, prefix: str) -> Callable:
    path = str(node["_target_"])
    if not path.startswith(ALLOWED):
        fix = f"a class or function of {', '.join(a.rstrip('.') for a in ALLOWED)}"
        raise UserError(f"{prefix}._target_", path, "it is not on the list of what a config may call", fix)
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{prefix}._target_", path, f"it cannot be imported ({error})", "see conf/ for names") from error


@functools.lru_cache(maxsize=512)
def _adapter(expected: Any) -> TypeAdapter | None:
    try:
        return TypeAdapter(expected, config=ConfigDict(strict=True, arbitrary_types_allowed=True))
    except PydanticUserError:
        return None  # a type that pydantic has its own rules for


def _fits(node: DictConfig, key: str, name: str, expected: Any) -> None:
    """Check one leaf; where it is an interpolation the key that the user can change is named."""
    value = node[key]
    if isinstance(value, DictConfig):
        return  # a built object, checked as a node of its own
    if isinstance(value, ListConfig):
        value = OmegaConf.to_container(value, resolve=True)
        if any(isinstance(item, dict) for item in value):
            return
    adapter = _adapter(expected) if _hashable(expected) else TypeAdapter(expected, config=ConfigDict(strict=True))
    if adapter is None:
        return
    try:
        adapter.validate_python(value)
        if isinstance(value, float) and value in (float("inf"), float("-inf")) or value != value:
            raise UserError(_origin(node, key, name), value, "it must be a finite number", f"{name}=1")
    except ValidationError as error:
        problem, fix = _in_words(error, expected)
        name = _origin(node, key, name)
        raise UserError(name, "" if value is None else value, problem, f"{name}={fix}") from error


def _hashable(expected: Any) -> bool:
    try:
        hash(expected)
    except TypeError:
        return False
    return True


def _origin(node: DictConfig, key: str, name: str) -> str:
    raw = OmegaConf.to_container(node, resolve=False)[key]
    found = re.fullmatch(r"\$\{([\w.]+)\}", raw) if isinstance(raw, str) else None
    return found.group(1) if found else name


def _in_words(error: ValidationError, expected: Any) -> tuple[str, str]:
    """pydantic's complaint in a few words, and a value that would do."""
    first = error.errors()[0]
    message = first["msg"][0].lower() + first["msg"][1:]
    options = re.findall(r"'([^']+)'", str(first.get("ctx", {}).get("expected", "")))
    if options:
        return "it must be one of " + ", ".join(options), options[0]
    message = message.replace("input should be", "it must be").replace("a valid ", "a ")
    examples = {"int": "1", "float": "0.1", "bool": "true", "str": "NAME", "list": "[]"}
    kind = first["type"]
    example = next((value for word, value in examples.items() if kind.startswith(word)), "1")
    return message, "[...]" if first["loc"] and "list" in str(expected) else example


def match(model: Any, data: Any) -> None:
    """A model trains on what a set provides.

    Raises:
        UserError: a field is missing.
    """
    missing = sorted(model.needs - data.provides - {"image", "index"})
    if missing:
        has = ", ".join(sorted(data.provides)) or "images alone"
        problem = f"{type(model).__name__} needs {', '.join(missing)}, {type(data).__name__} has {has}"
        raise UserError("model", type(model).__name__, problem, "data=shapes has every field; or data.conditions=[]")


def writable(folder: Path) -> None:
    """The run folder can be made and written.

    Raises:
        UserError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        problem = f"the folder cannot be written ({error.strerror})"
        raise UserError("run_dir", folder, problem, "run_dir=A_FOLDER_OF_YOURS") from error


def fits_on_disk(model: Any, n_averages: int, folder: Path) -> None:
    """There is room for three checkpoints: weights, their averages, two moments a weight.

    Raises:
        UserError: there is not.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    needed = MARGIN * 3 * weights * (3 + n_averages) / 2**20
    free = shutil.disk_usage(folder).free / 2**20
    if free < needed:
        problem = f"{needed:.0f} MB are needed for checkpoints, {free:.0f} MB are free"
        raise UserError("run_dir", folder, problem, "run_dir=A_FOLDER_ON_A_LARGER_DISK")
