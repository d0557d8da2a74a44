"""evaluate.py: one line of JSON, the figures of training, and the protocol that they hold under."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import evaluate as entry
import train
from atelier.core.errors import UserError
from atelier.core.rng import ImageRngs
from atelier.images.pixels import to_float, to_uint8
from atelier.losses.perceptual import LPIPS
from atelier.metrics import classifier
from atelier.metrics.shapes import wilson
from atelier.runs import folders
from tests.compose import composed
from tests.conftest import overrides

AS_TRAINING = ["eval.n_samples=8", "eval.n_real=8", "eval.batch_size=4", "eval.n_diagnosed=8"]


def told(run: Path, capsys: pytest.CaptureFixture, *words: str) -> dict[str, Any]:
    """What a command prints, which is one line, and keeps."""
    capsys.readouterr()
    entry.evaluate(composed(f"run={run}", *words, config="evaluate"))
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert (run / "evaluations.jsonl").read_text().splitlines()[-1] == printed.strip()
    return json.loads(printed, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A tiny ddpm run whose samples a classifier of the set judges, in bf16, and the words that ask for the same."""
    root = tmp_path_factory.mktemp("measured")
    words = ["metrics=classifier", f"metrics.cache={root}/cache"]
    train.train(composed(*overrides("ddpm"), *words, "trainer.precision=auto", run_dir=root / "run"))
    return root / "run", words


@pytest.mark.parametrize("family", ["ddpm", "gan", "vae", "ldm"])
def test_gives_the_figures_of_training(finished: dict[str, Path], capsys: pytest.CaptureFixture, family: str) -> None:
    run = finished[family]
    found = told(run, capsys, "metrics=none", *AS_TRAINING)
    summary = json.loads((run / "summary.json").read_text())
    assert len(summary["metrics"]) >= 4
    assert found["metrics"] == summary["metrics"]
    assert found["protocol"] == summary["protocol"]
    assert found["protocol"]["ema"] == [16] and found["protocol"]["precision"] == "32-true"
    assert found["images_seen"] == summary["images_seen"] == 96
    assert {f"judge/{name}" for name in ("combinations", "places", "recall")} <= set(found["metrics"])
    low, high = found["intervals"]["judge/valid"]
    assert low <= found["metrics"]["judge/valid"] <= high
    assert high == pytest.approx(0.324, abs=1e-3)  # 0 of 8


def test_shares_of_test_images_are_of_as_many_as_there_are(
    finished: dict[str, Path], capsys: pytest.CaptureFixture
) -> None:
    found = told(finished["vae"], capsys, "metrics=none", "eval.n_samples=20")
    assert (found["protocol"]["n_samples"], found["protocol"]["n_test"]) == (20, 16)
    k = round(16 * found["metrics"]["recon/valid"])
    assert found["intervals"]["recon/valid"] == list(wilson(k, 16)) != list(wilson(k, 20))


