"""A model that learns from its own average, one that trains a part further, or half of it, and one without images."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from safetensors.torch import load_file
from torch import Tensor, nn

import evaluate
import sample
import train
from atelier.callbacks.ema import EMA
from atelier.callbacks.table import read_rows
from atelier.checkpoints.store import load, newest
from atelier.core.errors import UserError
from atelier.core.rng import ImageRngs
from atelier.models.base import Generator
from atelier.optim import adamw
from atelier.runs import build, folders, preflight
from tests import toys
from tests.compose import composed
from tests.conftest import overrides

PAGE = {"lr": 0.1, "betas": [0.9, 0.99], "weight_decay": 0.0, "warmup_images": 0}
PAGE |= {"decay": "constant", "decay_from": 0, "decay_to": 1}


@pytest.fixture(autouse=True)
def toys_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, toys.MODULE, toys)


def run_of(toy: str, folder: Path, *words: str, part: Path | None = None) -> DictConfig:
    """The config of a tiny run of a toy, on the nets and the optimizer of the page ae."""
    cfg = composed(*overrides("ae"), "budget.images=72", f"model._target_={toys.MODULE}.{toy}", *words, run_dir=folder)
    if part is not None:
        first = {"run": str(part), "experiment": "shapes_vae", "images": None}
        kept = {key: cfg.model[key] for key in ("_target_", "optimizer", "grad_clip")}
        with open_dict(cfg):
            cfg.model = OmegaConf.create({**kept, "first_stage": first})
    return cfg


def saved(folder: Path) -> dict[str, Tensor]:
    """Weights, averages and moments of the newest checkpoint."""
    checkpoint = load(newest(folder / "checkpoints"))
    told = {f"weights {k}": v for k, v in checkpoint["state_dict"].items()}
    for half_life, nets in checkpoint["callbacks"]["EMA"]["nets"].items():
        told |= {f"average {half_life} {k}": v for k, v in nets["net"].items()}
    for k, state in checkpoint["optimizer_states"][0]["state"].items():
        told |= {f"moments {k} {name}": v for name, v in state.items()}
    return told


def broken_off(cfg: DictConfig, toy: type[Generator], at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run, until an error in the batch at `at` images."""
    kept = toy.training_step

    def failing(self: Generator, batch: dict) -> Tensor:
        if self.images_seen == at:
            raise RuntimeError("broken off")
        return kept(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(toy, "training_step", failing)
        with pytest.raises(RuntimeError, match="broken off"):
            train.train(cfg)


# An average that the training step sees


def test_a_mean_teacher_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train.train(run_of("MeanTeacher", tmp_path / "whole"))
    cfg = run_of("MeanTeacher", tmp_path / "broken")
    broken_off(cfg, toys.MeanTeacher, 56, monkeypatch)  # eight images after a checkpoint
    train.train(run_of("MeanTeacher", tmp_path / "broken"))
    whole, broken = saved(tmp_path / "whole"), saved(tmp_path / "broken")
    assert whole.keys() == broken.keys() and all(torch.equal(whole[k], broken[k]) for k in whole)
    names = [k for k in whole if k.startswith("weights")]
    assert names and all(k.startswith("weights net.") for k in names)  # the average is no submodule


def test_the_teacher_is_the_first_average_as_it_moves() -> None:
    """In eval mode, without gradients, outside of what is trained and saved."""
    clock, model = SimpleNamespace(images_seen=0), toys.NoisyClassifier(partial(adamw, **PAGE))
    keys, weights = set(model.state_dict()), list(model.parameters())
    ema = EMA([8, 64], 1.0, clock)
    ema.setup(None, model, "fit")
    for weight in weights:
        nn.init.ones_(weight)
    start = model.average("net").weight.clone()
    clock.images_seen = 8
    ema.update(model)
    teacher = model.average("net")
    torch.testing.assert_close(teacher.weight, (start + 1) / 2)  # one half-life
    assert teacher is ema.nets["8"]["net"] and not teacher.training and not teacher.weight.requires_grad
    assert set(model.state_dict()) == keys and len(list(model.parameters())) == len(weights)


def test_a_teacher_without_averages_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        train.train(run_of("MeanTeacher", tmp_path, "callbacks.ema.half_lives=[]"))
    line = "error: callbacks.ema.half_lives=[]: MeanTeacher learns from an average of its own weights. Fix: "
    assert caught.value.line() == line + "callbacks.ema.half_lives=[2000]"


# A part that is taught further, half of it


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an autoencoder `part` and what was trained on it: `whole`, and `broken` that was broken off."""
    root = tmp_path_factory.mktemp("tuned")
    train.train(composed(*overrides("ae"), "budget.images=24", run_dir=root / "part"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, toys.MODULE, toys)
        train.train(run_of("Tuned", root / "whole", part=root / "part"))
        broken_off(run_of("Tuned", root / "broken", part=root / "part"), toys.Tuned, 56, patch)
        train.train(run_of("Tuned", root / "broken", part=root / "part"))
    return root


def test_a_part_taught_further_goes_on_bit_for_bit(tuned: Path) -> None:
    whole, broken = saved(tuned / "whole"), saved(tuned / "broken")
    assert whole.keys() == broken.keys() and all(torch.equal(whole[k], broken[k]) for k in whole)


def test_a_part_taught_further_samples_from_its_own_weights(tuned: Path) -> None:
    model, part = folders.load(tuned / "whole", ema=True).model, load_file(tuned / "part" / "weights.safetensors")
    own = saved(tuned / "whole")
    for name, weight in model.net.named_parameters():
        assert weight.requires_grad == name.startswith("decoder")
        expected = own[f"average 16 {name}"] if weight.requires_grad else part[f"net.{name}"]
        assert torch.equal(weight, expected), name
        assert torch.equal(weight, part[f"net.{name}"]) != weight.requires_grad, name
    with torch.no_grad():
        z = ImageRngs(0, 0, 2).randn(*model.net.latent_shape)
        assert torch.equal(model.sample({}, ImageRngs(0, 0, 2)), model.net.decode(z))


def test_frozen_weights_are_saved_once_and_neither_averaged_nor_optimised(tuned: Path) -> None:
    told = saved(tuned / "whole")
    model = folders.load(tuned / "whole", ema=False).model
    frozen = [name for name, weight in model.net.named_parameters() if not weight.requires_grad]
    moving = [name for name, weight in model.net.named_parameters() if weight.requires_grad]
    assert frozen and moving and list(model.trained("net")) == [f"net.{name}" for name in moving]
    assert {k for k in told if k.startswith("average 16")} == {f"average 16 {name}" for name in moving}
    assert {k for k in told if k.startswith("weights")} == {f"weights net.{name}" for name in [*frozen, *moving]}
    assert len([k for k in told if k.endswith("exp_avg")]) == len(moving)


def test_frozen_weights_lie_in_memory_once() -> None:
    model = toys.NoisyClassifier(partial(adamw, **PAGE))
    model.net.bias.requires_grad_(False)
    ema = EMA([8], 1.0, SimpleNamespace(images_seen=0))
    ema.setup(None, model, "fit")
    average = ema.nets["8"]["net"]
    assert average.bias is model.net.bias and average.weight is not model.net.weight
    with ema.averaged(model):
        assert average.bias is model.net.bias
    assert [p is model.net.weight for o in [model.configure_optimizers()] for p in o.param_groups[0]["params"]] == [
        True
    ]


def test_room_on_disk_counts_averages_and_moments_of_what_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three files of 4 MB of weights, of which 1 MB is trained and has two moments and three averages: 3 * 9 MB."""
    model = toys.NoisyClassifier(partial(adamw, **PAGE))
    frozen, moving = (nn.Linear(1024, rows, bias=False, device="meta") for rows in (768, 256))
    model.net = nn.Sequential(frozen.requires_grad_(False), moving)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=0))
    with pytest.raises(UserError, match=f"{preflight.MARGIN * 3 * (4 + 5):.0f} MB are needed"):
        preflight.fits_on_disk(model, 3, tmp_path)


