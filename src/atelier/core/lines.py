"""Lines for the person at the keyboard, which a run keeps in its folder too. Standard library only."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from atelier.core.stopping import mute

FIRST, EVERY = 2.0, 15.0  # seconds until work that takes long says so, and between its further lines
LOG = "train.log"  # in a run folder
Part = TypeVar("Part")
_log: Path | None = None


def say(line: str, error: bool = False) -> None:
    """Print a line, if anybody reads it, and keep it; `error`: where standard output is for what the command makes."""
    mute()
    with contextlib.suppress(BrokenPipeError):
        print(line, file=sys.stderr if error else sys.stdout, flush=True)
    keep(line)


def keep(text: str) -> None:
    """Append what was said to the log, if one is kept, with the time; a disk that is full costs the lines alone."""
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    if _log is not None:
        stamped = "".join(f"{now} {line}\n" for line in text.splitlines())
        with contextlib.suppress(OSError), _log.open("r+b") as file:  # not made anew where it was removed
            file.seek(0, os.SEEK_END)
            file.write(stamped.encode(errors="backslashreplace"))


@contextlib.contextmanager
def kept(path: Path) -> Iterator[None]:
    """Inside, what is said is kept in this file too, and what is warned of; after an error until `forget`."""
    global _log
    shown = warnings.showwarning

    def show(message: Warning | str, *where: object) -> None:
        shown(message, *where)
        keep(f"warning: {message}")

    with contextlib.suppress(OSError):
        path.touch()
    _log, warnings.showwarning = path, show
    try:
        yield
        forget()
    finally:
        warnings.showwarning = shown


def forget() -> None:
    """What is said from now on is of no run."""
    global _log
    _log = None


def paced(parts: Iterable[Part], n: int, line: Callable[[int, str], str]) -> Iterator[Part]:
    """The n parts of some work; where it takes long, a line on standard error now and then.

    Args:
        parts: parts, each of which is worked on before the next is asked for.
        n: number of parts.
        line: words for so many parts done and so much time left (as `time_left` tells it).
    """
    begun = time.monotonic()
    due = begun + FIRST
    for done, part in enumerate(parts, 1):
        yield part
        now = time.monotonic()
        if now > due and done < n:
            due = now + EVERY
            say(line(done, time_left(now - begun, done, n)), error=True)


def duration(seconds: float) -> str:
    """`42 s`, `7 min`, `3 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def time_left(seconds: float, done: float, n: float) -> str:
    """`3 min left` where `done` of n took so many seconds; "" where nothing is done yet, or nothing is left."""
    return f"{duration(max(0.0, seconds) * (n - done) / done)} left" if 0 < done < n else ""
