"""What conf/ holds: every key of its pages, and the groups that stand inside a page."""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atelier.core.errors import nearest

if TYPE_CHECKING:
    from omegaconf import DictConfig

CONF = Path(__file__).parents[3] / "conf"
HIDDEN = ("_target_", "_partial_", "defaults", "hydra")  # what of a page is no key of a user


@functools.cache
def known_keys(script: str = "") -> dict[str, Any]:
    """Every dotted key that some page of conf/ has with its value there (a dictionary holds further keys).

    The name of a group has the name of one of its pages. `script`: only those that it has; "": of all of them.
    """
    from omegaconf import OmegaConf

    keys: dict[str, Any] = {}
    groups = (
        [next(iter(e)) for e in OmegaConf.load(CONF / f"{script}.yaml").defaults if e != "_self_"] if script else []
    )
    for path in sorted(CONF.rglob("*.yaml")):
        group = path.parent.relative_to(CONF).as_posix().strip(".")
        if script and (group not in groups if group else path.stem != script):
            continue
        if not path.read_text().startswith("# @package _global_"):
            keys |= _dotted(OmegaConf.to_container(OmegaConf.load(path)), group)
        keys |= {group: path.stem} if group else {}
    return keys


def _dotted(node: Any, prefix: str, hidden: tuple[str, ...] = HIDDEN) -> dict[str, Any]:
    keys = {prefix: node} if prefix else {}
    for key, value in node.items() if isinstance(node, dict) else ():
        if key not in hidden:
            keys |= _dotted(value, f"{prefix}.{key}" if prefix else str(key), hidden)
    return keys


def chosen(script: str, words: tuple[str, ...]) -> dict[str, Any]:
    """Every dotted key, `_target_` too, of the pages that the words of a command choose, with its value as written.

    Nothing else of the words is looked at; what cannot be composed is left out.
    """
    return _composable(script, words)[0]


def standing(script: str, words: tuple[str, ...]) -> dict[str, str | None]:
    """Each group of the pages that the words choose, as it is typed (`sampler@model.sampler`), and its page there."""
    return _composable(script, words)[1]


def _composable(script: str, words: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, str | None]]:
    pages = _page_words(words)
    at_root = tuple(word for word in pages if "@" not in word)
    return next(found for tried in (pages, at_root, ()) if (found := _composition(script, tried))[0])


def _page_words(words: tuple[str, ...]) -> tuple[str, ...]:
    """Those that choose a page that there is; of several for a sweep, the first."""
    found = []
    for word in words:
        typed, _, page = word.partition("=")
        group, page = typed.partition("@")[0], page.partition(",")[0]
        if page in members(group):
            found.append(f"{typed}={page}")
    return tuple(found)


@functools.cache
def members(group: str) -> tuple[str, ...]:
    """The pages of a group; none where it is no group."""
    return tuple(sorted(path.stem for path in (CONF / group).glob("*.yaml"))) if group else ()


def is_group(name: str) -> bool:
    """Whether pages of it lie in conf/."""
    return bool(members(name))


def member(group: str, value: str) -> str:
    """The page of a group that is called so, or nearly; all of them where none is."""
    pages = members(group)
    return value if value in pages else nearest(value, pages) or "|".join(pages)


@functools.cache
def _composition(script: str, pages: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, str | None]]:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(HydraException, OmegaConfBaseException))
        if not GlobalHydra.instance().is_initialized():  # it is inside of a command
            stack.enter_context(initialize_config_dir(str(CONF), version_base="1.3"))
        cfg = compose(script, list(pages), return_hydra_config=True)
        groups = {typed: page for typed, page in cfg.hydra.runtime.choices.items() if not typed.startswith("hydra/")}
        OmegaConf.set_struct(cfg, False)
        del cfg["hydra"]
        return _dotted(OmegaConf.to_container(cfg), "", ()), groups
    return {}, {}


@functools.cache
def keys_of_page(group: str, page: str) -> dict[str, Any]:
    """Every dotted key that a page itself has, with its value; of the groups inside it there is none."""
    from omegaconf import OmegaConf

    return _dotted(OmegaConf.to_container(OmegaConf.load(CONF / group / f"{page}.yaml")), "", ())


def page_of(group: str, section: Mapping[str, Any]) -> str:
    """The page of a group that a section of a config was most likely chosen by.

    That is one with its `_target_`, and of these the one whose values it has changed least.
    """

    def changed(page: str) -> tuple[bool, int]:
        own = {key: value for key, value in keys_of_page(group, page).items() if "." not in key}
        return section["_target_"] != own["_target_"], sum(section.get(key) != value for key, value in own.items())

    return min(members(group), key=changed)


def script_name() -> str:
    """Whose keys are meant: `sample`, `evaluate`, `export`, `demo`, or else `train`."""
    name = Path(sys.argv[0]).stem
    return name if name in ("sample", "evaluate", "export", "demo") else "train"


def task_words(hydra: DictConfig | None = None) -> list[str]:
    """The words of this command, or of one job of a sweep, as they were typed; there is none outside of a command.

    Args:
        hydra: section of a config that Hydra hands over; None: that of what runs.
    """
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    if hydra is None and not HydraConfig.initialized():
        return []
    section = HydraConfig.get() if hydra is None else hydra
    return OmegaConf.to_container(section.overrides.task, resolve=False)


def key_of(word: str) -> str:
    """The key of a word of the command line; of a group that stands inside a page, its place."""
    return word.partition("=")[0].rpartition("@")[2]


def placed(key: str, value: str) -> str | None:
    """How a group that stands inside a page is chosen, where `key` is its name, its place or both; None: it is none.

    Where `value` is none of its pages, the nearest of them, or all. Where this command has no such place, by a model
    that has.
    """
    script = script_name()
    here = standing(script, tuple(sys.argv[1:]))
    inside = [typed for typed in here if "@" in typed]
    group = key.partition("@")[0]
    own = [typed for typed in inside if key in (typed, *typed.split("@"))]
    own = own or [typed for typed in inside if "@" in key and typed.startswith(f"{group}@")]
    if own:
        return f"{own[0]}={member(own[0].partition('@')[0], value)}"
    for group, place, page in places() if script == "train" else ():
        if key in (group, place, f"{group}@{place}") and page != "train":
            other = f"model={page} {group}@{place}={member(group, value)}"
            asked = any(word.startswith(("model=", "experiment=")) for word in sys.argv[1:])
            return f"leave {key} out, or {other}" if asked else other
    return None


@functools.cache
def places() -> tuple[tuple[str, str, str], ...]:
    """Group, place and page of each group that stands inside another page."""
    found = []
    for path in (CONF / "train.yaml", *sorted((CONF / "model").glob("*.yaml"))):
        prefix = "model." if path.parent != CONF else ""
        for group, place in re.findall(r"^  - /?(\w+)@([\w.]+):", path.read_text(), re.MULTILINE):
            found.append((group, prefix + place, path.stem))
    return tuple(found)


def offered(script: str) -> dict[str, list[str]]:
    """Group -> how it is typed, of each that has another page than the one shipped: first those of the defaults."""
    found: dict[str, set[str]] = {}
    for group, place, shipped in re.findall(
        r"^  - (\w+)(@[\w.]+)?: (\S+)", (CONF / f"{script}.yaml").read_text(), re.MULTILINE
    ):
        if set(members(group)) - {shipped}:
            found.setdefault(group, set()).add(group + place)
    for group, place, _ in places() if script == "train" else ():
        found.setdefault(group, set()).add(f"{group}@{place}")
    return {group: sorted(words) for group, words in found.items()}
