"""How times are told."""

from __future__ import annotations

import math

import pytest

from atelier.core.lines import duration, time_left


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