def test_shapes_are_judged_without_a_distance_unless_one_is_asked_for(
    finished: dict[str, Path], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(classifier, "train_classifier", lambda *_: pytest.fail("trained"))
    entry.evaluate(composed(f"run={finished['vae']}", *AS_TRAINING, config="evaluate"))
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert {"judge/valid", "recon/psnr"} <= set(found["metrics"])
    assert not [name for name in found["metrics"] if "fd_" in name] and "n_real" not in found["protocol"]
    assert printed.err.startswith("no distance is measured") and "metrics=classifier" in printed.err


def test_rate_and_distortion_of_a_diffusion_model(finished: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    """Three terms whose sum is bits/dim with its interval, no samples; a table, a CSV and a picture of the curve."""
    run = finished["ddpm"]
    capsys.readouterr()
    words = ["metrics=rate_distortion", "metrics.rate_distortion=4", "eval.n_samples=8", "eval.batch_size=3"]
    entry.evaluate(composed(f"run={run}", *words, config="evaluate"))
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    parts = [found["metrics"][f"bpd_{name}"] for name in ("prior", "steps", "image")]
    assert set(found["metrics"]) == {"nll", "bpd", "bpd_error", "bpd_prior", "bpd_steps", "bpd_image"}
    assert found["metrics"]["bpd"] == pytest.approx(sum(parts)) and min(parts[1:]) > 0 == parts[0]  # it ends in noise
    low, high = found["intervals"]["bpd"]
    assert high - low == pytest.approx(2 * 1.96 * found["metrics"]["bpd_error"])
    assert (found["protocol"]["drawn_levels"], found["protocol"]["n_test"]) == (4, 8)
    rows = (run / "rate_distortion.csv").read_text().splitlines()
    assert rows[0].startswith("t,") and len(rows) == 1 + 5
    assert (run / "rate_distortion.svg").read_text().count("<circle") == 5
    assert "L_T" in printed.err and "RMSE" in printed.err
    loaded = folders.load(run, ema=True)
    batch = loaded.data.chosen("test", range(8))
    with torch.inference_mode():
        nll = loaded.model.nll(batch["image"], loaded.model.condition(batch, ""), ImageRngs(0, 0, 8))
    assert nll.shape == (8,) and nll.mean().item() == pytest.approx(found["metrics"]["nll"], rel=0.3)  # other levels


def test_each_line_is_kept(finished: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    run = finished["gan"]
    for n in (4, 6):
        told(run, capsys, "metrics=none", f"eval.n_samples={n}")
    lines = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [line["protocol"]["n_samples"] for line in lines[-2:]] == [4, 6]


def test_distances_are_those_of_training_too(measured: tuple[Path, list[str]], capsys: pytest.CaptureFixture) -> None:
    """In the precision that `auto` was resolved to."""
    run, words = measured
    found = told(run, capsys, *words, *AS_TRAINING)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["metrics"]["fd_classifier"] > 0
    assert found["metrics"] == summary["metrics"]
    assert found["protocol"] == summary["protocol"]


def test_lpips_of_reconstructions_is_measured_where_it_is_asked_for(
    tmp_path: Path, lpips_files: dict[str, str], capsys: pytest.CaptureFixture
) -> None:
    words = ["perceptual@metrics.lpips=lpips", *(f"metrics.lpips.{name}={f}" for name, f in lpips_files.items())]
    train.train(composed(*overrides("vae"), *words, "data.image_size=16", run_dir=tmp_path))
    found = told(tmp_path, capsys, "metrics=none", *words, *AS_TRAINING)["metrics"]
    assert found == json.loads((tmp_path / "summary.json").read_text())["metrics"]
    run = folders.load(tmp_path, ema=True)
    with torch.inference_mode():
        x = run.data.test_batch(0, 8)["image"]
        expected = LPIPS(**lpips_files)(to_float(to_uint8(run.model.decode(run.model.encode(x)))), x).mean()
    assert found["recon/lpips"] == pytest.approx(expected.item(), rel=1e-4)


def test_the_protocol_says_what_was_asked(measured: tuple[Path, list[str]], capsys: pytest.CaptureFixture) -> None:
    run, same = measured
    words = ["sampler=ddim", "sampler.steps=3", "guidance=1", "ema=false", "seed=7", "precision=bf16-mixed"]
    protocol = told(run, capsys, *same, "eval.n_samples=4", *words)["protocol"]
    asked = {"nfe": 3, "guidance": 1.0, "ema": [], "seed": 7, "precision": "bf16-mixed", "n_samples": 4, "n_real": 16}
    assert {name: protocol[name] for name in asked} == asked
    assert protocol["sampler"].startswith("DDIM(steps=3")


def test_averaged_weights_and_the_seed_change_the_figures(
    measured: tuple[Path, list[str]], capsys: pytest.CaptureFixture
) -> None:
    run, same = measured
    base, raw, other = (
        told(run, capsys, *same, *AS_TRAINING, *words)["metrics"]["fd_classifier"]
        for words in ([], ["ema=false"], ["seed=1"])
    )
    assert base != raw and base != other


@pytest.mark.parametrize(
    ("family", "words", "line"),
    [
        ("vae", ["guidance=3"], "error: guidance=3: VAE takes no guidance here. Fix: leave guidance out"),
        ("gan", ["sampler=ddim"], "error: sampler=ddim: GAN takes no sampler here. Fix: leave sampler out"),
        (
            "ldm",
            ["metrics=rate_distortion"],
            "error: metrics=rate_distortion: LDM does not diffuse pixels, whose grey levels the bound counts.",
        ),
        ("gan", ["metrics=mobilenet"], "error: metrics.weights=None: mobilenet needs its weight file."),
    ],
)
def test_refuses_in_one_line(finished: dict[str, Path], family: str, words: list[str], line: str) -> None:
    with pytest.raises(UserError) as error:
        entry.evaluate(composed(f"run={finished[family]}", *words, config="evaluate"))
    assert error.value.line().startswith(line)