def test_a_model_on_what_was_taught_further_outlives_both(tuned: Path, tmp_path: Path) -> None:
    """An autoencoder, one tuned from it, and latent diffusion on that."""
    middle = shutil.copytree(tuned / "whole", tmp_path / "middle")
    train.train(composed(*overrides("ldm", middle), "budget.images=8", run_dir=tmp_path / "run"))
    shutil.rmtree(middle)
    codec = folders.load(tmp_path / "run", ema=True).model.codec
    expected = folders.load(tuned / "whole", ema=True).model.net.state_dict()
    found = codec.autoencoder.net.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)


# A teacher that is another run


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a `teacher`, a diffusion model, and a `student` of it."""
    root = tmp_path_factory.mktemp("taught")
    train.train(composed(*overrides("ddpm"), "budget.images=24", run_dir=root / "teacher"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, toys.MODULE, toys)
        train.train(student_of(root / "teacher", root / "student"))
    return root


def student_of(teacher: Path, folder: Path) -> DictConfig:
    cfg = composed(*overrides("ddpm"), f"model._target_={toys.MODULE}.Distilled", run_dir=folder)
    with open_dict(cfg):
        for key in ("cond_dropout", "guider"):
            del cfg.model[key]
        cfg.model.teacher = {"run": str(teacher), "experiment": "shapes_ddpm", "images": None}
    return cfg


def test_a_teacher_denoises_as_its_run_does(taught: Path) -> None:
    teacher = folders.load(taught / "student", ema=True).model.teacher.net
    model = folders.load(taught / "teacher", ema=True).model
    assert teacher.shape == (3, 8, 8) and set(teacher.conditions) == model.needs and not teacher.training
    torch.manual_seed(0)
    for weight, own in zip(teacher.parameters(), model.part().parameters(), strict=True):
        assert torch.equal(weight, own) and not weight.requires_grad
    x_t, t = torch.randn(4, 3, 8, 8), torch.full((4,), 0.5)
    cond = {"label": torch.arange(4), "attributes": torch.eye(4, 14)}
    with torch.no_grad():
        for named, known in ((cond, model.embedder(cond, 4)), (None, model.embedder.null(4))):
            assert torch.equal(teacher.denoise(x_t, t, named), model.objective.denoise(model.net, x_t, t, known))


def test_a_student_is_saved_without_its_teacher_and_samples(taught: Path) -> None:
    assert {key.split(".")[0] for key in load_file(taught / "student" / "weights.safetensors")} == {"net", "embedder"}
    loaded = folders.load(taught / "student", ema=True)
    cond = loaded.model.condition(loaded.data.test_batch(0, 2), "")
    with torch.no_grad():
        assert loaded.model.sample(cond, ImageRngs(0, 0, 2)).shape == (2, 3, 8, 8)


def test_a_run_that_does_not_denoise_is_no_teacher(tuned: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        train.train(student_of(tuned / "part", tmp_path))
    line = "error: model.teacher=LikelihoodAutoencoder: it does not denoise. Fix: model.teacher.experiment=shapes_ddpm"
    assert caught.value.line() == line


# A model that makes no images


def test_a_classifier_is_a_model() -> None:
    """Two steps by hand, as the Trainer would: what is reported, clipped and learned."""
    torch.manual_seed(0)
    model = toys.NoisyClassifier(partial(adamw, **PAGE))
    assert not isinstance(model, Generator) and not hasattr(model, "sample")
    model.grad_clip, optimizer = 1e-3, model.configure_optimizers()
    before = model.net.weight.detach().clone()
    loss = model.training_step({"image": torch.ones(3, 4), "label": torch.arange(3)})
    loss.backward()
    model.configure_gradient_clipping(optimizer)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3) and model.reported["loss"] == loss.detach()
    optimizer.step()
    assert not torch.equal(model.net.weight, before)


def test_a_classifier_is_trained_by_the_program_and_makes_no_images(tmp_path: Path) -> None:
    """Its run is saved, exported and lent like any other; nothing is drawn, judged or sampled."""
    cfg = composed(*overrides("ae"), "callbacks.grids.every_images=8", run_dir=tmp_path)
    kind = {"_target_": f"{toys.MODULE}.NoisyClassifier", "n_inputs": 192, "n_classes": 36}
    with open_dict(cfg):
        cfg.model = OmegaConf.create({**kind, "optimizer": cfg.model.optimizer})
    train.train(cfg)
    weights = load_file(tmp_path / "weights.safetensors")
    torch.testing.assert_close(weights["net.weight"], saved(tmp_path)["average 16 weight"])
    assert json.loads((tmp_path / "summary.json").read_text())["metrics"] == {}
    assert not any(k.startswith("val/") for row in read_rows(tmp_path / "metrics.csv") for k in row)
    assert not list(tmp_path.rglob("*.png"))
    sha = hashlib.sha256((tmp_path / "weights.safetensors").read_bytes()).hexdigest()
    assert torch.equal(build.part(tmp_path, sha, cfg).weight, weights["net.weight"])
    for program, config in ((sample.sample, "sample"), (evaluate.evaluate, "evaluate")):
        with pytest.raises(UserError) as caught:
            program(composed(f"run={tmp_path}", config=config))
        assert "NoisyClassifier makes no images. Fix: run=DIR" in caught.value.line()
