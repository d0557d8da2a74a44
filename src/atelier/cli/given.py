"""The words of a command as they were meant: what is a name stays what was typed, and `run_dir=last` is a folder.

Hydra would take 2026_11_28 for the number 20261128, a shell leaves the ~ of root=~/data alone, and a sweep would never
look at `run_dir`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from atelier.core.errors import UserError
from atelier.core.words import typed_value

PATHS = frozenset(
    "run run_dir out root source mask like start_from latent_cache text_cache prompts adapters cache folder path"
    " prior vgg vocabulary weights".split()
)
NAMES = PATHS | frozenset(
    "attributes best direction do experiment folders group instruction label negative objective project prompt"
    " prior_text sha256 tags targets text text_targets".split()
)
OF_SETS = ("label", "attributes")  # keys whose names are those of a set, which are not ours to choose
NUMBER = re.compile(r"[+-]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(e[+-]?\d[\d_]*)?|[+-]?(nan|inf)", re.IGNORECASE)
MANY = {"-m", "--multirun"}
PART = re.compile(r"\"[^\"]*\"|'[^']*'|[^,\[\]\s][^,\[\]]*(?<!\s)")  # of a list or a sweep


def meant(words: list[str], train: bool) -> list[str]:
    """The words with names and paths kept as they were typed; `train`: those of a run, whose folder `run_dir` names.

    Raises:
        UserError: `run_dir=last` where there is none, or several folders for one sweep.
    """
    kept = [_kept(one) for one in words]
    return [_folder(one, bool(MANY & set(words))) for one in kept] if train else kept


def _kept(word: str) -> str:
    key, sign, value = word.partition("=")
    if not sign or not is_name(key):
        return word
    named, last = _of_set if key in OF_SETS else _name, key.rpartition(".")[2]
    return f"{key}={PART.sub(lambda found: named(found[0], last), value)}"


def is_name(key: str) -> bool:
    """Whether the value of a key is what somebody has called a thing, any text."""
    *above, last = key.split(".")
    return last in NAMES or above[-1:] == ["columns"]


def _of_set(part: str, key: str) -> str:
    """The name of a class or an attribute, whatever its signs; `label=3` is a number."""
    kept = part[0] in "\"'" or part == "null" or (key == "label" and re.fullmatch(r"-?\d+", part, re.ASCII))
    return part if kept else typed_value(part)


def _name(part: str, key: str) -> str:
    mark = part[0] if part[0] in "\"'" else ""
    bare = part.strip(mark) if mark else part
    if key in PATHS and (bare == "~" or bare.startswith("~/")):
        return typed_value(os.path.expanduser(bare))
    return f'"{part}"' if NUMBER.fullmatch(part) else part


def _folder(word: str, many: bool) -> str:
    """`run_dir=` of one run, or of a sweep, which Hydra knows by another name."""
    key, _, value = word.partition("=")
    if key != "run_dir" or not value:
        return word
    if many and ("," in re.sub(r"\"[^\"]*\"|'[^']*'", "", value)):
        raise UserError("run_dir", value, "with -m it is the folder of all jobs", "run_dir=FOLDER")
    if value.strip("\"'") == "last":
        value = typed_value(str(_newest_sweep() if many else _newest_run()))
    return f"hydra.sweep.dir={value}" if many else f"run_dir={value}"


def _newest_run() -> Path:
    from atelier.runs.folders import find

    try:
        return find("last")
    except UserError as error:
        raise UserError("run_dir", "last", error.problem, "leave run_dir out") from error


def _newest_sweep() -> Path:
    from atelier.runs.folders import OUTPUTS

    found = [path for path in OUTPUTS.glob("sweeps/*") if path.is_dir()]
    if not found:
        raise UserError("run_dir", "last", f"no sweep under {OUTPUTS / 'sweeps'}", "leave run_dir out")
    return max(found, key=lambda path: path.stat().st_mtime)
