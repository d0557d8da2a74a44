"""metrics.csv and the loggers' rows, one for each logged batch and each evaluation.

Replaces lightning's CSVLogger, which deletes the table of a resumed run, and self.log, whose values stick from batch
to batch; tests/callbacks/test_table.py and tests/runs/test_resume.py fail with them.
"""

from __future__ import annotations

import csv
import io
import statistics
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from PIL import Image

from atelier.callbacks.clock import Clock
from atelier.callbacks.work import Work
from atelier.checkpoints.store import warn, write_text
from atelier.core.batch import Batch
from atelier.core.ranges import Name, PositiveInt

Row = dict[str, float]


class Table(Callback):
    """Writes metrics.csv: the training curves and the figures of evaluations.

    Args:
        every_images: images between rows of the training curves.
        path: place of metrics.csv.
        clock: clock of the run, which counts images.
        work: counter of operations, which knows what share of the device's peak a speed is.
    """

    def __init__(self, every_images: PositiveInt, path: Name, clock: Clock, work: Work) -> None:
        self.every_images, self.path, self.clock, self.work = every_images, Path(path), clock, work
        self.rows: list[Row] = []
        self._mark = (0, 0.0)  # images_seen and time of the last row: the throughput between rows
        self._behind = False  # whether rows are missing on a disk that was full

    def on_fit_start(self, trainer: Trainer, model: LightningModule) -> None:
        """Rows written after the checkpoint that the run goes on from would come twice: they go."""
        self.rows = [row for row in read_rows(self.path) if row["images_seen"] <= self.clock.images_seen]
        if trainer.is_global_zero and self.path.exists():
            self._rewrite()
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and trainer.is_global_zero:
                logger.experiment.define_metric("images_seen")
                logger.experiment.define_metric("*", step_metric="images_seen")

    def on_train_start(self, trainer: Trainer, model: LightningModule) -> None:
        self._mark = (self.clock.images_seen, time.monotonic())

    def on_train_batch_end(
        self, trainer: Trainer, model: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        if self.clock.due(self.every_images, trainer.datamodule.batch_size) or trainer.should_stop:
            row = {f"train/{name}": float(value) for name, value in model.reported.items()}
            self.add(trainer, row | {"train/lr": trainer.optimizers[0].param_groups[0]["lr"]} | self._perf())

    def _perf(self) -> Row:
        (images, at), now = self._mark, time.monotonic()
        self._mark = (self.clock.images_seen, now)
        speed = (self.clock.images_seen - images) / max(now - at, 1e-9)
        row = {"perf/images_per_second": speed}
        if (share := self.work.utilisation(speed)) is not None:
            row["perf/mfu"] = share
        if torch.cuda.is_available():
            row["perf/gpu_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
        return row

    def median(self, name: str) -> float | None:
        """Of a column, over all rows that have it; None where none has."""
        values = [row[name] for row in self.rows if name in row]
        return statistics.median(values) if values else None

    def has_evaluation(self, images_seen: int) -> bool:
        return any(r["images_seen"] == images_seen and any(k.startswith("val/") for k in r) for r in self.rows)

    def add(self, trainer: Trainer, row: Row) -> None:
        """Append to metrics.csv and send to the loggers, both at images_seen."""
        row = {"images_seen": self.clock.images_seen} | row
        new_columns = set(row) - {column for known in self.rows for column in known}
        self.rows.append(row)
        if not trainer.is_global_zero:
            return
        try:
            self._rewrite() if new_columns or self._behind else self._append(row)
            self._behind = False
        except OSError as error:
            if not self._behind:
                warn(f"no row written to {self.path} ({error.strerror}); it follows with a later one")
            self._behind = True
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.log(row, step=self.clock.images_seen)
            else:
                logger.log_metrics(row, step=self.clock.images_seen)

    def picture(self, trainer: Trainer, name: str, path: Path) -> None:
        """Show a picture on disk in the loggers that show pictures."""
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                import wandb

                row = {"images_seen": self.clock.images_seen, name: wandb.Image(Image.open(path))}
                logger.experiment.log(row, step=self.clock.images_seen)

    def _columns(self) -> list[str]:
        return list(dict.fromkeys(column for row in self.rows for column in row))

    def _append(self, row: Row) -> None:
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns()).writerow(row)

    def _rewrite(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns())
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.path, text.getvalue())


def read_rows(path: Path) -> list[Row]:
    """Rows of a metrics.csv without its empty cells, [] where there is none; a half-written last row is left out."""
    if not path.exists():
        return []
    rows = []
    whole = path.read_bytes().decode(errors="replace").rpartition("\n")[0]  # a row cut short may still look like one
    for raw in csv.DictReader(io.StringIO(whole)):
        try:
            row = {k: float(v) for k, v in raw.items() if v not in ("", None)}
            rows.append(row | {"images_seen": int(row["images_seen"])})
        except (ValueError, TypeError, KeyError):
            continue
    return rows
