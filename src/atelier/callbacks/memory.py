"""How much memory a run needs, seen on its first two batches, and what brings it down where that is more than there is.

The second batch is as all that follow: gradients and the optimizer's moments are there when it begins.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from atelier.callbacks.ema import EMA
from atelier.callbacks.progress import Progress
from atelier.core import room
from atelier.core.batch import Batch
from atelier.core.room import size

WATCHED = 2  # batches
REORDERED = {torch.ops.aten.convolution, torch.ops.aten.convolution_backward}  # a CPU copies what they take and give
KEPT = 1.15  # of a CPU: with freed blocks that stay (runs/trainer.py)
FIRST_USE = 33_000_000  # of a CPU: bytes of code that begins to work
MOMENTS = 2  # of AdamW and Adam, the optimizers that there are


class Memory(Callback):
    """Follows every tensor that the first two batches make, forward and backward, until it is gone.

    Added to what the process has before them it is what the run needs, but for judging, the loader's processes and what
    kernels need inside. No number that a batch computes changes. A compiled net cannot be looked into: of it nothing is
    told. On a CPU it came to 3 to 10 % less than the process's own peak rose in training (docs/memory.md).

    Args:
        ema: averages of the run.
        progress: progress of the run, which says it.
    """

    def __init__(self, ema: EMA, progress: Progress) -> None:
        self.ema, self.progress = ema, progress
        self.needed: int | None = None  # bytes; None where it is not known yet
        self._live: _Live | None = None

    def on_train_start(self, trainer: Trainer, model: LightningModule) -> None:
        self._batches, self._told = 0, False
        self._before, self._there = room.held(model.device), room.there(model.device)
        if self._there is not None and model.device.type == "cpu":
            self._there //= max(1, trainer.num_devices)
        if any(getattr(module, "_compiled_call_impl", None) for module in model.modules()):
            self._batches = WATCHED
            return
        trained = size(model.trained().values())
        self._live = _Live(model.device.type, lambda made: self._look(trainer, model, made))
        self._parts = {"gradients": trained, "moments": MOMENTS * trained}
        self._look(trainer, model, 0)

    def on_train_batch_start(self, trainer: Trainer, model: LightningModule, batch: Batch, batch_idx: int) -> None:
        if self._batches < WATCHED:
            self._live.__enter__()

    def on_train_batch_end(
        self, trainer: Trainer, model: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        if self._batches < WATCHED:
            self._live.__exit__(None, None, None)
            self._batches += 1
            self._parts = {}  # they are among what lives now
            if self._batches == WATCHED:
                self.needed, self._live = self._before + self._taken(model, self._live.most), None

    def on_exception(self, trainer: Trainer, model: LightningModule, exception: BaseException) -> None:
        if self._live is not None and self._live.inside:
            self._live.__exit__(None, None, None)

    def words(self) -> str:
        """`1.2 GB of memory`; "" where it is not known."""
        return "" if self.needed is None else f"{gigabytes(self.needed)} of memory"

    def _look(self, trainer: Trainer, model: LightningModule, made: int) -> None:
        """Say once that there is too little, when so much more is made than there was: before it is missing."""
        expected = self._before + self._taken(model, made + sum(self._parts.values()))
        if self._told or self._there is None or expected <= self._there:
            return
        self._told = True
        line = f"memory: more than {gigabytes(expected)} are needed and {gigabytes(self._there)} are there; "
        self.progress.say(line + "; ".join(self._keys(trainer, model, made)))

    def _taken(self, model: LightningModule, made: int) -> int:
        """What a process takes for so many bytes of tensors."""
        return made if model.device.type == "cuda" else round(KEPT * made) + FIRST_USE

    def _keys(self, trainer: Trainer, model: LightningModule, made: int) -> list[str]:
        """The keys that bring it down, each with about how much; `made` is the batch's so far."""
        share, found = trainer.datamodule.batch_size // trainer.world_size, []
        pieces = next((n for n in range(2, share + 1) if share % n == 0 and n >= 4), share)
        if model.takes_pieces and model.automatic_optimization and share > 1:
            found.append(f"accumulate={pieces} takes what a step keeps of its images to 1/{pieces}")
        if share > 1:
            fewer = trainer.datamodule.batch_size // 2
            found.append(f"data.batch_size={fewer} to a half, and is another training")
        if any(getattr(module, "checkpointing", True) is False for module in model.modules()):
            found.append("model.net.checkpointing=true to a part of it, a third slower")
        if trainer.precision == "32-true":
            found.append("trainer.precision=bf16-mixed to about half")
        averages = size(p for nets in self.ema.nets.values() for net in nets.values() for p in _own(net, model))
        if averages:
            found.append(f"callbacks.ema.half_lives=[] saves {gigabytes(averages)} of averages")
        if model.takes_adapters and not model.given:
            spared = (1 + MOMENTS) * size(model.trained().values())
            found.append(f"lora=attention, adapters alone, saves nearly {gigabytes(spared)}")
        if frozen := size(weight for weight in model.frozen_weights() if weight.dtype == torch.float32):
            found.append(f"frozen_precision=bf16-true saves {gigabytes(frozen // 2)} of frozen weights")
        return found


class _Live(TorchDispatchMode):
    """Bytes of what is made inside `with` and still lives, in `n`, and the most that did at once, in `most`.

    A storage that several tensors see counts once. It is seen to go also outside.
    """

    def __init__(self, kind: str, grown: Any) -> None:
        super().__init__()
        self.kind, self.grown = kind, grown
        self.n = self.most = 0
        self.inside = False
        self._known: dict[int, weakref.ref] = {}

    def __enter__(self) -> _Live:
        self.inside = True
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.inside = False
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {_key(one): one for one in _tensors((*args, *(kwargs or {}).values()))}
        for one in _tensors(out):
            if one.device.type == self.kind and _key(one) not in given and _key(one) not in self._known:
                self._add(one.untyped_storage())
        if func._overloadpacket in REORDERED and self.kind == "cpu":
            self._grow(size([*given.values(), *_tensors(out)]))
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, bytes_ = storage._cdata, storage.nbytes()

        def gone(_: weakref.ref) -> None:
            del self._known[key]
            self.n -= bytes_

        self._known[key] = weakref.ref(storage, gone)
        self.n += bytes_
        self._grow(0)

    def _grow(self, inside: int) -> None:
        """Note the bytes that live and those that a kernel needs `inside`."""
        if self.n + inside > self.most:
            self.most = self.n + inside
            self.grown(self.most)


def _tensors(values: Any) -> Iterator[Tensor]:
    """Those among the arguments of an operation, or in what it gives, where they may stand in lists."""
    if isinstance(values, Tensor):
        if values.layout == torch.strided:
            yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _own(net: nn.Module, model: LightningModule) -> Iterable[Tensor]:
    """The weights of an average that are not the model's too."""
    shared = {id(p) for p in model.parameters()}
    return (p for p in net.parameters() if id(p) not in shared)


def gigabytes(n: int) -> str:
    """`0.31 GB`, `14 GB`: two digits."""
    return f"{float(f'{n / 1e9:.2g}'):g} GB"
