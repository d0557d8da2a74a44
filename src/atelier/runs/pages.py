"""What conf/ holds: every key of its pages, and the groups that stand inside a page."""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from pathlib import Path
from typing import Any

from atelier.core.errors import nearest

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


@functools.cache
def chosen(script: str, words: tuple[str, ...]) -> dict[str, Any]:
    """Every dotted key, `_target_` too, of the pages that the words of a command choose, with its value as written.

    Nothing else of the words is looked at; there is none where the pages cannot be composed.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    groups = (word.partition("=")[0].partition("@")[0] for word in words)
    pages = [word for word, group in zip(words, groups, strict=True) if "=" in word and (CONF / group).is_dir()]
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(HydraException, OmegaConfBaseException))
        if not GlobalHydra.instance().is_initialized():  # it is inside of a command
            stack.enter_context(initialize_config_dir(str(CONF), version_base="1.3"))
        return _dotted(OmegaConf.to_container(compose(script, pages)), "", ())
    return {}


def key_of(word: str) -> str:
    """The key of a word of the command line; of a group that stands inside a page, its place."""
    return word.partition("=")[0].rpartition("@")[2]


def placed(key: str, value: str) -> str | None:
    """How a group that stands inside a page is chosen there, where `key` is its name or its place.

    Where `value` is none of its pages, the nearest of them, or all.
    """
    group, _, place = key.partition("@")
    found = [(g, at, page) for g, at, page in places() if (group in (g, at) and place in ("", at))]
    if not found:
        return None
    pages = [page for _, _, page in found]
    asked = next((word.removeprefix("model=") for word in sys.argv[1:] if word.startswith("model=")), "")
    if place or (asked and not {asked, "train"} & set(pages)):
        return " or ".join(f"model={page}" for page in sorted(set(pages)))
    taken = asked or re.search(r"^  - model: (\w+)", (CONF / "train.yaml").read_text(), re.MULTILINE)[1]
    group, place, page = next((f for f in found if f[2] == taken), found[0])
    members = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    chosen = f"{group}@{place}={value if value in members else nearest(value, members) or '|'.join(members)}"
    return chosen if page in (taken, "train") else f"model={page} {chosen}"


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
        if {path.stem for path in (CONF / group).glob("*.yaml")} - {shipped}:
            found.setdefault(group, set()).add(group + place)
    for group, place, _ in places() if script == "train" else ():
        found.setdefault(group, set()).add(f"{group}@{place}")
    return {group: sorted(words) for group, words in found.items()}
