"""What a process that trains does with its memory and its random state."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.backends import cudnn

from atelier.core.rng import reseed
from atelier.runs.trainer import make_trainer

FAULTS = """
import resource, torch
from atelier.runs.trainer import device
def step():
    torch.zeros(16 * 2**20)  # 64 MiB, every page of it
def faults():
    step(), step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
left = faults()
device()
print(left, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    """In a process of its own, whose memory no other work has cut up."""
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", FAULTS]
    told = subprocess.run(command, check=True, capture_output=True, text=True, env=hidden).stdout
    left, kept = map(int, told.split())
    assert 2 * kept < left, (kept, left)  # a block of another size may move it once


def test_reseed_draws_what_manual_seed_draws() -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    reseed(5, torch.device("cpu"))
    assert torch.equal(torch.randn(3), expected)


def test_convolutions_are_not_timed() -> None:
    """Which is fastest may differ when a run goes on, and would round otherwise."""
    model = SimpleNamespace(ddp_options={})
    options = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "precision": "32-true", "profiler": None}
    options |= {"timeout_minutes": 10}
    kept, cudnn.benchmark = cudnn.benchmark, True
    try:
        make_trainer(**options, model=model, callbacks=[], loggers=[], evaluate_every=1)
        assert not cudnn.benchmark
    finally:
        cudnn.benchmark = kept
