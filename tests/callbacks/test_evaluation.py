"""Sampling during training: out of memory, random numbers, modes, pictures."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import train
from atelier.callbacks.evaluation import Evaluation
from atelier.callbacks.grids import Grids
from atelier.checkpoints.store import load, newest
from atelier.core.rng import ImageRngs
from atelier.evaluation.evaluator import sample
from atelier.images.pixels import to_uint8
from atelier.runs import folders
from tests.compose import composed
from tests.conftest import overrides

FAMILIES = ["vae", "ddpm", "gan", "ldm"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
@pytest.mark.parametrize("family", ["gan", "ddpm"])
def test_out_of_memory_halves_the_batch_and_gives_the_same_images(
    finished: dict[str, Path], family: str, error: Exception
) -> None:
    """More than two at a time do not fit; the noise of the first try was drawn already."""
    loaded = folders.load(finished[family], ema=True)
    cond = loaded.model.condition(loaded.data.test_batch(0, 7), "")
    with torch.inference_mode():
        expected = loaded.model.sample(cond, ImageRngs(3, 0, 7))
        whole, sizes = type(loaded.model).sample, []

        class Small(type(loaded.model)):
            def sample(self, cond: Any, rngs: ImageRngs) -> torch.Tensor:
                sizes.append(len(rngs))
                images = whole(self, cond, rngs)
                if len(rngs) > 2:
                    raise error
                return images

        loaded.model.__class__ = Small
        found = sample(loaded.model, cond, ImageRngs(3, 0, 7), {})
    assert sorted(n for n in sizes if n <= 2) == [1, 2, 2, 2] and max(sizes) == 7
    difference = (to_uint8(found).int() - to_uint8(expected).int()).abs()
    assert difference.max() <= 1 and len(to_uint8(found).unique()) > 10


def test_other_errors_and_a_single_image_too_many_are_not_hidden(finished: dict[str, Path]) -> None:
    class Model:
        def __init__(self, error: Exception) -> None:
            self.error = error

        def sample(self, cond: Any, rngs: ImageRngs) -> None:
            raise self.error

    with pytest.raises(RuntimeError, match="a bug"):
        sample(Model(RuntimeError("a bug")), {}, ImageRngs(0, 0, 4), {})
    with pytest.raises(MemoryError):
        sample(Model(MemoryError()), {}, ImageRngs(0, 0, 4), {})


@pytest.mark.parametrize("family", FAMILIES)
def test_judging_and_drawing_touch_no_random_state_no_weight_and_no_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: dict[str, Path], family: str
) -> None:
    seen: list[str] = []

    def guarded(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(self: Any, trainer: Any, model: Any) -> None:
            weights = [t.clone() for t in model.state_dict().values()]
            torch.manual_seed(1)
            before, others = torch.get_rng_state(), random.getstate()
            original(self, trainer, model)
            assert torch.equal(before, torch.get_rng_state())
            assert random.getstate() == others
            assert all(torch.equal(a, b) for a, b in zip(weights, model.state_dict().values(), strict=True))
            seen.append(name)

        monkeypatch.setattr(owner, name, wrapped)

    guarded(Evaluation, "on_validation_epoch_end")
    guarded(Grids, "draw")
    modes: list[bool] = []
    original = Grids.on_train_batch_end

    def watched(self: Any, trainer: Any, model: Any, *rest: Any) -> None:
        modes.append(all(m.training for m in model.modules()))
        original(self, trainer, model, *rest)

    monkeypatch.setattr(Grids, "on_train_batch_end", watched)
    words = [*overrides(family, finished["vae"]), "callbacks.grids.every_images=32"]
    train.train(composed(*words, run_dir=tmp_path / "run"))
    assert seen.count("draw") == 3 and seen.count("on_validation_epoch_end") == 3
    assert modes == [True] * 12


def test_pictures_lie_on_disk(finished: dict[str, Path]) -> None:
    folder = finished["vae"] / "samples"
    names = sorted(path.name for path in folder.iterdir())
    steps = ("000000032", "000000064", "000000096")
    expected = [f"{kind}_{step}.png" for kind in ("reconstructions", "samples") for step in steps]
    assert names == sorted([*expected, "progress.gif", "real.png"])
    with Image.open(folder / "progress.gif") as animation:
        assert animation.n_frames == 3
    grids = [Image.open(folder / f"samples_{step}.png").tobytes() for step in steps]
    assert len(set(grids)) == 3


def test_the_default_run_draws_half_way_and_at_its_end() -> None:
    """A grid is drawn in the batch that passes a multiple of `every_images`."""
    cfg = composed()
    every, size, images = cfg.callbacks.grids.every_images, cfg.data.batch_size, cfg.budget.images
    seen = range(size, images + size, size)
    drawn = [n for n in seen if n // every > (n - size) // every]
    assert len(drawn) == 2 and abs(drawn[0] - images / 2) < size and drawn[1] == seen[-1]


def test_the_picture_at_the_end_is_what_the_saved_average_draws(finished: dict[str, Path]) -> None:
    from atelier.images.pictures import grid

    loaded = folders.load(finished["gan"], ema=True)
    batch = loaded.data.test_batch(0, 4)
    cond, words = loaded.model.condition(batch, ""), [loaded.data.names.called(k) for k in batch["label"].tolist()]
    with torch.inference_mode():
        images = to_uint8(loaded.model.sample(cond, ImageRngs(0, 0, 4)))
    drawn = Image.open(finished["gan"] / "samples/samples_000000096.png")
    assert drawn.tobytes() == grid(images, words=words).permute(1, 2, 0).contiguous().numpy().tobytes()


def test_summary_says_what_the_figures_hold_under(finished: dict[str, Path]) -> None:
    told = json.loads((finished["ddpm"] / "summary.json").read_text())
    assert set(told) == {
        "metrics", "protocol", "intervals", "reasons", "images_seen", "resumed_at", "images_per_second", "seconds",
        "gflop_per_image", "tflop", "command", "commit", "device", "versions",
    }  # fmt: skip
    assert told["images_seen"] == 96
    assert told["tflop"] == pytest.approx(told["gflop_per_image"] * 96 / 1000) and told["tflop"] > 0
    protocol = {"n_samples": 8, "seed": 0, "split": "test", "ema": [16], "precision": "32-true", "nfe": 2}
    assert {name: told["protocol"][name] for name in protocol} == protocol


def test_a_run_killed_in_its_last_evaluation_is_judged_again(tmp_path: Path, finished: dict[str, Path]) -> None:
    """The checkpoint of the last batch is there, its row is not: one evaluation, no further step."""
    folder = tmp_path / "run"
    shutil.copytree(finished["vae"], folder)
    before = (folder / "metrics.csv").read_text()
    torn = [line for line in before.splitlines(keepends=True) if not line.startswith("96,,")]
    assert len(torn) == len(before.splitlines()) - 1
    (folder / "metrics.csv").write_text("".join(torn))
    (folder / "summary.json").unlink()
    state = load(newest(folder / "checkpoints"))["state_dict"]
    words = [*overrides("vae"), "callbacks.grids.every_images=32", "checkpoint.best=recon/psnr"]
    train.train(composed(*words, run_dir=folder))
    assert (folder / "metrics.csv").read_text().split() == before.split()
    assert json.loads((folder / "summary.json").read_text())["images_seen"] == 96
    again = load(newest(folder / "checkpoints"))["state_dict"]
    assert all(torch.equal(state[name], again[name]) for name in state)


def test_raw_weights_beside_averaged_ones(tmp_path: Path, finished: dict[str, Path]) -> None:
    """Figures are those of each alone, of the same noise; in a picture each is followed by a raw one."""
    from atelier.callbacks.table import read_rows
    from atelier.images.pictures import beside, grid

    words = [*overrides("ddpm"), "callbacks.grids.every_images=32", "eval.raw=true"]
    train.train(composed(*words, "checkpoint.best=raw/heldout/loss", run_dir=tmp_path))
    told = folders.summary(tmp_path)["metrics"]
    plain = folders.summary(finished["ddpm"])["metrics"]
    assert {name: value for name, value in told.items() if not name.startswith("raw/")} == plain
    assert {name.removeprefix("raw/") for name in told if name.startswith("raw/")} == set(plain)
    assert told["raw/heldout/loss"] != told["heldout/loss"]
    assert read_rows(tmp_path / "metrics.csv")[-1]["val/raw/gap"] == pytest.approx(told["raw/gap"])
    drawn = []
    for ema in (True, False):
        loaded = folders.load(tmp_path, ema)
        cond = loaded.model.condition(loaded.data.test_batch(0, 4), "")
        with torch.inference_mode():
            drawn.append(to_uint8(loaded.model.sample(cond, ImageRngs(0, 0, 4))))
    labels = loaded.data.test_batch(0, 4)["label"].tolist()
    words = [loaded.data.names.called(k) for k in labels for _ in drawn]
    expected = grid(beside(drawn), 4, words=words).permute(1, 2, 0).contiguous().numpy().tobytes()
    assert Image.open(tmp_path / "samples/samples_000000096.png").tobytes() == expected


def test_raw_figures_of_evaluate_are_those_of_training(
    tmp_path: Path, finished: dict[str, Path], capsys: pytest.CaptureFixture
) -> None:
    import evaluate

    shutil.copytree(finished["ddpm"], tmp_path / "run")
    counts = ["eval.n_samples=8", "eval.n_real=8", "eval.batch_size=4", "eval.n_diagnosed=8", "metrics=none"]
    told = {}
    for word in ("eval.raw=true", "ema=false"):
        capsys.readouterr()
        evaluate.evaluate(composed(f"run={tmp_path / 'run'}", *counts, word, config="evaluate"))
        told[word] = json.loads(capsys.readouterr().out)["metrics"]
    raw = {k.removeprefix("raw/"): v for k, v in told["eval.raw=true"].items() if k.startswith("raw/")}
    assert raw == told["ema=false"] and len(raw) >= 19
