"""What is said while a run goes on."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console

from atelier.callbacks import progress
from atelier.callbacks.progress import Progress


def clocked(images: int, minutes: float | None = None) -> SimpleNamespace:
    return SimpleNamespace(images_seen=0, images=images, minutes=minutes, resumed_at=0, started=0.0)


def test_a_plain_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """100 images in 20 s of 1000: 180 s left."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    clock = clocked(1000)
    model = SimpleNamespace(reported={"loss": torch.tensor(0.25)})
    told = Progress(clock)
    told.on_train_start(None, model)
    for _ in range(10):
        clock.images_seen, now[0] = clock.images_seen + 10, now[0] + 2
        told.on_train_batch_end(None, model, None, None, 0)
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "80 of 1,000 images  3 min left  5/s  loss 0.25"


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (60, "24,000 of 96,000 images  60 s left"),
        (80, "24,000 of 96,000 images  60 s left  1,200/s  loss 0.1235"),
        (120, "24,000 of 96,000 images  60 s left  1,200/s  loss 0.1235  kl 12.5"),
    ],
)
def test_the_bar_is_never_wider_than_the_terminal(columns: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what has no room, the losses go first; an evaluation beside it takes room too."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    clock = clocked(96_000)
    reported = {"loss": torch.tensor(0.12345), "kl": torch.tensor(12.5), "third": torch.tensor(1.0)}
    told, drawn = Progress(clock), io.StringIO()
    told.console, told.live = Console(file=drawn, force_terminal=True, width=columns), True
    told.on_train_start(None, None)
    clock.images_seen, now[0] = 24_000, 20.0
    told.on_train_batch_end(None, SimpleNamespace(reported=reported), None, None, 0)
    told.bar.refresh()
    alone = shown(drawn)
    assert alone[-1].endswith(words)
    told.step("denoised train images", 1_000, 10_000)
    told.bar.refresh()
    both = shown(drawn)
    assert both[-1].endswith("1,000 of 10,000") and both[-2].strip().startswith("training")
    assert max(map(len, alone + both)) <= columns
    told.on_train_end(None, None)


def shown(drawn: io.StringIO) -> list[str]:
    """The lines of the last frame that a terminal was sent, without colours and trailing blanks."""
    frames = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", drawn.getvalue()).split("\r")
    return [line.rstrip() for line in frames[-1].splitlines()]


@pytest.mark.parametrize(
    ("minutes", "seen", "words"),
    [
        (None, 100, "100 of 1,000 images  3 min left  5/s"),
        (1, 100, "100 of 1,000 images  40 s left  5/s"),  # and not the 180 s of all images
        (1, 300, "300 of 1,000 images  5/s"),  # the minute is over
        (60, 1000, "1,000 of 1,000 images  5/s"),  # the last judgement takes minutes, of which nothing is known
        (None, 1008, "1,008 of 1,000 images  5/s"),
    ],
)
def test_time_left_by_images_or_by_minutes(
    minutes: float | None, seen: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 images a second."""
    clock = clocked(1000, minutes)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock.images_seen / 5)
    told = Progress(clock)
    told.on_train_start(None, None)
    clock.images_seen = seen
    assert "  ".join(told._words()) == words


def test_the_stock_bar_counts_epochs_that_are_not_there() -> None:
    """Why Progress is there."""
    bar = RichProgressBar()
    bar._trainer = Trainer(accelerator="cpu", max_epochs=-1, logger=False, enable_checkpointing=False)
    assert bar._get_train_description(0) == "Epoch 0/-2"
