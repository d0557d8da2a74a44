"""One line that lives: images seen, of how many, how fast, how long yet; and a plain line now and then in a file.

Replaces lightning's bar, which counts epochs that this project does not have (it shows `Epoch 0/-2`);
tests/callbacks/test_progress.py fails with it.
"""

from __future__ import annotations

import sys
import time

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from atelier.callbacks.clock import Clock
from atelier.core import stopping
from atelier.core.batch import Batch
from atelier.core.lines import time_left

ROOM = 64  # columns that the words beside the bar take
PLAIN_SECONDS = 15.0  # between lines where there is no terminal


class Progress(Callback):
    """Rank 0 speaks, the others are silent."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self.console.on_broken_pipe = stopping.mute  # Rich's own ends the process, unsaved
        self.live = self.console.is_terminal
        self.bar: Bar | None = None
        self._spoke = self._trained = self._since = 0.0
        self._speaks = rank_zero_only.rank == 0

    def say(self, line: str) -> None:
        if self._speaks:
            self.console.print(line, markup=False)

    def on_train_start(self, trainer: Trainer, model: LightningModule) -> None:
        self._first, self._spoke = self.clock.images_seen, time.monotonic()
        self._trained, self._since = 0.0, time.monotonic()
        if self._speaks and self.live:
            width = min(40, max(4, self.console.width - ROOM))
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=width), _Words())
            self.bar = Bar(*columns, console=self.console, refresh_per_second=4)
            self.training = self.bar.add_task("training", total=self.clock.images, words="")
            self.evaluating = self.bar.add_task("", total=1, visible=False, words="")
            self.bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, model: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        if not self._speaks:
            return
        if self.bar is not None:
            self.bar.update(self.training, completed=self.clock.images_seen, words=self._words())
        elif time.monotonic() - self._spoke > PLAIN_SECONDS:
            self._spoke = time.monotonic()
            losses = "  ".join(f"{name} {float(value):.4g}" for name, value in model.reported.items())
            self.say(f"{self._words()}  {losses}")

    def _words(self) -> str:
        seen, total = self.clock.images_seen, self.clock.images
        seconds, done = self._trained + time.monotonic() - self._since, seen - self._first
        left = time_left(seconds, done, self._ends_at() - self._first)
        return "  ".join(filter(None, [f"{seen:,} of {total:,} images", f"{done / max(seconds, 1e-9):,.0f}/s", left]))

    def _ends_at(self) -> float:
        """Images seen when the run ends: its budget, or what `budget.minutes` leaves room for at this pace."""
        if self.clock.minutes is None:
            return self.clock.images
        begun, done = self.clock.resumed_at, self.clock.images_seen - self.clock.resumed_at
        minutes = (time.monotonic() - self.clock.started) / 60
        return min(self.clock.images, begun + done * self.clock.minutes / max(minutes, 1e-9))

    def on_validation_start(self, trainer: Trainer, model: LightningModule) -> None:
        self._trained += time.monotonic() - self._since  # the speed is that of training

    def on_validation_end(self, trainer: Trainer, model: LightningModule) -> None:
        self._since = time.monotonic()

    def step(self, what: str, done: int, n: int) -> None:
        """Part of an evaluation is done."""
        if self.bar is not None:
            fields = {"description": what, "words": f"{done:,} of {n:,}", "visible": True}
            self.bar.update(self.evaluating, completed=done, total=n, **fields)

    def evaluated(self, values: dict[str, float]) -> None:
        if self.bar is not None:
            self.bar.update(self.evaluating, visible=False)
        if self.clock.images_seen < self.clock.images:  # the last ones are shown in a table
            known = {name: v for name, v in values.items() if v == v and not name.startswith(("real/", "raw/"))}
            known = {name: v for name, v in known.items() if "logsnr" not in name}
            self.say(f"at {self.clock.images_seen:,} images: {'  '.join(f'{k} {v:.4g}' for k, v in known.items())}")

    def on_train_end(self, trainer: Trainer, model: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, model: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class _Words(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields["words"])
