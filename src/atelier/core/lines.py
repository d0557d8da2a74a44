"""Lines for the person at the keyboard. Standard library only."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from atelier.core.stopping import mute

FIRST, EVERY = 2.0, 15.0  # seconds until work that takes long says so, and between its further lines
Part = TypeVar("Part")


def say(line: str, error: bool = False) -> None:
    """Print a line, if anybody reads it; on standard error where what the command makes is standard output."""
    mute()
    with contextlib.suppress(BrokenPipeError):
        print(line, file=sys.stderr if error else sys.stdout, flush=True)


def paced(parts: Iterable[Part], n: int, line: Callable[[int, str], str]) -> Iterator[Part]:
    """The n parts of some work; where it takes long, a line on standard error now and then.

    Args:
        parts: parts, each of which is worked on before the next is asked for.
        n: how many there are.
        line: what is said when so many are done and there is so much time left (as `time_left` tells it).
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
