"""Diagnostics of diffusion models: computed anew by hand, and seen to find what they are for."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import train
from atelier.checkpoints.store import load, newest
from atelier.core.rng import ImageRngs
from atelier.evaluation import diagnostics
from atelier.evaluation.evaluator import Evaluator
from atelier.metrics.suite import Suite
from atelier.models.base import Cond
from atelier.runs import folders
from tests.campaign import differences, flat
from tests.compose import composed
from tests.conftest import overrides

N = 8


def evaluator(n: int = N, batch_size: int = 4) -> Evaluator:
    suite = Suite(net="none", weights=None, names=[], antialias=False, fetch=False, cache="")
    return Evaluator(N, N, batch_size, 3, suite, n)


def measured(loaded: folders.LoadedRun, batch_size: int = 4, n: int = N) -> dict[str, diagnostics.Estimate]:
    with torch.inference_mode():
        return diagnostics.denoised(loaded.model, loaded.data, 3, n, batch_size, nullcontext, lambda *_: None)


@pytest.fixture(scope="module")
def loaded(finished: dict[str, Path]) -> folders.LoadedRun:
    """The tiny run with weights that tell its conditions apart."""
    found = folders.load(finished["ddpm"], ema=True)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in found.model.parameters():
            p.add_(torch.randn(p.shape, generator=rng) * 0.1)
    return found


def test_by_hand(loaded: folders.LoadedRun) -> None:
    """The held-out error of the middle bin: image by image, level by level."""
    model, data = loaded.model, loaded.data
    train_images = data.chosen("train", range(N))["image"].double()
    variance = train_images.var(0).flatten()
    batch, shares = data.test_batch(0, N), []
    for k in range(N):
        rngs = ImageRngs(3, k, 1)
        place = rngs.rand(5)[0, 2].double()
        eps = [rngs.randn(3, 8, 8) for _ in range(5)][2]
        t = torch.sigmoid(-(-2 + 4 * place) / 2)  # of the straight path, logSNR = -2 logit t
        x = batch["image"][k : k + 1]
        x_t = (1 - t).float() * x + t.float() * eps
        with torch.no_grad():
            cond = model.embedder({name: batch[name][k : k + 1] for name in model.needs}, 1)
            v = model.net(x_t, 1000 * t[None].float(), cond)
        wrong = (x_t - t.float() * v - x).double().square().mean()
        snr = ((1 - t) / t) ** 2
        shares.append((wrong / (variance / (1 + variance * snr)).mean()).item())
    found = measured(loaded)["heldout/logsnr_0"]
    shares = torch.tensor(shares)
    assert found.value == pytest.approx(shares.mean().item(), rel=1e-4)
    assert found.half_width == pytest.approx(1.96 * shares.std().item() / N**0.5, rel=1e-4)


def test_batches_change_nothing_and_means_are_of_all_bins(loaded: folders.LoadedRun) -> None:
    found, other = measured(loaded), measured(loaded, batch_size=3)
    for name, one in found.items():
        assert one == pytest.approx(other[name], rel=1e-5, abs=1e-6), name
    bins = [found[f"heldout/logsnr_{centre}"].value for centre in (8, 4, 0, -4, -8)]
    assert found["heldout/loss"].value == pytest.approx(math.prod(bins) ** (1 / 5))
    held, trained = found["heldout/loss"], found["training/loss"]
    assert found["gap"].value == pytest.approx(math.log(held.value / trained.value))
    widths = held.half_width / held.value, trained.half_width / trained.value
    assert found["gap"].half_width == pytest.approx(math.hypot(*widths))
    assert len(found) == 2 * 6 + 2 and all(one.half_width > 0 for one in found.values())


def test_exchanged_conditions_are_those_of_the_next_image(loaded: folders.LoadedRun) -> None:
    model, data = loaded.model, loaded.data
    exchanged, heldout = {}, data.test_batch(0, N)
    with torch.inference_mode():
        x = heldout["image"]
        for name, shift in (("own", 0), ("next", -1)):
            cond = {n: heldout[n].roll(shift, 0) for n in model.needs}
            exchanged[name], levels = model.denoising_errors(x, cond, ImageRngs(3, 0, N))
        variance = data.chosen("train", range(N))["image"].var(0)
        own, other = (exchanged[k] / model.linear_errors(variance, levels) for k in ("own", "next"))
    found = measured(loaded)["condition_gain"]
    gain = (other.mean(0) / own.mean(0)).log().mean().item()
    assert found.value == pytest.approx(gain, rel=1e-3, abs=1e-6) and abs(found.value) > 1e-6


def test_intervals_of_logarithms_hold_what_they_should() -> None:
    """Of 400 draws of errors that are skewed, 1000 times as large in one bin, and alike within an image."""
    rng, n, held = torch.Generator().manual_seed(0), 100, 0
    for _ in range(400):
        shared, own = torch.randn(n, 1, generator=rng), torch.randn(n, 2, generator=rng)
        errors = (0.3 * shared + 0.3 * own).double().exp() * torch.tensor([1.0, 1000.0])
        log, influence = diagnostics.logarithm(errors)
        true = 0.3**2 + math.log(1000) / 2  # ln of the mean of exp(N(0, 2 s^2)) is s^2
        held += abs(log - true) <= diagnostics.estimate(influence).half_width
    assert 0.92 < held / 400 < 0.98


def test_a_net_that_does_not_listen_gains_nothing(finished: dict[str, Path]) -> None:
    loaded = folders.load(finished["ddpm"], ema=True)
    embed = loaded.model.embedder.forward
    loaded.model.embedder.forward = lambda cond, n, drop=None: embed({k: 0 * v for k, v in cond.items()}, n, drop)
    found = measured(loaded)["condition_gain"]
    assert found == (0, 0)


def test_one_that_knows_its_training_images_has_a_gap(loaded: folders.LoadedRun, monkeypatch: Any) -> None:
    """It answers with the training image nearest to what it sees: no error there, some elsewhere."""
    known = loaded.data.chosen("train", range(20))["image"]

    def denoise(net: Any, x_t: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        alpha, _ = loaded.model.objective.schedule.pair(t, like=x_t)
        distance = (x_t[:, None] - alpha[:, None] * known[None]).flatten(2).norm(dim=2)
        return known[distance.argmin(1)]

    monkeypatch.setattr(loaded.model.objective, "denoise", denoise)
    found = measured(loaded)
    assert found["training/logsnr_8"].value == 0 < 1 < found["heldout/logsnr_8"].value
    assert found["gap"].value - found["gap"].half_width > 0


class _Returns:
    """What a model draws, in place of its own samples."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __call__(self, cond: Cond, rngs: ImageRngs) -> Tensor:
        return self.images[[k for _, k in rngs.images]]


