"""How many images the diagnostics of a diffusion model look at: as many as a run of its length has time for."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer

from atelier.callbacks.clock import Clock
from atelier.callbacks.table import Table
from atelier.models.base import Model
from atelier.models.diffusion_model import DiffusionModel

SHARE, SECONDS = 0.008, 3.2  # of a run's time, or of any run's, for all of its evaluations; 1 % and 4 s are the promise
LEAST, MOST = 4, 1024  # images of a split
FORWARD = 1 / 3  # of what a training step does with an image


def affordable(images: int, seconds: float, evaluations: int, forwards: int) -> int:
    """How many images of each split are looked at in every evaluation, a power of two.

    Args:
        images: images that the whole run is shown.
        seconds: time that training takes for one of them.
        evaluations: number of times that the run is judged.
        forwards: passes through the net for each image of a split.
    """
    time = max(SECONDS, SHARE * images * seconds)
    n = int(time / (evaluations * forwards * FORWARD * seconds))
    return min(MOST, max(LEAST, 1 << max(0, n.bit_length() - 1)))


class Diagnostics(Callback):
    """Chooses once, before the first evaluation, and keeps to it, also in a run that goes on."""

    def __init__(self, clock: Clock, table: Table) -> None:
        self.clock, self.table = clock, table
        self.n: int | None = None

    def state_dict(self) -> dict[str, int | None]:
        return {"n": self.n}

    def load_state_dict(self, state: dict[str, int | None]) -> None:
        self.n = state["n"]

    def count(self, trainer: Trainer, model: Model) -> int:
        """Images of each split, the same on all ranks; 0 of a model that is not measured so."""
        if not isinstance(model, DiffusionModel):
            return 0
        if self.n is None:
            self.n = trainer.strategy.broadcast(self._affordable(trainer, model))
        return self.n

    def _affordable(self, trainer: Trainer, model: Model) -> int:
        """By the median speed of the table's rows so far; the least where there is none."""
        speed = self.table.median("perf/images_per_second")
        if speed is None:
            return LEAST
        every = trainer.val_check_interval * trainer.datamodule.batch_size
        forwards = len(model.noise_bins()) * (3 if model.embedder.conditions else 2)
        return affordable(self.clock.images, 1 / max(speed, 1e-9), max(1, -(-self.clock.images // every)), forwards)
