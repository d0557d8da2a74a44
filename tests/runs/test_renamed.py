"""Runs of before, made by commit d7ed1b3: two steps of a tiny net each. They sample and go on as they did there."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from PIL import Image
from PIL.ImageChops import difference
from safetensors.torch import load_file

from atelier.checkpoints import renamed
from atelier.runs import resume
from tests.compose import composed
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


@pytest.mark.parametrize(("old", "new"), renamed.TARGETS.items())
def test_a_name_of_before_leads_to_something_of_today(old: str, new: str) -> None:
    """What has moved is no longer found under the old name, and what is written today is left as it is."""
    module, _, name = new.rpartition(".")
    assert not name or importlib.import_module(module).__dict__[name].__module__ == module
    module, _, name = old.rpartition(".")
    if importlib.util.find_spec(module.rpartition(".")[0]) and importlib.util.find_spec(module):
        assert name and getattr(importlib.import_module(module).__dict__.get(name), "__module__", "") != module
    rest = "" if name else "Thing"
    assert renamed.today({"_target_": old + rest}) == {"_target_": new + rest}
    assert renamed.today({"_target_": new + rest}) == {"_target_": new + rest}


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


def objective(**changes: object) -> dict[str, object]:
    """What the config of a run of before says."""
    return {"_target_": "atelier.diffusion.objective.Objective", "schedule": {}, "weighting": "plain", **changes}


FLOW = {"_target_": "atelier.diffusion.targets.VectorField"}


@pytest.mark.parametrize(
    ("old", "key", "new"),
    [
        ({"target": "flow"}, "target", FLOW),
        ({"target": "flow"}, "weighting", {"_target_": "atelier.diffusion.weightings.Plain"}),
        ({"target": "flow"}, "time_distribution", {"_target_": "atelier.diffusion.times.Uniform"}),
        (
            {"target": "x0", "space": "flow", "floor": 0.4},
            "weighting",
            {"_target_": "atelier.diffusion.weightings.ErrorOf", "loss_space": FLOW, "time_floor": 0.4},
        ),
        (
            {"target": "v", "weighting": "min_snr", "floor": 0.1},
            "weighting",
            {"_target_": "atelier.diffusion.weightings.MinSNR", "gamma": 5.0, "time_floor": 0.1},
        ),
    ],
)
def test_an_objective_of_before_is_one_of_objects(old: dict, key: str, new: dict) -> None:
    assert renamed.today(objective(**old))[key] == new


@pytest.mark.parametrize("page", ["flow", "flow_tiny", "ddpm"])
def test_a_config_of_before_is_that_of_its_page(page: str) -> None:
    """So that a run goes on: what differs is refused there."""
    before = {
        "flow": {"target": "flow", "density": "logit_normal"},
        "ddpm": {"target": "eps", "density": "uniform"},
        "flow_tiny": {"target": "x0", "space": "flow", "floor": 0.4, "density": "logit_normal", "deviation": 1.1}
        | {"mean": 0.9, "mean_end": -0.2, "mean_images": 110_000},
    }[page]
    now = OmegaConf.to_container(composed(f"model={page}").model, resolve=True)
    old = {"objective": objective(**before), "guidance": now["guider"]["guidance"]}
    found = renamed.today(old)
    assert resume._differences(found["guider"], now["guider"], "") == {} and "guidance" not in found
    schedule = {"schedule": now["objective"]["schedule"]}
    assert resume._differences(found["objective"] | schedule, now["objective"], "") == {}
    assert renamed.today(now) == now


def test_weights_of_before_have_the_names_of_today() -> None:
    old = {"state_dict": {"embedder.nothing": 1, "nothing": 2, "generator.told.weight": 3}, "epoch": 4}
    assert renamed.weights(old) == {
        "state_dict": {"embedder.null_embedding": 1, "null_embedding": 2, "generator.conditioning.weight": 3},
        "epoch": 4,
    }
