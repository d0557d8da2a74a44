"""Training whose noise is a function of the image, so that pieces and whole batches are the same to it.

Called by test_pieces.py, and by itself as one rank of two, which also counts what the ranks exchange.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

import train as entry
from atelier.callbacks.clock import Clock
from atelier.checkpoints.store import load, newest
from atelier.runs import folders
from tests.campaign import flat
from tests.compose import composed
from tests.tiny import tiny

STILL = ["metrics=none", "eval.every_images=1000", "eval.n_diagnosed=0", "checkpoint.every_images=1000"]


@contextmanager
def undrawn() -> Iterator[None]:
    """From the start of training on, noise of an image is the image turned, and a number is the same for all."""
    with patch.object(Clock, "on_train_start", _from_here_on(Clock.on_train_start)):
        kept = torch.rand, torch.randn, torch.randn_like
        try:
            yield
        finally:
            torch.rand, torch.randn, torch.randn_like = kept


def _from_here_on(original: Any) -> Any:
    def started(self: Clock, *given: Any) -> None:
        original(self, *given)
        torch.rand = torch.randn = constant
        torch.randn_like = lambda x: x.flip(-1)

    return started


def constant(*shape: Any, device: Any = None, dtype: Any = None, generator: Any = None) -> Tensor:
    return torch.full(shape if isinstance(shape[0], int) else shape[0], 0.3, dtype=dtype)


def trained(folder: Path, family: str, *more: str, root: Path | None = None) -> dict[str, Tensor]:
    """Weights, averages, moments of the optimizer behind three batches, by name."""
    with undrawn():
        entry.train(composed(*tiny(family, root or folder.parent), *STILL, "budget.images=24", *more, run_dir=folder))
    held = load(newest(folder / "checkpoints"))
    every = flat({key: held[key] for key in ("state_dict", "callbacks", "optimizer_states")}, "")
    return {name: value.double() for name, value in every.items() if isinstance(value, Tensor)}


def main() -> None:
    folders.register()
    rank, ranks, folder = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), Path(sys.argv[1])
    exchanged: list[int] = []
    original = DistributedDataParallel.__init__

    def counted(self: DistributedDataParallel, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        self.register_comm_hook(None, exchange)

    def exchange(state: None, bucket: distributed.GradBucket) -> torch.futures.Future[Tensor]:
        exchanged.append(bucket.index())
        sent = distributed.all_reduce(bucket.buffer().div_(ranks), async_op=True)
        return sent.get_future().then(lambda done: done.value()[0])

    with patch.object(DistributedDataParallel, "__init__", counted):
        states = trained(folder, "ddpm", "model.net.dropout=0", f"trainer.devices={ranks}", "accumulate=2")
    torch.save(states, folder / f"states_{rank}.pt")
    (folder / f"exchanged_{rank}.json").write_text(json.dumps(exchanged))


if __name__ == "__main__":
    main()
