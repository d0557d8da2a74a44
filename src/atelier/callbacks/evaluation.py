"""When samples are judged during training, and where the figures go.

The work hangs on Lightning's validation loop; one that was due in the batch of a save is dropped by Lightning on
resume and run here, tests/runs/test_resume.py fails without that.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from atelier.callbacks.checkpoint import Checkpoints
from atelier.callbacks.clock import Clock, Interrupted
from atelier.callbacks.diagnostics import Diagnostics
from atelier.callbacks.ema import EMA
from atelier.callbacks.progress import Progress
from atelier.callbacks.table import Table
from atelier.callbacks.work import Work
from atelier.checkpoints.store import warn, write_text
from atelier.core import provenance, ranks
from atelier.core.ranges import Name, PositiveInt
from atelier.evaluation import naming
from atelier.evaluation.evaluator import Evaluator


class Evaluation(Callback):
    """Judges samples now and then and at the end; figures go to loggers and into summary.json.

    Args:
        every_images: images between evaluations; one more at the end of the budget.
        evaluator: numbers of images and the metrics.
        folder: run folder; summary.json is written there.
        raw: whether to judge the raw weights beside the averaged ones, as `raw/<metric>`.
    """

    def __init__(
        self,
        every_images: PositiveInt,
        evaluator: Evaluator,
        folder: Name,
        raw: bool,
        clock: Clock,
        ema: EMA,
        table: Table,
        checkpoints: Checkpoints,
        progress: Progress,
        work: Work,
        diagnostics: Diagnostics,
    ) -> None:
        self.every_images, self.evaluator, self.folder, self.raw = every_images, evaluator, Path(folder), raw
        self.clock, self.ema, self.table, self.checkpoints, self.progress = clock, ema, table, checkpoints, progress
        self.asked = {"checkpoint.best": checkpoints.best}  # option -> metric that it names, if any
        self.work, self.diagnostics = work, diagnostics
        self.chosen = evaluator.n_diagnosed is None  # by what the run has time for
        self.values: dict[str, float] = {}
        self.protocol: dict[str, Any] = {}
        self.intervals: dict[str, tuple[float, float]] = {}
        self.commit: str | None = None

    def on_fit_start(self, trainer: Trainer, model: LightningModule) -> None:
        """The feature net is made ready before the first batch, on rank 0 first: it may be trained and kept.

        Raises:
            UserError: a metric is asked for that no evaluation will give.
        """
        self.commit = provenance.commit()  # before anyone edits the code
        with ranks.patiently() as barrier:
            for turn in range(2):
                if (turn == 0) == trainer.is_global_zero:
                    result = self.evaluator.prepare(model, trainer.datamodule, model.device)
                    for notice in (result, self.evaluator.left_out(model, trainer.datamodule)):
                        if notice and trainer.is_global_zero:
                            self.progress.say(notice)
                barrier()
        if any(self.asked.values()):
            known = naming.names(self.evaluator, model, trainer.datamodule)
            known += list(naming.of_raw(dict.fromkeys(known, 0.0))) if self.raw else []
            for key, metric in self.asked.items():
                naming.check(key, metric, known)

    def on_train_start(self, trainer: Trainer, model: LightningModule) -> None:
        if self._due(trainer) and not self.table.has_evaluation(self.clock.images_seen):
            loop = trainer.fit_loop.epoch_loop.val_loop
            loop.restarting = False
            trainer.validating = True
            loop.run()
            trainer.training = True

    def _due(self, trainer: Trainer) -> bool:
        seen, every = self.clock.images_seen, trainer.val_check_interval * trainer.datamodule.batch_size
        return seen > 0 and (seen % every == 0 or seen >= self.clock.images)

    def on_validation_epoch_end(self, trainer: Trainer, model: LightningModule) -> None:
        if self.chosen:
            self.evaluator.n_diagnosed = self.diagnostics.count(trainer, model)
        raw: dict[str, float] = {}
        try:
            if self.raw:
                raw = self._judge(trainer, model)
            with self.ema.averaged(model):
                self.values = self._judge(trainer, model)
        except Interrupted:
            self.checkpoints.save(trainer, model)
            self.clock.leave(trainer)
        self.intervals = self.evaluator.intervals(self.values, self.protocol)
        self.values |= naming.of_raw(raw)
        self.protocol |= {"ema": self.ema.half_lives[:1], "precision": trainer.precision}
        if self.values:
            self.progress.evaluated(self.values)

    def _judge(self, trainer: Trainer, model: LightningModule) -> dict[str, float]:
        """Figures of the weights that the model holds."""
        context = trainer.precision_plugin.forward_context
        watch = lambda what, done, n: self._watch(trainer, what, done, n)  # noqa: E731
        values, self.protocol = self.evaluator(model, trainer.datamodule, {}, context, watch)
        return values

    def on_validation_end(self, trainer: Trainer, model: LightningModule) -> None:
        """The row comes last: an evaluation that has none is done again after a kill."""
        if trainer.is_global_zero:
            self._write_summary(provenance.device(model.device, trainer.world_size))
        self.checkpoints.keep_best(trainer, model, self.values)
        if self.values:
            row = {f"val/{name}": value for name, value in self.values.items()}
            self.table.add(trainer, row | {f"val/{k}_ci95": half for k, half in self.evaluator.half_widths.items()})

    def _watch(self, trainer: Trainer, what: str, done: int, n: int) -> None:
        self.progress.step(what, done, n)
        if self.clock.interrupted():
            raise Interrupted

    def _write_summary(self, device: str) -> None:
        seconds = time.monotonic() - self.clock.started
        images = self.clock.images_seen - self.clock.resumed_at
        result = {
            "metrics": numbers(self.values),
            "protocol": self.protocol,
            "intervals": self.intervals,
            "reasons": self.evaluator.reasons,
            "images_seen": self.clock.images_seen,
            "resumed_at": self.clock.resumed_at,
            "images_per_second": round(images / max(seconds, 1e-9), 1),
            "seconds": round(seconds, 1),
            "gflop_per_image": self.work.gflop_per_image,
            "tflop": self.work.tflop(self.clock.images_seen),
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "commit": self.commit,
            "device": device,
            "versions": provenance.versions(),
        }
        try:
            write_text(self.folder / "summary.json", json.dumps(result, indent=1))
        except OSError as error:
            warn(f"no {self.folder / 'summary.json'} written ({error.strerror}); the next evaluation tries again")


def numbers(values: dict[str, float]) -> dict[str, float | None]:
    """As JSON has them: nan and inf, which it lacks, become null."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