@pytest.mark.parametrize(("split", "low", "high"), [("train", 0.95, 1.0), ("test", 0.45, 0.55)])
def test_samples_that_are_copies(
    loaded: folders.LoadedRun, monkeypatch: Any, split: str, low: float, high: float
) -> None:
    monkeypatch.setattr(loaded.model, "sample", _Returns(loaded.data.chosen(split, range(N))["image"]))
    judge = evaluator()
    values, protocol = judge(loaded.model, loaded.data, {}, nullcontext, lambda *_: None)
    assert low <= values["memorisation"] <= high
    assert protocol["n_diagnosed"] == N and protocol["n_remembered"] == 20  # all there are
    told = judge.intervals(values, protocol)
    assert {"memorisation", "gap", "heldout/logsnr_-8", "judge/valid"} <= set(told)
    assert told["gap"] == pytest.approx(
        (values["gap"] - judge.half_widths["gap"], values["gap"] + judge.half_widths["gap"])
    )


def test_features_of_the_distances_are_used_where_there_are_some(loaded: folders.LoadedRun, monkeypatch: Any) -> None:
    """Here the feature is the mean of the image, in which a black sample is near to a black training image."""
    monkeypatch.setattr(diagnostics, "thumbnails_of", lambda *_: pytest.fail("made"))
    judge = evaluator()
    judge.suite.names, judge.suite.net = ["fid"], SimpleNamespace(name="mean", published=False, protocol={})
    judge.suite.features = lambda images: images.float().flatten(1).mean(1, keepdim=True)
    judge.suite.real = lambda fingerprint, compute, agree: compute()
    judge.suite.compare = lambda real, fake: {}
    values, _ = judge(loaded.model, loaded.data, {}, nullcontext, lambda *_: None)
    assert 0 <= values["memorisation"] <= 1


def test_mirrored_training_images_are_training_images_where_training_mirrors(loaded: folders.LoadedRun) -> None:
    still, mirrors = replace(loaded.data), replace(loaded.data, flip=True)
    small = {kind: diagnostics.thumbnails_of(data, "train", 6, 4, lambda *_: None) for kind, data in
             (("still", still), ("mirrors", mirrors))}  # fmt: skip
    assert len(small["mirrors"]) == 2 * len(small["still"]) == 12 and torch.equal(small["mirrors"][:6], small["still"])
    assert torch.equal(small["mirrors"][6:].view(6, 3, 8, 8), small["still"].view(6, 3, 8, 8).flip(-1))


def test_latents_are_what_is_denoised(finished: dict[str, Path]) -> None:
    """The posterior's mean also where training draws from the posterior."""
    found = folders.load(finished["ldm"], ema=True)
    x = found.data.test_batch(0, 4)["image"]
    found.model.codec.mode = "mode"
    expected = found.model.codec.encode(x)
    found.model.codec.mode = "sample"
    before = torch.get_rng_state()
    assert torch.equal(found.model.encode(x), expected) and torch.equal(torch.get_rng_state(), before)
    values = measured(found)
    assert len(values) >= 12 and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("family", ["ddpm", "ldm"])
def test_training_is_bit_for_bit_the_same_without(family: str, finished: dict[str, Path], tmp_path: Path) -> None:
    """Dropout and the draws of the posterior included: all that a checkpoint holds."""
    words = [*overrides(family, finished["vae"]), "callbacks.grids.every_images=32", "eval.n_diagnosed=0"]
    train.train(composed(*words, run_dir=tmp_path))
    with_them, without = (load(newest(folder / "checkpoints")) for folder in (finished[family], tmp_path))
    parts = ("state_dict", "optimizer_states", "callbacks")
    assert differences(*(flat({k: c[k] for k in parts}, "") for c in (with_them, without))) == []
    told = folders.summary(tmp_path)["metrics"]
    assert "gap" not in told and "memorisation" not in told and "gap" in folders.summary(finished[family])["metrics"]


def test_metrics_csv_has_each_number_and_its_interval(finished: dict[str, Path]) -> None:
    from atelier.callbacks.table import read_rows

    last = read_rows(finished["ddpm"] / "metrics.csv")[-1]
    for name in ("heldout/logsnr_8", "training/logsnr_-8", "gap", "condition_gain", "memorisation"):
        assert f"val/{name}" in last and last[f"val/{name}_ci95"] >= 0
