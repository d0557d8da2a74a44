"""How many batches a trial takes, and what it makes of their times."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from atelier.callbacks import trial
from atelier.callbacks.trial import LEAST, MOST, Trial
from atelier.callbacks.work import FIRST, TIMED


def tried(each: list[float], seconds: float, monkeypatch: pytest.MonkeyPatch) -> Trial:
    """Batches that take so long, until the trial ends."""
    now = [0.0]
    monkeypatch.setattr(trial, "now", lambda device: now[0])
    monkeypatch.setattr(trial.stopping, "listen", lambda: None)
    trainer, model, made = (
        SimpleNamespace(should_stop=False),
        SimpleNamespace(device=torch.device("cpu")),
        Trial(seconds),
    )
    made.on_train_start(trainer, model)
    for one in each:
        if not trainer.should_stop:
            now[0] += one
            made.on_train_batch_end(trainer, model, None, None, 0)
    return made


def test_the_batches_that_are_looked_into_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four of a second, then 0.1 and 0.3 in turn, until what tells of a run's time would speak."""
    done = tried([1.0] * FIRST + [0.1, 0.3] * 20, 100.0, monkeypatch)
    assert len(done.taken) == MOST == FIRST + TIMED - 1
    assert done.seconds_per_batch == pytest.approx((8 * 0.1 + 7 * 0.3) / 15)


def test_slow_batches_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tried([9.0, 7.0, 7.0], 4.0, monkeypatch).taken == [9.0, 7.0] and LEAST == 2
    assert tried([9.0, 7.0, 7.0], 4.0, monkeypatch).seconds_per_batch == 7.0
    assert len(tried([1.0] * 9, 4.5, monkeypatch).taken) == 5
