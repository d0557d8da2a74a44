"""A few batches of a run, to see how long one takes; nothing is kept of them."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from atelier.callbacks.work import FIRST, TIMED, now
from atelier.core import stopping
from atelier.core.batch import Batch

LEAST, MOST = 2, FIRST + TIMED - 1  # batches; the second is the first that has all that a batch needs of memory


class Trial(Callback):
    """Ends a run after some batches, and says how long one takes.

    Args:
        seconds: time after which no further batch begins, once there were `LEAST`.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.taken: list[float] = []  # seconds of each batch

    def on_train_start(self, trainer: Trainer, model: LightningModule) -> None:
        stopping.listen()  # there is nothing to save
        self._begun = self._last = now(model.device)

    def on_train_batch_end(
        self, trainer: Trainer, model: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        time = now(model.device)
        self.taken.append(time - self._last)
        self._last = time
        if len(self.taken) >= MOST or (len(self.taken) >= LEAST and time - self._begun > self.seconds):
            trainer.should_stop = True

    @property
    def seconds_per_batch(self) -> float:
        """Mean of the batches behind those that are looked into; where there are none, the last of these."""
        timed = self.taken[FIRST:] or self.taken[-1:]
        return sum(timed) / len(timed)
