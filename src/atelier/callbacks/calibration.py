"""What a model measures of its images before it is trained, as the scale of latents."""

from __future__ import annotations

from collections.abc import Iterator

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from atelier.callbacks.clock import Clock
from atelier.core.errors import within
from atelier.core.lines import say


class Calibration(Callback):
    """Hands the first training images to a model that has yet to see any; one that goes on measures nothing again.

    They are the first of the order that every choice of images follows (`data.order`), without augmentation, so what is
    measured depends neither on the seed of the run nor on the number of ranks.

    Args:
        clock: clock of the run, which counts images.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_start(self, trainer: Trainer, model: LightningModule) -> None:
        """All that a checkpoint holds has been restored by now."""
        if self.clock.images_seen or model.calibrated:
            return
        with within("model"):
            line = model.calibrate(lambda n: _share(trainer, model, n))
        if line and trainer.is_global_zero:
            say(line)


def _share(trainer: Trainer, model: LightningModule, n: int) -> Iterator[Tensor]:
    """This rank's of the first n training images, or of all where there are fewer, in batches as it trains on."""
    data = trainer.datamodule
    mine = range(min(n, data.n_train))[trainer.global_rank :: trainer.world_size]
    size = data.batch_size // trainer.world_size
    for start in range(0, len(mine), size):
        yield data.chosen("train", mine[start : start + size])["image"].to(model.device)
