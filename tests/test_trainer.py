"""What a process that trains does with its memory and its random state."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from atelier.rng import reseed

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
def test_freed_memory_is_kept_for_the_next_step() -> None:
    faults = {}
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    for way in ("keep", "leave", "device"):
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, way], check=True, capture_output=True, text=True, env=hidden
        )
        faults[way] = int(done.stdout)
    assert 2 * max(faults["keep"], faults["device"]) < faults["leave"], (
        faults
    )  # a block of another size may move it once


def test_reseed_draws_what_manual_seed_draws() -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    reseed(5, torch.device("cpu"))
    assert torch.equal(torch.randn(3), expected)
