"""Prompts from a file: a line each."""

from __future__ import annotations

import codecs
from pathlib import Path

from atelier.core.errors import UserError
from atelier.data.finding import printable


def read(prompts: str) -> list[str]:
    """The lines of a file as prompts, in their order; empty lines are passed over.

    UTF-8 with or without a byte order mark, and any line ends.

    Raises:
        UserError: there is no such file, it is no UTF-8, or it has no prompt.
    """
    path = Path(prompts).expanduser()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError("prompts", printable(prompts), str(error.strerror), "prompts=FILE, a prompt a line") from error
    try:
        text = content.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        problem = f"line {line}: it is no UTF-8, byte {error.object[error.start]:#x}"
        raise UserError("prompts", printable(prompts), problem, f"iconv -t UTF-8 {printable(prompts)}") from None
    lines = [line.strip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    if not any(lines):
        raise UserError("prompts", printable(prompts), "there is no prompt in it", "prompts=FILE, a prompt a line")
    if "\0" in text:
        raise UserError("prompts", printable(prompts), "a NUL byte is in it", "prompts=FILE of text, a prompt a line")
    return [line for line in lines if line]
