"""The fix that a refusal offers, done: what it says to type is composed and goes through preflight."""

from __future__ import annotations

import functools
import re
import shlex
from itertools import product

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from atelier.core.errors import UserError
from atelier.runs import preflight
from atelier.runs.pages import key_of, known_keys
from tests.compose import composed

WORD = re.compile(r"([a-z][\w.]*@)?[a-z]\w*(\.\w+)*=.*", re.DOTALL)
PLACEHOLDER = re.compile(r"[A-Z][A-Z_]{2,}")  # VALUE, ANOTHER_FOLDER: for the reader to fill in


def commands(fix: str) -> list[list[str]]:
    """The alternatives of a fix that can be typed, each as its words; what is prose is none."""
    found = []
    for part in re.split(r",? or |; |, (?=[\w.@]+=)", fix):
        words = [word for word in shlex.split(part) if word not in ("python", "train.py", "sample.py", "evaluate.py")]
        if words and all(WORD.fullmatch(word) or word == "-m" for word in words):
            found.append([re.sub(r"\|[\w|]+$", "", word) for word in words])  # the first of `key=a|b`
    return found


def typed(error: UserError, *words: str, config: str = "train") -> int:
    """Type each alternative of a fix in place of the word that was refused; gives how many there were."""
    found = commands(error.fix)
    for command in found:
        _passes(tuple(instead(words, error.key, command)), config)
    return len(found)


def changed(error: UserError, cfg: DictConfig, *words: str, config: str = "train") -> int:
    """As `typed`, of a config whose value at the error's key was changed by hand to what was refused."""
    found = commands(error.fix)
    for command in found:
        if [key_of(word) for word in command] != [error.key] or "@" in command[0]:
            _passes(tuple(instead(words, error.key, command)), config)
        elif not PLACEHOLDER.fullmatch(command[0].partition("=")[2]):
            (override,) = OverridesParser.create().parse_overrides(command)
            fitting = cfg.copy()
            OmegaConf.update(fitting, error.key, override.value(), merge=False)
            preflight.check(fitting)
    return len(found)


def instead(words: tuple[str, ...], key: str, command: list[str]) -> list[str]:
    """The words with a fix in place of the one that was refused, and of those that set the same or an item of it."""
    named = {key, *map(key_of, command)}
    kept = [
        one
        for one in words
        if not {one.partition("=")[0].strip(), key_of(one).strip(), re.sub(r"\.\d+$", "", key_of(one))} & named
    ]
    return [*kept, *command]


@functools.cache
def _passes(words: tuple[str, ...], config: str) -> None:
    unknown = [word for word in words if PLACEHOLDER.fullmatch(word.partition("=")[2])]
    for word in unknown:
        assert key_of(word) in known_keys(config) or "@" in word, f"{word}: no such key"
    known = [word for word in words if word not in unknown]
    if "-m" not in known:
        return preflight.check(composed(*known, config=config))
    sweeps = [[f"{w.partition('=')[0]}={one}" for one in w.partition("=")[2].split(",")] for w in known if w != "-m"]
    for job in product(*sweeps):
        preflight.check(composed(*job, config=config))
