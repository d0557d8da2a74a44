"""Pictures of the same noise and conditions as training goes on, on disk and in the loggers, and a GIF of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image

from atelier.callbacks.clock import Clock
from atelier.callbacks.ema import EMA
from atelier.callbacks.table import Table
from atelier.core.batch import Batch
from atelier.core.ranges import Name, NonNegInt, PositiveInt
from atelier.core.rng import ImageRngs
from atelier.evaluation.evaluator import sample
from atelier.images.pictures import beside, grid, save_gif, save_png
from atelier.images.pixels import to_uint8
from atelier.models.base import Autoencoder, Cond, Generator, sampling_mode


class Pictures(NamedTuple):
    """Images (N, C, H, W) uint8, how many go in a row, and the words below them."""

    images: torch.Tensor
    columns: int | None = None
    words: list[str] = []


class Grids(Callback):
    """Draws the same samples now and then, and a film of them at the end.

    Args:
        every_images: images between pictures; one more at the end.
        n: samples in a picture.
        seed: seed of their noise.
        folder: folder of `<images_seen>.png`, `real.png` and `progress.gif`.
        raw: whether to draw what the raw weights make to the right of each picture of the averaged ones.
    """

    def __init__(
        self,
        every_images: PositiveInt,
        n: PositiveInt,
        seed: NonNegInt,
        folder: Name,
        raw: bool,
        clock: Clock,
        ema: EMA,
        table: Table,
    ) -> None:
        self.every_images, self.n, self.seed, self.folder = every_images, n, seed, Path(folder)
        self.raw, self.clock, self.ema, self.table = raw, clock, ema, table

    def on_train_start(self, trainer: Trainer, model: LightningModule) -> None:
        if trainer.is_global_zero and self.clock.images_seen == 0 and isinstance(model, Generator):
            self.folder.mkdir(parents=True, exist_ok=True)
            for case in model.cases:
                batch = trainer.datamodule.test_batch(0, self.n)
                real, own = to_uint8(batch[model.real_fields[case]]), model.needs - {"target"}
                words = trainer.datamodule.names.asked(batch, own) or []
                save_png(grid(real, words=words), self.folder / f"{_prefix(case)}real.png")

    def on_train_batch_end(
        self, trainer: Trainer, model: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        due = trainer.should_stop or self.clock.due(self.every_images, trainer.datamodule.batch_size)
        if due and trainer.is_global_zero and isinstance(model, Generator):
            self.draw(trainer, model)

    def draw(self, trainer: Trainer, model: LightningModule) -> None:
        """One picture for each case of the model, under the averaged weights and the run's precision."""
        model.eval()
        with sampling_mode(model, {}), trainer.precision_plugin.forward_context():
            raw = self._drawn(trainer, model) if self.raw else {}
            with self.ema.averaged(model):
                drawn = self._drawn(trainer, model)
        for name, (images, columns, words) in drawn.items():
            if self.raw:
                columns = 2 * (columns or math.ceil(math.sqrt(len(images) / 2)))
                images, words = beside([images, raw[name].images]), [word for word in words for _ in range(2)]
            self._show(trainer, Pictures(images, columns, words), name)
        model.train()

    def _drawn(self, trainer: Trainer, model: LightningModule) -> dict[str, Pictures]:
        """What the weights that the model holds make of the same noise and test images each time, by name."""
        batch, drawn = trainer.datamodule.test_batch(0, self.n), {}
        words = trainer.datamodule.names.asked(batch, model.needs) or []
        for case in model.cases:
            rngs, cond = ImageRngs(self.seed, 0, self.n), model.condition(batch, case)
            images = to_uint8(sample(model, cond, rngs, {}))
            name = f"{_prefix(case)}samples"
            drawn[name] = Pictures(images, None, words)
            if model.source_fields:
                shown, columns = translated(model, images, cond, batch, case)
                after = [""] * (len(shown) // len(images) - 2)
                drawn[name] = Pictures(shown, columns, [part for word in words for part in ("", word, *after)])
        if isinstance(model, Autoencoder):
            x = batch["image"].to(model.device)
            pairs = torch.stack([x, model.decode(model.encode(x))], dim=1).flatten(0, 1)
            drawn["reconstructions"] = Pictures(to_uint8(pairs))
        return drawn

    def _show(self, trainer: Trainer, pictures: Pictures, name: str) -> None:
        path = self.folder / f"{name}_{self.clock.images_seen:09d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)  # removed since, perhaps
        save_png(grid(pictures.images, pictures.columns, words=pictures.words), path)
        self.table.picture(trainer, f"sample/{name}", path)

    def on_train_end(self, trainer: Trainer, model: LightningModule) -> None:
        if trainer.is_global_zero and isinstance(model, Generator):
            for case in model.cases:
                pictures = sorted(self.folder.glob(f"{_prefix(case)}samples_*.png"))
                if len(pictures) > 1:
                    frames = [_read(path) for path in pictures]
                    alike = [frame for frame in frames if frame.shape == frames[-1].shape]  # older ones had no words
                    save_gif(torch.stack(alike), self.folder / f"{_prefix(case)}progress.gif", milliseconds=400)


def translated(model: Generator, images: torch.Tensor, cond: Cond, batch: Batch, case: str) -> tuple[torch.Tensor, int]:
    """Each source, its result (uint8) and what it should be, where the set knows that; and how many go in a row."""
    kinds = [to_uint8(cond[model.source_fields[case]]), images]
    answer = model.answer(batch, case)
    kinds += [] if answer is None else [to_uint8(answer)]
    return beside(kinds), len(kinds) * max(1, round((len(images) / len(kinds)) ** 0.5))


def _prefix(case: str) -> str:
    return f"{case}_" if case else ""


def _read(path: Path) -> torch.Tensor:
    import numpy as np

    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
