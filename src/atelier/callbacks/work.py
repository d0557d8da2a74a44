"""What a run costs: floating-point operations of its training, counted on some of its batches.

The formulas are those of torch's FlopCounterMode, which itself follows modules by hooks that fail where a gradient is
asked of a leaf, as R1 does; tests/callbacks/test_work.py shows it.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from atelier.callbacks.clock import Clock
from atelier.callbacks.memory import Memory
from atelier.callbacks.progress import Progress
from atelier.core.batch import Batch
from atelier.core.lines import duration
from atelier.core.peaks import peak

FIRST, EVERY = 4, 61  # batches counted: the first ones, then each 61st, a prime, so that every n-th penalty is met
TIMED = 16  # batches behind the first ones, which many lazy penalties divide
FITS = 180.0  # seconds: of a run that takes longer a line says how many images fit


class Work(Callback):
    """Counts convolutions, matrix products and attention, forward and backward, of whatever a training step runs.

    Each counted batch stands for those since the one before, so that what comes seldom or late weighs as it comes. The
    numbers that a batch computes are the same. A compiled net cannot be looked into: none of its operations are
    counted.
    """

    def __init__(self, clock: Clock, progress: Progress, memory: Memory) -> None:
        self.clock, self.progress, self.memory = clock, progress, memory
        self.flop, self.counted = 0, 0  # operations of all ranks, and the images that they were for
        self._counter: _Operations | None = None
        self.peak: float | None = None  # TFLOP/s of all devices; None where it is not known

    def state_dict(self) -> dict[str, int]:
        return {"flop": self.flop, "counted": self.counted}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.flop, self.counted = state["flop"], state["counted"]

    @property
    def gflop_per_image(self) -> float | None:
        """Mean of training so far; None where nothing was counted."""
        return self.flop / self.counted / 1e9 if self.flop else None

    def tflop(self, images: int) -> float | None:
        """Of training on so many images."""
        return None if self.gflop_per_image is None else self.gflop_per_image * images / 1e3

    def utilisation(self, images_per_second: float) -> float | None:
        """Share of the devices' peak that training at this speed uses: model FLOP utilisation, MFU.

        (Chowdhery et al. 2022, PaLM, appendix B, but of operations that are counted and not estimated.)
        """
        if self.peak is None or self.gflop_per_image is None:
            return None
        return self.gflop_per_image * images_per_second / (1e3 * self.peak)

    def words(self, images: int) -> str:
        """`22 TFLOP, 0.46 GFLOP an image` for so many images; "" where nothing was counted."""
        if not self.flop:
            return ""
        return f"{two_digits(self.tflop(images))} TFLOP, {two_digits(self.gflop_per_image)} GFLOP an image"

    def on_train_start(self, trainer: Trainer, model: LightningModule) -> None:
        self._looks = not any(getattr(module, "_compiled_call_impl", None) for module in model.modules())
        self._batches, self._since = 0, 0.0
        one = peak(torch.cuda.get_device_name(model.device), trainer.precision) if _on_gpu(model) else None
        self.peak = one and one * trainer.world_size

    def on_train_batch_start(self, trainer: Trainer, model: LightningModule, batch: Batch, batch_idx: int) -> None:
        number = self.clock.images_seen // trainer.datamodule.batch_size
        if self._looks and (number < FIRST or number % EVERY == 0):
            self._counter = _Operations()
            self._counter.__enter__()

    def on_train_batch_end(
        self, trainer: Trainer, model: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """The clock has ticked: images_seen are those up to this batch."""
        if self._counter is not None:
            an_image = self._closed() * trainer.world_size / trainer.datamodule.batch_size
            self.flop += round(an_image * (self.clock.images_seen - self.counted))
            self.counted = self.clock.images_seen
        self._batches += 1
        if self._batches == FIRST:
            self._since = now(model.device)
        elif self._batches == FIRST + TIMED and self._since:
            self._tell((now(model.device) - self._since) / TIMED / trainer.datamodule.batch_size)

    def _closed(self) -> int:
        """Operations of the batch that was looked at."""
        counter, self._counter = self._counter, None
        counter.__exit__(None, None, None)
        return counter.n

    def _tell(self, seconds: float) -> None:
        """How long the run will take, at `seconds` an image."""
        images = self.clock.images - self.clock.images_seen
        if self.clock.minutes is not None:
            images = min(images, int(60 * self.clock.minutes / seconds))
        if images <= 0:  # that was the last batch
            return
        time, work = duration(max(1.0, images * seconds)), self.words(images)
        line = f"about {time} on this device without judging" + (f" ({work})" if work else "")
        line += f", {self.memory.words()}" if self.memory.words() else ""
        fit = fitting(FITS, seconds)
        if self.clock.minutes is None and self.clock.resumed_at == 0 and fit < self.clock.images:
            line += f"; budget.images={fit:_} fits 3 min"
        self.progress.say(line)

    def on_validation_start(self, trainer: Trainer, model: LightningModule) -> None:
        self._since = 0.0  # a run judged so early is a trial, of which nothing is foretold

    def on_exception(self, trainer: Trainer, model: LightningModule, exception: BaseException) -> None:
        if self._counter is not None:
            self._closed()


class _Operations(TorchDispatchMode):
    """Counts inside `with`, forward and backward, in `n`."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.n += formula(*args, **(kwargs or {}), out_val=out)
        return out


def _on_gpu(model: torch.nn.Module) -> bool:
    return next(model.parameters()).device.type == "cuda"


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


def two_digits(number: float) -> str:
    """`1,200`, `0.46`."""
    return f"{float(f'{number:.2g}'):,g}"


def fitting(time: float, seconds: float) -> int:
    """Images that fit into so much time at `seconds` an image, down to three digits."""
    number = int(time / seconds)
    step = 10 ** max(0, len(str(number)) - 3)
    return number // step * step
