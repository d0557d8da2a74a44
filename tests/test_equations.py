"""docs/equations.md: whatever it says computes a formula is there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "equations.md").read_text()


def rows() -> list[list[str]]:
    """The cells of every row of every table but the heads."""
    table = [
        line for line in PAGE.splitlines() if line.startswith("|") and not line.startswith(("| ---", "| equation"))
    ]
    return [re.split(r"\s\|\s", line.removeprefix("| ").removesuffix(" |")) for line in table]


def found(name: str) -> object:
    """What a dotted name of the package, or the path of a page, stands for.

    Raises:
        AttributeError, ModuleNotFoundError, FileNotFoundError: it is not there.
    """
    if "/" in name:
        return (ROOT / name).read_text()
    parts = name.split(".")
    node = importlib.import_module(".".join(["atelier", *parts[:2]]))
    for part in parts[2:]:
        node = getattr(node, part)
    return node


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_every_formula_has_a_place_in_the_code(row: list[str]) -> None:
    assert len(row) == 3, row  # a bar in a formula would end its cell
    assert row[1].count("$") % 2 == 0 and re.search(r"\$|\w", row[1])
    names = re.findall(r"`(.+?)`", row[2])
    assert names and all(found(name) for name in names)


@pytest.mark.parametrize("name", ["diffusion.bound.no_term", "diffusion.nothing.at_all", "conf/sampler/none.yaml"])
def test_a_name_that_is_not_there_is_seen(name: str) -> None:
    with pytest.raises((AttributeError, ModuleNotFoundError, FileNotFoundError)):
        found(name)


def test_the_papers_of_the_lecture_have_their_sections() -> None:
    for paper in ("Ho, Jain, Abbeel 2020", "Sohl-Dickstein", "Song, Meng, Ermon 2021", "Rombach and others 2022"):
        assert re.search(rf"^## .*{paper}", PAGE, re.MULTILINE)
