"""Runs of before, made by commit d7ed1b3: two steps of a tiny net each. They sample and go on as they did there."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image
from PIL.ImageChops import difference
from safetensors.torch import load_file

from tests.programs import python
from tests.tiny import TINY

BEFORE = Path(__file__).parents[1] / "runs_of_before"
ROOT = Path(__file__).parents[2]
FAMILIES = {"gan": "gan", "ldm": "ldm", "progan": "stylegan"}  # folder -> what that family is called today
OTHERWISE = ("budget.images", "checkpoint.every", "eval.every", "callbacks.ema.half", "model.first_stage.run")
AS_THEN = [
    "checkpoint.every_images=16",
    "eval.every_images=16",
    "callbacks.ema.half_lives=[16]",
    "seed=3",
    "budget.images=32",
]


def program(folder: Path, script: str, *words: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = python(str(ROOT / script), *words, folder=folder, environment=environment)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_of_before(family: str, tmp_path: Path) -> None:
    run = shutil.copytree(BEFORE / family, tmp_path / family, ignore=shutil.ignore_patterns("expected"))
    program(tmp_path, "sample.py", f"run={run}", "n=4", "seed=5", "out=pictures")
    for k in range(4):
        name = f"{k:06d}.png"
        then, now = Image.open(BEFORE / family / "expected" / name), Image.open(tmp_path / "pictures" / name)
        assert max(high for _, high in difference(then, now).getextrema()) <= 1  # grey levels

    words = [word for word in TINY[FAMILIES[family]] if not word.startswith(OTHERWISE)] + AS_THEN
    part = ["model.first_stage.run=outputs/vae"] if family == "ldm" else []
    program(tmp_path, "train.py", *words, *part, f"run_dir={run}")
    expected = json.loads((BEFORE / family / "expected" / "resumed.json").read_text())
    sizes = [float(weight.double().abs().mean()) for weight in load_file(run / "weights.safetensors").values()]
    assert len(sizes) == expected["n"]
    assert sum(sizes) == pytest.approx(expected["sum_of_sizes"], rel=1e-5)
    assert json.loads((run / "summary.json").read_text())["images_seen"] == 32
