"""Ranks that end or hang: one line says why, by the rank that knows, and the others end soon."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from atelier.cli.messages import user_error
from atelier.core.errors import RankGone, UserError
from atelier.runs import meeting
from tests.programs import python

ROOT = Path(__file__).parents[2]
PATIENCE = 12.0  # seconds, of the runs of tests/rank_ends.py
LINE = "error: data.root=HERE: the image a.png cannot be read any more: cut. Fix: put the file back\n"
DIVERGED = "error: model=VAE: "
GONE = "error: trainer.devices=: another rank is gone"


@pytest.fixture(scope="module")
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of the cases that are asked for, at 3 core-seconds each."""
    asked = [
        item.callspec.params["case"]
        for item in request.session.items
        if "case" in getattr(item, "fixturenames", ()) and item.path == request.path
    ]
    folder = tmp_path_factory.mktemp("ends")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    words = ["-m", "tests.rank_ends", str(folder), *dict.fromkeys(asked)]
    done = python(*words, folder=ROOT, environment=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "told.json").read_text())


@pytest.mark.parametrize(
    ("case", "first", "second"),
    [
        ("the first refuses", LINE, ""),
        ("the second refuses", "", f"rank 1: {LINE}"),
        pytest.param("both refuse", LINE, "", marks=pytest.mark.slow),
        ("a loader of the second", "", f"rank 1: {LINE}"),
        pytest.param("both diverge", DIVERGED, "", marks=pytest.mark.slow),
        ("the second is killed", GONE, None),
        pytest.param("the first is killed", None, f"rank 1: {GONE}", marks=pytest.mark.slow),
        pytest.param(
            "a hang of the second",
            "error: trainer.timeout_minutes=: a rank waited that long",
            None,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_one_line_of_the_rank_that_knows(
    told: dict[str, Any], case: str, first: str | None, second: str | None
) -> None:
    for rank, line in (("0", first), ("1", second)):
        if line is None:
            continue
        assert told[case][rank]["code"] == 2
        assert told[case][rank]["err"].startswith(line), told[case][rank]["err"]
        assert told[case][rank]["err"].count("\n") == (line != "")
    if second is not None:  # which is not gone, or asleep
        assert abs(told[case]["0"]["seconds"] - told[case]["1"]["seconds"]) < PATIENCE


@pytest.mark.slow
@pytest.mark.parametrize("case", ["a bug in the second"])
def test_a_bug_is_a_traceback_of_its_rank_alone(told: dict[str, Any], case: str) -> None:
    bug = told[case]
    assert "ZeroDivisionError" in bug["1"]["err"] and (bug["0"]["code"], bug["0"]["err"]) == (2, "")


@pytest.mark.parametrize("case", ["files"])
def test_two_ranks_decode_a_file_once(told: dict[str, Any], case: str) -> None:
    assert {told[case][rank]["code"] for rank in "01"} == {0}
    assert sorted(told[case]["decoded"]) == sorted(f"{k}.png" for k in range(12))


def test_what_a_loader_raises_is_the_error_itself() -> None:
    error = UserError("data.root", "a: b", "gone: it is", "put it back. Or not")
    text = (
        f"Caught UserError in DataLoader worker process 0.\nOriginal Traceback:\natelier.core.errors.UserError: {error}"
    )
    assert user_error(RuntimeError(text)).line() == error.line()


def test_a_rank_0_that_goes_while_it_is_called_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it this one would go on alone and miss what rank 0 makes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    there = {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in (there | {"TORCHELASTIC_USE_AGENT_STORE": True}).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(meeting, "_listens", lambda patience: True)
    with pytest.raises(RankGone, match="rank 0 has come and is gone"):
        meeting.begin(OmegaConf.create({"devices": 2, "num_nodes": 1, "timeout_minutes": 0.01}))


def test_a_closed_connection_is_another_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("[pair.cc:538] Connection closed by peer [127.0.0.1]:2400")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert user_error(error) is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert isinstance(user_error(error), RankGone)
    late = user_error(RuntimeError("[unbound_buffer.cc:78] Timed out waiting 600000ms for recv operation to complete"))
    assert late.key == "trainer.timeout_minutes"
