"""What a process that trains does with its memory and its random state."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from atelier.rng import reseed
from tests.programs import python

FAULTS = """
import resource, sys, torch
from atelier.trainer import device, keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
if sys.argv[1] == "device":
    device()
def step():
    torch.zeros(16 * 2**20)  # 64 MiB, every page of it
step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_memory_is_kept_for_the_next_step(tmp_path: Path) -> None:
    faults = {}
    (tmp_path / "faults.py").write_text(FAULTS)
    for way in ("keep", "leave", "device"):
        hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        faults[way] = int(python(str(tmp_path / "faults.py"), way, folder=tmp_path, environment=hidden).stdout)
    assert 2 * max(faults["keep"], faults["device"]) < faults["leave"], (
        faults
    )  # a block of another size may move it once


def test_reseed_draws_what_manual_seed_draws() -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    reseed(5, torch.device("cpu"))
    assert torch.equal(torch.randn(3), expected)
