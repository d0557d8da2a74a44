"""benchmarks/stable_diffusion.py on small nets: both sides do the same work, and its options arrive."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
from benchmarks import stable_diffusion as benchmark

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # theirs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pipeline")
    benchmark.write(made, 32, 64)
    return made


def both(folder: Path, *words: str) -> dict[str, dict]:
    args = benchmark.arguments([*words, "--folder", str(folder), "--timed=1", "--size=64", "--count"])
    return {side: benchmark.measured(side, args) for side in benchmark.SIDES}


def test_both_make_the_same_picture(folder: Path) -> None:
    found = both(folder, "sampling")
    ours, theirs = (torch.load(folder / f"{side}.pt") for side in benchmark.SIDES)
    assert ours.shape == theirs.shape == (1, 3, 64, 64)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert theirs.std() > 0.01
    assert found["atelier"]["gflop"] == pytest.approx(found["diffusers"]["gflop"], rel=0.01)


def test_both_train_as_many_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net: compiled.append(type(net).__name__))
    found = both(folder, "lora", "--checkpointing", "--precision=bf16", "--compile")
    assert compiled == ["UNet", "UNet2DConditionModel"]
    assert found["atelier"]["n"] == found["diffusers"]["n"] > 10_000
    lines = benchmark.table([found, found]).splitlines()
    assert len(lines) == 7 and "over 2 rounds" in lines[3]


def test_what_the_processes_are_told(tmp_path: Path) -> None:
    args = benchmark.arguments(["lora", "--precision=bf16", "--compile", "--default", "--width=64"])
    ours, theirs = (
        benchmark.arguments(benchmark.words_of(side, tmp_path, args, count=False)) for side in benchmark.SIDES
    )
    assert (ours.role, ours.precision, ours.compile, ours.width) == ("atelier", "bf16", True, 64)
    assert (theirs.role, theirs.precision, theirs.compile, theirs.width) == ("diffusers", "32-true", False, 64)
