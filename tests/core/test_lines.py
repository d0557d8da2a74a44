"""How times are told, what is said of work that takes long, and where what was said is kept."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest

from atelier.core import lines
from atelier.core.lines import duration, paced, time_left


@pytest.fixture
def at_noon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines.time, "strftime", lambda _: "NOON")
    monkeypatch.setattr(lines, "_log", None)


def failing(log: Path) -> None:
    with pytest.raises(ZeroDivisionError), lines.kept(log):
        1 / 0  # noqa: B018


def test_what_is_said_is_kept_with_its_time(tmp_path: Path, at_noon: None, capsys: pytest.CaptureFixture) -> None:
    log = tmp_path / "log"
    log.write_text("NOON of an earlier day\n")
    lines.say("before")
    with pytest.warns(match="beware"), lines.kept(log):
        lines.say("one")
        lines.say("another", error=True)
        lines.keep("a\ntable \udc80")  # of a path that is no text
        warnings.warn("beware", stacklevel=1)
    lines.say("after")
    kept = ["of an earlier day", "one", "another", "a", "table \\udc80", "warning: beware"]
    assert log.read_text() == "".join(f"NOON {line}\n" for line in kept)
    assert capsys.readouterr().out == "before\none\nafter\n"


def test_the_line_of_an_error_is_kept_too_where_there_is_a_log_yet(tmp_path: Path, at_noon: None) -> None:
    failing(tmp_path / "log")
    lines.say("error: key=value")
    lines.forget()
    lines.say("of another job")
    assert (tmp_path / "log").read_text() == "NOON error: key=value\n"
    failing(tmp_path / "log")
    (tmp_path / "log").unlink()  # nothing of the run is kept
    lines.say("error: key=value")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_costs_the_kept_lines_alone(tmp_path: Path, at_noon: None, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "log").symlink_to("/dev/full")
    for log in (tmp_path / "log", tmp_path / "no folder" / "log"):
        with lines.kept(log):
            lines.say("a line")
    assert capsys.readouterr() == ("a line\n" * 2, "")


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
