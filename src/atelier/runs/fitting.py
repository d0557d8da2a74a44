"""Whether a value of a config fits the annotation of the argument that it becomes, and what is offered where not."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from atelier.core.errors import UserError, nearest
from atelier.core.words import typed_value, word
from atelier.runs.pages import known_keys, placed

ALLOWED = (  # where a config may call what is defined
    "models",
    "nets",
    "diffusion",
    "data",
    "losses",
    "metrics",
    "callbacks",
    "evaluation",
    "optim",
    "runs.trainer",
    "runs.loggers",
)
STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
EXAMPLES = (True, 0.1, 1, "NAME", [0.9, 0.99], [1], [], None)


def called(path: Any, prefix: str) -> Callable:
    """The class or function of this project that a `_target_` names; nothing else is ever called."""
    fix = "a class or function of src/atelier, as in the pages of conf/"
    module, _, name = str(path).rpartition(".")
    if not any(f"{module}.".startswith(f"atelier.{place}.") for place in ALLOWED):
        raise UserError(f"{prefix}._target_", path, "it is not on the list of what a config may call", fix)
    try:
        found = getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and not f"{module}.".startswith(f"{error.name}."):
            raise  # something that the module needs
        raise UserError(f"{prefix}._target_", path, "there is no such class or function", fix) from error
    if not (inspect.isclass(found) or inspect.isfunction(found)) or found.__module__ != module:
        raise UserError(f"{prefix}._target_", path, f"{module} does not define it", fix)
    return found


@functools.cache
def arguments(target: Callable) -> dict[str, inspect.Parameter]:
    """The named arguments of a class or function, their annotations evaluated."""
    own = target if inspect.isfunction(target) or is_dataclass(target) else target.__init__
    hints = get_type_hints(own, include_extras=True)
    named = inspect.signature(target).parameters.items()
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {key: p.replace(annotation=hints.get(key, Any)) for key, p in named if p.kind not in kinds}


@functools.cache
def _adapter(expected: Any) -> TypeAdapter | None:
    try:
        return TypeAdapter(expected, config=STRICT)
    except PydanticUserError:
        return None  # a dataclass: only an object will do


def fitted(value: Any, name: str, expected: Any) -> Any:
    """One value, plain or an object to be built, as an annotation has it: a whole number where it says float is one.

    Raises:
        UserError: it does not fit.
    """
    if isinstance(value, dict) and "_target_" in value:
        _fits_object(value, name, expected)
        return value
    if isinstance(value, dict) and get_origin(expected) is dict:
        keys, kind = get_args(expected)
        for key in value:
            if get_origin(keys) is Literal and key not in get_args(keys):
                raise UserError(f"{name}.{key}", value[key], "there is no such key", f"{name}.{get_args(keys)[0]}=...")
        return {key: fitted(child, f"{name}.{key}", kind) for key, child in value.items()}
    adapter = _adapter(expected)
    if adapter is None:
        raise UserError(name, value, f"it must be built: a {expected.__name__}", _built(name, value))
    options = _options(expected)
    if isinstance(value, bool) and options and not any(option is value for option in options):
        fix = _fix(name, value, expected, adapter)
        raise UserError(name, value, f"it must be one of {typed_value(options)}", fix)
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        shown = typed_value(value) if value is None or isinstance(value, str) else value
        raise UserError(name, shown, _problem(error), _fix(name, value, expected, adapter)) from error


def _fits_object(node: dict[str, Any], name: str, expected: Any) -> None:
    """A class must be of the kind that the argument takes, a function must return it."""
    target, partial = called(node["_target_"], name), node.get("_partial_", False)
    fitted(partial, f"{name}._partial_", bool)
    made = Callable if partial else target
    if inspect.isfunction(made):
        made = get_type_hints(made).get("return", Any)
    kinds = [get_origin(kind) or kind for kind in (get_args(expected) or (expected,)) if kind is not type(None)]
    if expected is Any or any(kind is made or _is(made, kind) for kind in kinds):
        return
    key = f"{name}._partial_" if "_partial_" in node else f"{name}._target_"
    wanted = getattr(expected, "__name__", expected)
    raise UserError(key, node[key.rpartition(".")[2]], f"it makes no {wanted}", _built(name))


def _is(made: Any, kind: Any) -> bool:
    if not inspect.isclass(made) or not inspect.isclass(kind):
        return False
    if getattr(kind, "_is_protocol", False):
        return all(_takes(made, name, method) for name, method in _methods(kind))
    return issubclass(made, kind)


def _methods(contract: type) -> Iterator[tuple[str, Callable]]:
    """Those that a protocol asks for; of its attributes only an object knows."""
    for name, value in vars(contract).items():
        if inspect.isfunction(value) and (name == "__call__" or not name.startswith("_")):
            yield name, value


def _takes(made: type, name: str, asked: Callable) -> bool:
    """Whether a class has a method that takes as many arguments; a module is called by its `forward`."""
    own = getattr(made, "forward" if name == "__call__" and hasattr(made, "forward") else name, None)
    try:
        inspect.signature(own).bind(*inspect.signature(asked).parameters)
    except (TypeError, ValueError):
        return False
    return True


def _problem(error: ValidationError) -> str:
    """pydantic's complaint in a few words."""
    first = error.errors()[0]
    place = next((f"item {part}: " for part in first["loc"] if isinstance(part, int)), "")
    message = (
        first["msg"].replace("Input should be", "it must be").replace("a valid i", "an i").replace("a valid ", "a ")
    )
    return place + message[0].lower() + message[1:]


def _fix(name: str, value: Any, expected: Any, adapter: TypeAdapter) -> str:
    """An override that does: the group whose page the value names, or one found by trying."""
    if (chosen := placed(name, str(value))) and chosen.endswith(f"={value}"):
        return chosen
    options, shipped = _options(expected), known_keys().get(name)
    if "${" in str(shipped) and not options:  # the page has it from another key, whose bounds it shares
        return f"leave {name} out"
    close = nearest(str(value), [str(option) for option in options])
    alike = [option for option in options if str(option) == close]
    own = [] if shipped is None or "???" in str(shipped) or "${" in str(shipped) else [shipped]  # of that page alone
    candidates = [*alike, *own, *options, *([o] for o in options), *EXAMPLES]
    for candidate in candidates:
        try:
            adapter.validate_python(candidate)
        except ValidationError:
            continue
        return word(name, candidate)
    return _built(name, value)


def _built(name: str, value: Any = "") -> str:
    """How an object is asked for that no value can be."""
    return placed(name, str(value)) or f"{name} as in the pages of conf/"


def _options(expected: Any) -> list[Any]:
    """The values that a Literal anywhere in an annotation lists."""
    if get_origin(expected) is Literal:
        return list(get_args(expected))
    return [option for part in get_args(expected) for option in _options(part)]
