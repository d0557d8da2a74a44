"""A user's mistake: one line with the key, the value, the problem and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator

LONGEST = 200
ALMOST = 1.1  # likeness of two keys from which one is offered for the other; 2 is the same


class UserError(Exception):
    """A mistake in what was asked for.

    Args:
        key: the dotted key or option to change, as typed on the command line (`data.batch_size`); where it begins
            with a dot, an argument of the object that the config was building.
        value: what it was.
        problem: why that does not work.
        fix: an override or a command that does; with a dot in front, of an argument of the same object.
    """

    def __init__(self, key: str, value: object, problem: str, fix: str) -> None:
        self.key, self.value, self.problem, self.fix = key, value, problem, fix
        super().__init__(" ".join(f"error: {key}={value}: {problem}. Fix: {fix}".split()))

    def line(self) -> str:
        """One line of at most 200 characters; what is too long loses its middle, the value first, the fix last."""
        key, value, problem, fix = (" ".join(str(p).split()) for p in (self.key, self.value, self.problem, self.fix))
        spare = LONGEST - len(f"error: {key}=: . Fix: ")
        value = _short(value, min(60, max(12, spare - len(problem) - len(fix))))
        problem = _short(problem, max(30, spare - len(value) - len(fix)))
        fix = _short(fix, max(20, spare - len(value) - len(problem)))
        return f"error: {key}={value}: {problem}. Fix: {fix}"[:LONGEST]

    def inside(self, place: str) -> UserError:
        """The same mistake, its keys that begin with a dot as those of the object that the config names `place`."""
        key, fix = (place + text if text.startswith(".") else text for text in (self.key, self.fix))
        return UserError(key, self.value, self.problem, fix)

    def __reduce__(self) -> tuple:
        return type(self), (self.key, self.value, self.problem, self.fix)


def _short(text: str, n: int) -> str:
    return text if len(text) <= n else text[: n // 2 - 2] + "..." + text[len(text) - (n - n // 2 - 1) :]


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
