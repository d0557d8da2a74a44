"""The clock: rates, budgets, stops."""

from __future__ import annotations

import functools
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import train
from atelier.callbacks.clock import Clock
from atelier.callbacks.table import read_rows
from atelier.checkpoints.store import load, newest
from atelier.core import stopping
from atelier.core.errors import UserError
from atelier.models.gan import GAN
from atelier.models.vae import VAE
from atelier.optim import lr_factor
from tests.compose import composed
from tests.conftest import overrides


def test_due_is_once_in_every_interval() -> None:
    for every, batch in ((24, 8), (24, 16), (10, 8), (8, 8), (5, 8)):
        clock = Clock(1000, None, 0)
        due = []
        for seen in range(batch, 20 * batch + 1, batch):
            clock.images_seen = seen
            if clock.due(every, batch):
                due.append(seen)
        multiples = range(every, 20 * batch + 1, every)
        assert due == sorted({-(-m // batch) * batch for m in multiples}), (every, batch)


@pytest.mark.parametrize("family", ["vae", "gan"])
def test_the_rate_is_a_function_of_images_seen(finished: dict[str, Path], family: str) -> None:
    peak, warmup, decay, start = (2e-3, 2000, "cosine", 2000) if family == "vae" else (1e-3, 0, "linear", 0)
    rows = [row for row in read_rows(finished[family] / "metrics.csv") if "train/lr" in row]
    for row in rows:
        before = row["images_seen"] - 8  # when the batch began
        assert row["train/lr"] == pytest.approx(peak * lr_factor(before, warmup, decay, start, 96), rel=1e-9)
    assert len({row["train/lr"] for row in rows}) == 12


def test_the_rate_by_hand() -> None:
    assert lr_factor(0, 99, "constant", 0, 1) == pytest.approx(0.01)
    assert lr_factor(49, 99, "constant", 0, 1) == pytest.approx(0.5)
    assert lr_factor(500, 0, "linear", 0, 1000) == pytest.approx(0.5)
    assert lr_factor(1000, 0, "linear", 0, 1000) == 0
    assert lr_factor(550, 0, "cosine", 100, 1000) == pytest.approx(0.505)
    assert lr_factor(2000, 0, "cosine", 100, 1000) == pytest.approx(0.01)


def test_each_batch_has_noise_of_its_own_and_of_its_rank() -> None:
    drawn = set()
    model = SimpleNamespace(reported={}, device=torch.device("cpu"))
    for seed, rank, seen in ((0, 0, 0), (0, 0, 8), (0, 1, 0), (1, 0, 0)):
        clock = Clock(1000, None, seed)
        clock.images_seen, clock.base_rates = seen, []
        trainer = SimpleNamespace(global_rank=rank, optimizers=[])
        for _ in range(2):
            torch.rand(3)
            clock.on_train_batch_start(trainer, model, None, 0)
            drawn.add(float(torch.rand(())))
    assert len(drawn) == 4


def test_minutes_cut_the_run_and_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = overrides("vae")
    train.train(composed(*words, run_dir=tmp_path / "whole"))
    train.train(composed(*words, "budget.minutes=1e-9", run_dir=tmp_path / "cut"))
    assert "stopped early: budget.minutes=1e-09 is over; the same command with run_dir=" in capsys.readouterr().out
    assert load(newest(tmp_path / "cut/checkpoints"))["callbacks"]["Clock"]["images_seen"] == 8
    assert not (tmp_path / "cut/weights.safetensors").exists()
    train.train(composed(*words, run_dir=tmp_path / "cut"))
    states = [load(newest(tmp_path / name / "checkpoints"))["state_dict"] for name in ("whole", "cut")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def poisoned(owner: type, batch: int) -> Any:
    """The step of `owner`, whose first weight is nan from the given batch on."""
    step, left = owner.training_step, [batch]

    @functools.wraps(step)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            with torch.no_grad():
                next(self.parameters()).view(-1)[0] = torch.nan
        return step(self, *args, **kwargs)

    return wrapped


@pytest.mark.parametrize(("family", "owner", "term"), [("vae", VAE, "nll"), ("gan", GAN, "discriminator")])
def test_nan_stops_in_its_step_and_names_the_term(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, owner: type, term: str
) -> None:
    monkeypatch.setattr(owner, "training_step", poisoned(owner, 5))
    with pytest.raises(UserError) as error:
        train.train(composed(*overrides(family), run_dir=tmp_path))
    line = error.value.line()
    problem = f"{term} is not finite in step 5; the last good checkpoint stays; a lower lr may help"
    assert f": {problem}. Fix: trainer.precision=32-true" in line
    kept = load(newest(tmp_path / "checkpoints"))
    assert kept["callbacks"]["Clock"]["images_seen"] == 24
    assert all(torch.isfinite(t).all() for t in kept["state_dict"].values())
    assert [row["images_seen"] for row in read_rows(tmp_path / "metrics.csv") if "train/lr" in row] == [8, 16, 24, 32]


def test_nan_is_one_line_and_exit_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import read_write

    from atelier.cli import jobs

    monkeypatch.setattr(VAE, "training_step", poisoned(VAE, 2))
    cfg = composed(*overrides("vae"), run_dir=tmp_path)
    with read_write(HydraConfig.instance().cfg.hydra):
        HydraConfig.instance().cfg.hydra.mode = RunMode.RUN
    with pytest.raises(SystemExit) as ended:
        jobs.job(train.train, cfg)
    assert ended.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "is not finite in step 2" in lines[0] and len(lines[0]) <= 200


def test_a_logit_beyond_its_limit_stops_before_a_good_checkpoint_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A discriminator that runs away while all is finite."""
    monkeypatch.setattr(GAN, "divergence_limits", GAN.divergence_limits | {"fake_logit": 1e-3})
    with pytest.raises(UserError, match=r"fake_logit is \S+ in step 1; the last good checkpoint stays"):
        train.train(composed(*overrides("gan"), run_dir=tmp_path))
    assert not (tmp_path / "weights.safetensors").exists()


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the losses do not tell: looked at now and then on a GPU, or finite while the step ruins the weights."""
    monkeypatch.setattr(Clock, "_diverged", lambda *_: "")
    monkeypatch.setattr(VAE, "training_step", poisoned(VAE, 5))
    with pytest.raises(UserError, match="weights are not finite at 48 images; the last good checkpoint stays"):
        train.train(composed(*overrides("vae"), run_dir=tmp_path))
    kept = load(newest(tmp_path / "checkpoints"))
    assert kept["callbacks"]["Clock"]["images_seen"] == 24
    for net in kept["callbacks"]["EMA"]["nets"].values():
        assert all(torch.isfinite(t).all() for t in net["net"].values())


def test_signals_are_given_back_after_a_run(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    train.train(composed(*overrides("vae"), "budget.images=8", run_dir=tmp_path))
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before
