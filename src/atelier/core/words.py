"""Values as they are typed on a command line, which a shell reads first and Hydra then."""

from __future__ import annotations

import re
import shlex
from typing import Any

WORDS = ("null", "true", "false", "nan", "inf")  # of YAML, which are no names
SAFE = r"[\w@%+=:,./~\[\]-]+"  # what no shell takes apart


def typed_value(value: Any) -> str:
    """A plain value as Hydra reads it."""
    if isinstance(value, list):
        return "[" + ",".join(map(typed_value, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{typed_value(one)}" for key, one in value.items()) + "}"
    if not isinstance(value, str):
        return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    if re.fullmatch(r"[A-Za-z_./][\w./-]*", value, re.ASCII) and value.lower() not in WORDS:
        return value
    mark = "'" if '"' in value else '"'
    escaped = re.sub(rf"(\\*){mark}", rf"\1\1\\{mark}", re.sub(r"\\+$", lambda m: 2 * m[0], value))
    return f"{mark}{escaped}{mark}"


def word(key: str, value: Any) -> str:
    """`key=value` as it is typed, in quotes where a shell would take it apart."""
    return shell(f"{key}={typed_value(value)}")


def shell(typed: str) -> str:
    """A word, in quotes where a shell would take it apart."""
    return typed if re.fullmatch(SAFE, typed) else shlex.quote(typed)
