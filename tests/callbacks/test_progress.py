"""What is said while a run goes on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar

from atelier.callbacks import progress
from atelier.callbacks.progress import Progress, duration


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (89, "89 s"), (91, "2 min"), (5340, "89 min"), (5400, "1 h 30 min"), (11_100, "3 h 05 min")],
)
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_plain_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """100 images in 20 s of 1000: 180 s left."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    clock = SimpleNamespace(images_seen=0, images=1000)
    model = SimpleNamespace(reported={"loss": torch.tensor(0.25)})
    told = Progress(clock)
    told.on_train_start(None, model)
    for _ in range(10):
        clock.images_seen, now[0] = clock.images_seen + 10, now[0] + 2
        told.on_train_batch_end(None, model, None, None, 0)
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "80 of 1,000 images  5/s  3 min left  loss 0.25"


def test_the_stock_bar_counts_epochs_that_are_not_there() -> None:
    """Why Progress is there."""
    bar = RichProgressBar()
    bar._trainer = Trainer(accelerator="cpu", max_epochs=-1, logger=False, enable_checkpointing=False)
    assert bar._get_train_description(0) == "Epoch 0/-2"
