"""Two processes on the CPU: the same images, the same figures, noise of their own."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.programs import Program
from tests.tiny import FOUR, PICTURELESS, TINY

ROOT = Path(__file__).parents[1]
FAMILIES = [*TINY, "adapters"]
ROUNDING = {"stylegan": 1e-4}  # its constant starts flat, where instance norm makes rounding 316 times as large
pytestmark = pytest.mark.timeout(900)  # of the walk, two minutes on 2 cores


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the first and second of two ranks saw, and then the one rank."""
    folder = tmp_path_factory.mktemp("ranks")
    for ranks in (2, 1):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = [start(folder, rank, ranks, port) for rank in range(ranks)]
        ended = [process.done(600) for process in processes]
        assert not any(end.returncode for end in ended), "".join(end.stderr[-3000:] for end in ended)
    return {
        f"{r} of {n}": json.loads((folder / f"told_{r}_of_{n}.json").read_text()) for r, n in ((0, 2), (1, 2), (0, 1))
    }


def start(folder: Path, rank: int, ranks: int, port: int) -> Program:
    told = {"RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": ranks, "MASTER_PORT": port}
    environment = os.environ | {k: str(v) for k, v in told.items()}
    environment |= {"MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return Program(["-m", "tests.two_ranks", str(folder)], ROOT, environment)


@pytest.mark.parametrize("family", [*FOUR, "cyclegan", "adapters"])
def test_stopped_and_resumed_on_two_ranks_is_exact(told: dict, family: str) -> None:
    assert told["0 of 2"][f"{family} batches"] == 3  # from image 72 to 96
    assert told["0 of 2"][f"{family} resumed"] == []


def test_ranks_draw_different_noise(told: dict) -> None:
    first, second = told["0 of 2"]["noise"], told["1 of 2"]["noise"]
    assert len(first) == len(second) > 40
    assert not set(first) & set(second)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_give_the_gradients_of_one(told: dict, family: str) -> None:
    two, one = (torch.tensor(told[who]["gradients"][family]) for who in ("0 of 2", "0 of 1"))
    assert len(one) > 100 and one.abs().max() > 1e-4
    torch.testing.assert_close(two, one, atol=ROUNDING.get(family, 1e-5), rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_and_two_ranks_judge_alike(told: dict, family: str) -> None:
    """10 samples and 13 real images on two ranks: nothing is padded, nothing lost."""
    two, one = told["0 of 2"][family], told["0 of 1"][family]
    telling = "accuracy" if family in PICTURELESS else "fd_classifier"
    assert set(two) == set(one) and any(telling in name for name in two)
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=1e-6, abs=1e-6, nan_ok=True), name
    assert told["0 of 2"][family] == pytest.approx(told["1 of 2"][family], nan_ok=True)
