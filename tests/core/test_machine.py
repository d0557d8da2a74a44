"""What a machine is said to do: rates by hand and by a count of another, quotas of containers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from atelier.core import machine

CPU = torch.device("cpu")


def test_a_rate_is_operations_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.1 s each: the first call warms up, 20 of 3e9 operations fill 2 s."""
    now, calls = [0.0], []

    def work() -> None:
        calls.append(now[0])
        now[0] += 0.1

    monkeypatch.setattr(machine.time, "perf_counter", lambda: now[0])
    assert machine.rate(work, 3 * 10**9, 1.95) == pytest.approx(30e9) and len(calls) == 21
    assert machine.rate(work, 3 * 10**9, 0.0) == pytest.approx(30e9) and len(calls) == 21 + 1 + machine.LEAST


def test_a_matrix_product_is_as_fast_as_a_computer() -> None:
    """Between a tenth of a GFLOP/s and what 512 cores of 5 GHz with 128 operations a cycle would do."""
    a, n = torch.randn(256, 256), 256
    assert 1e8 < machine.rate(lambda: a @ a, 2 * n**3, 0.05) < 512 * 5e9 * 128


@pytest.mark.parametrize("half", [None, torch.bfloat16])
def test_its_convolution_is_what_torch_counts(half: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(machine.LAYER, "cpu", (2, 8, 8))
    work, operations = machine.convolution(CPU, half)
    with FlopCounterMode(display=False) as counted:
        work()
    assert counted.get_total_flops() == operations == 3 * 2 * (2 * 8 * 8) * 9 * 8**2


def test_bf16_is_what_it_computes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    forward = nn.Conv2d.forward

    def look(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        y = forward(layer, x)
        seen.append(y.dtype)
        return y

    monkeypatch.setitem(machine.LAYER, "cpu", (1, 4, 4))
    monkeypatch.setattr(nn.Conv2d, "forward", look)
    rates = machine.convolution_rates(CPU, 0.01)
    assert list(rates) == ["float32", "bf16"] and set(seen) == {torch.float32, torch.bfloat16}
    assert seen == sorted(seen, key=lambda kind: kind == torch.bfloat16)


@pytest.mark.parametrize(("text", "cores"), [("150000 100000", 1.5), ("max 100000", 4.0), ("900000 100000", 4.0)])
def test_a_container_may_have_a_share_of_the_cores(
    text: str, cores: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(f"{text}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(machine, "QUOTAS", (str(tmp_path / "cpu.max"), str(tmp_path / "none")))
    assert machine.cores() == cores


def test_both_files_of_older_containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "quota").write_text("50000\n")
    (tmp_path / "period").write_text("100000\n")
    monkeypatch.setattr(machine, "QUOTAS", (f"{tmp_path}/quota {tmp_path}/period",))
    assert machine.cores() == 0.5
    (tmp_path / "quota").write_text("-1\n")
    assert machine.cores() >= 1


def test_threads_that_fit_the_cores() -> None:
    given = ((2, 2, True), (2, 1, True), (2, 1, False), (1.5, 2, False), (0.5, 1, True))
    assert [machine.threads_to_set(*one) for one in given] == [None, 2, None, 1, None]


def test_the_name_of_a_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU 3000\nflags\t: fpu\n")
    monkeypatch.setattr(machine, "CPUINFO", str(tmp_path / "cpuinfo"))
    assert machine.processor() == "Some CPU 3000"
