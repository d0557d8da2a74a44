"""images_seen: the only clock. It places the stream, sets learning rates, seeds each batch and stops the run.

Replaces global_step, LR schedulers and Lightning's signal handling, which lose the data order, the random state and
the exit code of a stopped run; tests/runs/test_resume.py fails where the clock's state or seeding is left out.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from types import FrameType
from typing import Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from atelier.core import job, lines, ranks, stopping
from atelier.core.batch import Batch
from atelier.core.errors import UserError
from atelier.core.ranges import NonNegInt, PositiveFloat, PositiveInt
from atelier.core.rng import hashed, reseed

MARGIN = 60.0  # seconds before the end of a SLURM job in which a run saves and leaves, and
SAVES = 3.0  # so many times what the longest save took
GPU_CHECK = 50  # batches between looks at the losses where a look waits for the device


class Interrupted(Exception):
    """A signal asked all ranks to stop."""


class Clock(Callback):
    """Counts images; sets learning rates, seeds each batch and ends the run.

    Args:
        images: images shown until the run ends.
        minutes: time after which it is cut short (schedules still follow `images`); None = no limit.
        seed: seed of the noise of training.
        until: job_end = saves and leaves as after a signal before the SLURM job ends, to be requeued; None = no end.
    """

    def __init__(
        self,
        images: PositiveInt,
        minutes: PositiveFloat | None,
        seed: NonNegInt,
        until: Literal["job_end"] | None = None,
    ) -> None:
        self.images, self.minutes, self.seed, self.until = images, minutes, seed, until
        self.images_seen = 0
        self.signal: int | None = None
        self.called = False  # whether any rank had got a signal when the last batch ended
        self.reason = ""  # why the run stopped before its budget
        self.resumed_at = 0
        self.started = time.monotonic()
        self.job_end = math.inf  # of time.monotonic, known to rank 0
        self.longest_save = 0.0

    def setup(self, trainer: Trainer, model: LightningModule, stage: str) -> None:
        if trainer.world_size > 1:
            stopping.listen()  # again, now that the ranks have met

    def state_dict(self) -> dict[str, int]:
        return {"images_seen": self.images_seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.images_seen = self.resumed_at = state["images_seen"]

    def on_fit_start(self, trainer: Trainer, model: LightningModule) -> None:
        """Before the optimizers' states are restored: their rates are still the page's."""
        self.base_rates = [[group["lr"] for group in o.param_groups] for o in trainer.optimizers]
        trainer.datamodule.position = lambda: self.images_seen

    def on_train_start(self, trainer: Trainer, model: LightningModule) -> None:
        self.started = time.monotonic()
        stopping.listen(self._flag)  # Lightning gives them back when the run ends
        if self.until == "job_end" and trainer.is_global_zero:
            self.job_end = time.monotonic() + job.seconds_left()
        if self.images_seen >= self.images:
            trainer.should_stop = True

    def _flag(self, number: int, frame: FrameType | None) -> None:
        if not stopping.echo():
            if self.signal == number == signal.SIGINT:
                stopping.leave(number)  # a second Ctrl-C does not wait for the save
            stopping.promise(number)
            self.signal = number

    def on_train_batch_start(self, trainer: Trainer, model: LightningModule, batch: Batch, batch_idx: int) -> None:
        model.reported.clear()
        model.images_seen = self.images_seen
        reseed(hashed(self.seed, trainer.global_rank, self.images_seen), model.device)
        for optimizer, rates in zip(trainer.optimizers, self.base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * optimizer.lr_factor(self.images_seen)

    def on_train_batch_end(
        self, trainer: Trainer, model: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        self.images_seen += trainer.datamodule.batch_size
        if self.images_seen >= self.images:
            trainer.should_stop = True
        if model.device.type == "cpu" or batch_idx % GPU_CHECK == 0:
            self.guard(trainer, model)
        late = self.minutes is not None and time.monotonic() - self.started > 60 * self.minutes
        late, self.called = ranks.any_of(late, self._asked_to_leave())  # once a batch
        if late:
            self.reason = f"budget.minutes={self.minutes:g} is over"
            trainer.should_stop = True

    def guard(self, trainer: Trainer, model: LightningModule) -> None:
        """All ranks look at what was reported of the last batch.

        Raises:
            UserError: training has diverged.
        """
        broken = self._diverged(model)
        if trainer.strategy.reduce_boolean_decision(bool(broken), all=False):
            step = self.images_seen // trainer.datamodule.batch_size
            problem = f"{broken or 'a loss is not finite'} in step {step}; the last good checkpoint stays"
            problem += "; a lower lr may help"
            raise UserError("model", type(model).__name__, problem, "trainer.precision=32-true")

    def _diverged(self, model: LightningModule) -> str:
        """What is wrong with what the model reported, or ""; not its gradients, of which float16 may skip some."""
        for name, value in model.reported.items():
            if name.endswith("_gradient"):
                continue
            if not torch.isfinite(value):
                return f"{name} is not finite"
            if abs(value) > model.divergence_limits.get(name, math.inf):
                return f"{name} is {value:.3g}"
        return ""

    def interrupted(self) -> bool:
        """Whether any rank got a signal, or the job is about to end; every rank must ask at the same place."""
        return ranks.any_of(self._asked_to_leave())[0]

    def _asked_to_leave(self) -> bool:
        """Whether this rank got a signal; the end of the job is one."""
        if self.signal is None and self._job_ends():
            self.signal = signal.SIGUSR1
            self.reason = "the SLURM job ends"
        return self.signal is not None

    def _job_ends(self) -> bool:
        """Whether the time for saving has come; then it is looked up again, since a job may be given more."""
        reserve = MARGIN + SAVES * self.longest_save
        if time.monotonic() < self.job_end - reserve:
            return False
        with contextlib.suppress(UserError):
            self.job_end = time.monotonic() + job.seconds_left()
        return time.monotonic() >= self.job_end - reserve

    def leave(self, trainer: Trainer) -> None:
        """End the process as its signal asks: 143 after SIGTERM, 130 after Ctrl-C, 0 on the ranks that follow."""
        if trainer.is_global_zero:
            why = f"{self.reason}: stopped" if self.reason else "stopped by a signal"
            lines.say(f"{why} at {self.images_seen} images, saved")
        stopping.leave(self.signal or signal.SIGTERM)

    def due(self, every: int, batch_size: int) -> bool:
        """Whether a multiple of `every` images was passed in the last batch."""
        return self.images_seen // every > (self.images_seen - batch_size) // every
