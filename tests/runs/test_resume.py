"""Runs that are killed anywhere and started again by the same command end with the same bits."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from atelier.runs import resume
from tests.programs import python
from tests.test_architecture import families
from tests.tiny import FOUR, TINY

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(900)  # of the campaign
KILLS = [  # chains of each of the four shapes of module (all others have one), kills of theirs and of the others
    pytest.param((1, 3, 1), id="few"),
    pytest.param((4, 5, 5), id="many", marks=pytest.mark.slow),
]
ON_OTHERS = ("adapters", "stable_diffusion", "stable_diffusion_adapters")
DROPPED = ("position and clock", "averages", "reseeding", "evaluation due")


@pytest.fixture(scope="module", params=KILLS)
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("campaign")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = ["-m", "tests.campaign", str(folder), *map(str, request.param)]
    done = python(*words, folder=ROOT, environment=environment, seconds=800)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "told.json").read_text()) | {"asked": request.param}


@pytest.mark.parametrize("family", [*TINY, *ON_OTHERS])
def test_kills_change_no_bit(told: dict[str, Any], family: str) -> None:
    chains, kills, fewer = told["asked"]
    assert told[family]["kills"] == (chains * kills if family in FOUR else fewer)
    assert told[family]["entries"] > 100
    assert told[family]["differ"] == []


@pytest.mark.parametrize("item", DROPPED)
def test_a_dropped_item_is_seen(told: dict[str, Any], item: str) -> None:
    assert told["dropped"][item] > 0


@pytest.mark.parametrize("where", ["sigterm", "sigterm while judging"])
def test_sigterm_saves_within_five_seconds_and_exits_143(told: dict[str, Any], where: str) -> None:
    assert told[where]["code"] == 143
    assert told[where]["seconds"] < 5
    assert told[where]["differ"] == []


def test_ctrl_c_saves_and_exits_130(told: dict[str, Any]) -> None:
    assert told["sigint"]["code"] == 130
    assert told["sigint"]["differ"] == []


def test_every_family_is_in_the_campaigns() -> None:
    assert families() == set(TINY)


def test_an_argument_that_is_new_since_then_had_its_default() -> None:
    """So a run of before goes on, unless the argument is another now."""
    old = {"_target_": "atelier.diffusion.times.LogitNormal", "logit_mean": 0.0}
    assert resume._differences(old, old | {"shift": 1.0}, "times") == {}
    assert resume._differences(old, old | {"shift": 3.0}, "times") == {"times.shift": (1.0, 3.0)}
    assert resume._differences({}, {"key": 1}, "") == {"key": (None, 1)}
