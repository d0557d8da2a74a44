"""The shipped recipes reach what the README promises. Minutes each, so marked slow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import train
from tests.compose import composed


def reached(folder: Path, *words: str) -> dict[str, float]:
    train.train(composed(*words, run_dir=folder))
    return json.loads((folder / "summary.json").read_text())["metrics"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_default_run_makes_scenes(tmp_path: Path) -> None:
    values = reached(tmp_path / "run", "seed=5", "metrics=none")
    assert values["judge/valid"] >= 0.80
    assert min(values[f"judge/{name}"] for name in ("shape", "colour", "size", "fill", "ground")) >= 0.97


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_shapes_ddpm_covers_every_label(tmp_path: Path) -> None:
    values = reached(tmp_path / "run", "experiment=shapes_ddpm", "seed=5", "metrics=none")
    assert values["judge/valid"] >= 0.95 and values["judge/coverage"] == 1.0 and values["judge/label"] >= 0.99
