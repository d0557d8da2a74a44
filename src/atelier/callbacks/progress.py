"""One line that lives: images seen, of how many, how long yet, how fast, a loss or two; in a file a line now and then.

Replaces lightning's bar, which counts epochs that this project does not have (it shows `Epoch 0/-2`);
tests/callbacks/test_progress.py fails with it.
"""

from __future__ import annotations

import io
import math
import sys
import time

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column, Table
from rich.text import Text

from atelier.callbacks.clock import Clock
from atelier.core import stopping
from atelier.core.batch import Batch
from atelier.core.lines import keep, time_left

ROOM = 72  # columns that the words beside the bar take
PLAIN_SECONDS = 15.0  # between lines where there is no terminal
LOOK_SECONDS = 2.0  # between looks at the losses, of which each waits for a GPU


class Progress(Callback):
    """Rank 0 speaks, the others are silent."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self.console.on_broken_pipe = stopping.mute  # Rich's own ends the process, unsaved
        self.live = self.console.is_terminal
        self.bar: Bar | None = None
        self._spoke = self._looked = self._trained = self._since = 0.0
        self._losses: list[str] = []
        self._speaks = rank_zero_only.rank == 0

    def say(self, line: str) -> None:
        if self._speaks:
            self.console.print(line, markup=False)
            keep(line)

    def show(self, table: Table) -> None:
        """A table; the log has it as wide as the terminal."""
        if self._speaks:
            self.console.print(table)
            plain = Console(file=io.StringIO(), width=self.console.width)
            plain.print(table)
            keep(plain.file.getvalue())

    def on_train_start(self, trainer: Trainer, model: LightningModule) -> None:
        self._first, self._spoke, self._looked = self.clock.images_seen, time.monotonic(), -math.inf
        self._trained, self._since = 0.0, time.monotonic()
        self._step, self._done = "", 0
        if self._speaks and self.live:
            width = min(40, max(8, self.console.width - ROOM))
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=width), _Words(self, width))
            self.bar = Bar(*columns, console=self.console, refresh_per_second=4)
            self.training = self.bar.add_task("training", total=self.clock.images, words=[])
            self.evaluating = self.bar.add_task("", total=1, visible=False, words=[])
            self.bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, model: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        if not self._speaks:
            return
        now = time.monotonic()
        if self.bar is not None:
            if now - self._looked > LOOK_SECONDS:
                self._looked, self._losses = now, losses(model)[:2]
            self.bar.update(self.training, completed=self.clock.images_seen, words=[*self._words(), *self._losses])
        elif now - self._spoke > PLAIN_SECONDS:
            self._spoke = now
            self.say("  ".join([*self._words(), *losses(model)]))

    def _words(self) -> list[str]:
        """Images, the time left where it is known, and speed."""
        seen, total = self.clock.images_seen, self.clock.images
        seconds, done = self._trained + time.monotonic() - self._since, seen - self._first
        left = time_left(seconds, done, self._ends_at() - self._first)
        return [f"{seen:,} of {total:,} images", *([left] if left else []), f"{done / max(seconds, 1e-9):,.0f}/s"]

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
            if what != self._step or done < self._done:
                self._step, self._begun, self._at_first = what, time.monotonic(), done
            self._done = done
            left = time_left(time.monotonic() - self._begun, done - self._at_first, n - self._at_first)
            words = [f"{done:,} of {n:,}", *([left] if left else [])]
            fields = {"description": what, "words": words, "visible": True}
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
    """What is said beside bars of `width` columns, as much of it as has room."""

    def __init__(self, progress: Progress, width: int) -> None:
        super().__init__(Column(no_wrap=True))
        self.progress, self.width = progress, width

    def render(self, task: Task) -> Text:
        named = max(len(task.description) for task in self.progress.bar.tasks if task.visible)
        return Text(fitting(task.fields["words"], self.progress.console.width - named - self.width - 2))


def losses(model: LightningModule) -> list[str]:
    """What the last batch reported, as `loss 0.0123`."""
    return [f"{name} {float(value):.4g}" for name, value in model.reported.items()]


def fitting(words: list[str], room: int) -> str:
    """Words, two blanks apart, without the last ones where they do not fit into so many columns."""
    while len(words) > 1 and len("  ".join(words)) > room:
        words = words[:-1]
    return "  ".join(words)
