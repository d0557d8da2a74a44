"""How times are told, and what is said of work that takes long."""

from __future__ import annotations

import math

import pytest

from atelier.core import lines
from atelier.core.lines import duration, paced, time_left


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (89, "89 s"), (91, "2 min"), (5340, "89 min"), (5400, "1 h 30 min"), (11_100, "3 h 05 min")],
)
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("seconds", "done", "n", "words"),
    [
        (20, 100, 1000, "3 min left"),
        (20, 999, 1000, "0 s left"),
        (20, 0, 1000, ""),  # nobody knows yet
        (20, 1000, 1000, ""),  # what comes then takes its own time
        (20, 1008, 1000, ""),  # a last batch goes beyond the budget
        (-1e-9, 1, 1000, "0 s left"),
        (20, 8, math.nan, ""),
    ],
)
def test_time_left_is_told_where_it_is_known(seconds: float, done: float, n: float, words: str) -> None:
    assert time_left(seconds, done, n) == words


def test_work_that_takes_long_says_so_and_where_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A second a part: after the third it has taken more than 2 s, and 15 s later come those of the 18th and 19th."""
    now = [0.0]
    monkeypatch.setattr(lines.time, "monotonic", lambda: now[0])
    for _ in paced(range(20), 20, lambda done, left: f"{done}, {left}"):
        now[0] += 1.0
    assert capsys.readouterr() == ("", "3, 17 s left\n19, 1 s left\n")
    list(paced(range(20), 20, str))  # it takes no time
    assert capsys.readouterr() == ("", "")
