"""How many images are diagnosed: no more than a run has time for, and once chosen the same to its end."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

import train
from atelier.callbacks.diagnostics import LEAST, MOST, Diagnostics, affordable
from atelier.callbacks.table import read_rows
from atelier.checkpoints.store import Manifest, load, newest
from atelier.core.errors import UserError
from atelier.runs import folders
from tests.compose import composed
from tests.conftest import overrides


@pytest.mark.parametrize("seconds", [1e-4, 1.4e-3, 0.02, 0.3])
@pytest.mark.parametrize("images", [512, 110_000, 5_000_000])
@pytest.mark.parametrize("evaluations", [1, 10])
@pytest.mark.parametrize("forwards", [10, 15])
def test_they_take_1_percent_or_4_seconds(images: int, seconds: float, evaluations: int, forwards: int) -> None:
    n = affordable(images, seconds, evaluations, forwards)
    cost = evaluations * n * forwards / 3 * seconds
    assert n in (4, 8, 16, 32, 64, 128, 256, 512, 1024)
    assert cost <= max(4, images * seconds / 100) or n == LEAST
    assert 2.2 * cost >= max(3.2, images * seconds * 0.008) or n == MOST


def test_a_run_of_the_default_size_looks_at_256() -> None:
    """110,000 images, 700 a second, judged once, with conditions."""
    assert affordable(110_000, 1 / 700, 1, 15) == 256


def made(rows: list[dict[str, float]]) -> tuple[Diagnostics, SimpleNamespace]:
    from atelier.callbacks.table import Table

    clock = SimpleNamespace(images=110_000, images_seen=0)
    table = Table(8, "unused", clock, None)
    table.rows = rows
    strategy = SimpleNamespace(broadcast=lambda n: n)
    trainer = SimpleNamespace(val_check_interval=1000, strategy=strategy, datamodule=SimpleNamespace(batch_size=32))
    return Diagnostics(clock, table), trainer


def test_the_count_follows_the_speed_and_stays(finished: dict[str, Path]) -> None:
    """Four evaluations. The first row, in which libraries are loaded, is not the median."""
    model = folders.load(finished["ddpm"], ema=True).model
    rows = [{"perf/images_per_second": speed} for speed in (10.0, 700.0, 700.0, 710.0)]
    found, trainer = made(rows)
    assert found.count(trainer, model) == 64 == affordable(110_000, 1 / 700, 4, 15)
    rows += [{"perf/images_per_second": 1.0}] * 100
    assert found.count(trainer, model) == 64
    again, _ = made([])
    again.load_state_dict(found.state_dict())
    assert again.count(trainer, model) == 64
    fresh, _ = made([])
    assert fresh.count(trainer, model) == LEAST


def test_a_run_chooses_by_itself_and_keeps_the_checkpoint_that_its_held_out_loss_likes(tmp_path: Path) -> None:
    words = [*overrides("ddpm"), "eval.n_diagnosed=null", "checkpoint.best=heldout/loss"]
    train.train(composed(*words, run_dir=tmp_path))
    n = load(newest(tmp_path / "checkpoints"))["callbacks"]["Diagnostics"]["n"]
    assert n >= LEAST and folders.summary(tmp_path)["protocol"]["n_diagnosed"] == min(n, 16)  # test images
    losses = [row["val/heldout/loss"] for row in read_rows(tmp_path / "metrics.csv") if "val/heldout/loss" in row]
    best = Manifest(tmp_path / "checkpoints").read()["best"]
    assert len(losses) == 3 and best["value"] == min(losses) and best["metric"] == "heldout/loss"


def test_a_metric_that_is_off_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such metric of this run"):
        train.train(composed(*overrides("ddpm"), "eval.n_diagnosed=0", "checkpoint.best=gap", run_dir=tmp_path))


def test_a_model_that_does_not_denoise_is_not_diagnosed(finished: dict[str, Path]) -> None:
    found, trainer = made([])
    assert found.count(trainer, folders.load(finished["gan"], ema=True).model) == 0
    assert "memorisation" not in folders.summary(finished["gan"])["metrics"]
