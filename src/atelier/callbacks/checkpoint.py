"""When a run is saved, and which checkpoint is the best.

Replaces lightning's ModelCheckpoint, which counts the steps of all optimizers, loses time-based saves of hand-stepped
models and calls a file the best before it exists; tests/callbacks/test_checkpoint.py fails with it.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from atelier.callbacks.clock import Clock
from atelier.callbacks.ema import EMA
from atelier.checkpoints.store import Manifest
from atelier.core.batch import Batch
from atelier.core.errors import UserError
from atelier.core.ranges import Name, PositiveInt

LOWER_IS_BETTER = ("fid", "fd_", "kid", "bpd", "nll", "lpips", "duplicates", "logsnr", "loss", "gap", "memorisation")


def lower_is_better(metric: str) -> bool:
    return any(word in metric.rsplit("/", 1)[-1] for word in LOWER_IS_BETTER)


class Checkpoints(Callback):
    """Saves the run now and then, keeps the newest two checkpoints and the best, and guards their weights.

    Args:
        every_images: images between saves; one more at the end and on a signal.
        best: metric whose best checkpoint is kept beside the newest two; None = none.
        folder: folder of the checkpoints.
        clock: clock of the run.
        ema: averages, which are saved too.
    """

    def __init__(self, every_images: PositiveInt, best: Name | None, folder: Name, clock: Clock, ema: EMA) -> None:
        self.every_images, self.best, self.folder = every_images, best, Path(folder)
        self.clock, self.ema = clock, ema

    def on_fit_start(self, trainer: Trainer, model: LightningModule) -> None:
        """Half-written files of a killed run go, and what lies after the checkpoint that it goes on from."""
        if trainer.is_global_zero:
            for stray in self.folder.glob("*.tmp"):
                stray.unlink()
            Manifest(self.folder).cut(self.clock.images_seen)

    def on_train_batch_end(
        self, trainer: Trainer, model: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        if self.clock.called or trainer.should_stop or self.clock.due(self.every_images, trainer.datamodule.batch_size):
            self.save(trainer, model)
        if self.clock.called:
            self.clock.leave(trainer)

    def save(self, trainer: Trainer, model: LightningModule) -> None:
        self.clock.guard(trainer, model)
        self.ema.update_statistics(model)
        self.ema.broadcast_buffers(model)
        if not all(bool(torch.isfinite(t).all()) for t in model.state_dict().values()):
            problem = f"weights are not finite at {self.clock.images_seen} images; the last good checkpoint stays"
            problem += "; a lower lr may help"
            raise UserError("model", type(model).__name__, problem, "trainer.precision=32-true")
        begun = time.monotonic()
        trainer.save_checkpoint(self._path(), weights_only=False)
        self.clock.longest_save = max(self.clock.longest_save, time.monotonic() - begun)

    def _path(self) -> Path:
        return self.folder / f"images_{self.clock.images_seen:012d}.ckpt"

    def keep_best(self, trainer: Trainer, model: LightningModule, values: dict[str, float]) -> None:
        """After an evaluation on all ranks: save, and mark this checkpoint if it is the best so far."""
        if self.best is None:
            return
        value, manifest = values[self.best], Manifest(self.folder)
        before = (manifest.read()["best"] or {}).get("value", math.inf)
        sign = -1 if lower_is_better(self.best) else 1
        better = math.isfinite(value) and (not math.isfinite(before) or sign * value > sign * before)
        if not trainer.strategy.reduce_boolean_decision(better, all=False):
            return
        self.save(trainer, model)
        if trainer.is_global_zero:
            manifest.mark_best(self._path().name, self.best, value)
