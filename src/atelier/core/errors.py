"""A user's mistake: one line with the key, the value, the problem and the fix."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

LONGEST, MOST = 200, 60  # characters of a line, and of the value in one that is too long
ALMOST = 1.1  # likeness of two keys from which one is offered for the other; 2 is the same


class UserError(Exception):
    """A mistake in what was asked for.

    Args:
        key: the dotted key or option to change, as typed on the command line (`data.batch_size`); where it begins
            with a dot, an argument of the object that the config was building, or of the command where it built none.
        value: value that it had.
        problem: why that does not work.
        fix: an override or a command that does; with a dot in front, or behind the @ of a group, of an argument of the
            same object.
        said: whether another rank prints it.
    """

    def __init__(self, key: str, value: object, problem: str, fix: str, said: bool = False) -> None:
        self.key, self.value, self.problem, self.fix, self.said = key, value, problem, fix, said
        super().__init__(" ".join(f"error: {key}={value}: {problem}. Fix: {fix}".split()))

    def at(self, place: str) -> UserError:
        """The same, its key and fix told from `place`, where the object stands that it is about; "": the command."""
        if not self.key.startswith("."):
            return self
        front = f"{place}." if place else ""
        fix = re.sub(r"^(\w+@)?\.", lambda found: (found[1] or "") + front, self.fix)
        return UserError(front + self.key[1:], self.value, self.problem, fix)

    def line(self) -> str:
        """One line of at most 200 characters; what is too long loses its middle, the value first, the fix last.

        In a line that is too long, a key that is to be left out is not named twice, nor a long value that stays.
        """
        key, value, problem, fix = (" ".join(str(p).split()) for p in (self.key, self.value, self.problem, self.fix))
        if len(key) + len(value) + len(problem) + len(fix) > LONGEST - len("error: =: . Fix: "):
            fix = fix.replace(f"leave {key} out", "leave it out")
            fix = fix.replace(value, "...") if len(value) > MOST else fix
        spare = LONGEST - len(f"error: {key}=: . Fix: ")
        value = _short(value, min(MOST, max(12, spare - len(problem) - len(fix))))
        problem = _short(problem, max(30, spare - len(value) - len(fix)))
        fix = _short(fix, max(20, spare - len(value) - len(problem)))
        return f"error: {key}={value}: {problem}. Fix: {fix}"[:LONGEST]

    def __reduce__(self) -> tuple:
        return type(self), (self.key, self.value, self.problem, self.fix, self.said)


class RankGone(UserError):
    """What one rank sees of the end of another, which knows more about it."""


def parsed(text: str) -> UserError | None:
    """The error whose text stands in another text, as what a loader process raises reaches the one that trains."""
    found = re.search(r"UserError: error: ([^=\s]*)=(.*?): (.*)\. Fix: (.*)", text)
    return None if found is None else UserError(*found.groups())


def _short(text: str, n: int) -> str:
    return text if len(text) <= n else text[: n // 2 - 2] + "..." + text[len(text) - (n - n // 2 - 1) :]


@contextmanager
def within(place: str) -> Iterator[None]:
    """Inside, keys that begin with a dot are those of the object at `place`, which may begin with a dot as well."""
    try:
        yield
    except UserError as error:
        raise error.at(place) from error


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known key closest in spelling, its last part counted as much as the whole; None where nothing is close."""
    whole, tail = (difflib.SequenceMatcher(None, "", part) for part in (word, word.split(".")[-1]))
    best, most = None, 0.0
    for key in known:
        whole.set_seq1(key)
        tail.set_seq1(key.split(".")[-1])
        for ratio in ("real_quick_ratio", "quick_ratio", "ratio"):  # the quick ones are never below the last
            likeness = getattr(whole, ratio)() + getattr(tail, ratio)()
            if likeness < ALMOST or likeness <= most:
                break
        else:
            best, most = key, likeness
    return best


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from, outermost first."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
