"""Work on numbered images shared among the ranks, and what all of them found, in the order of the numbers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from atelier.core.batch import Batch, rows_of
from atelier.core.errors import UserError
from atelier.core.ranks import many
from atelier.core.rng import ImageRngs
from atelier.data.base import DataModule

Progress = Callable[[str, int, int], None]  # called with what is done, how much of it, of how much; may raise to stop


def show_progress(what: str, done: int, n: int) -> None:
    """Progress on one line of a terminal."""
    if sys.stderr.isatty():
        print(f"\r{what}: {done:,} of {n:,}", end="\n" if done >= n else "", file=sys.stderr, flush=True)


class Parts:
    """Facts about images, tensors (B, ...) by name, collected batch by batch."""

    def __init__(self) -> None:
        self.parts: dict[str, list[Tensor]] = {}

    def add(self, numbers: range, facts: dict[str, Tensor]) -> None:
        """Facts of the images `numbers`, on any device."""
        columns = {"number": torch.arange(numbers.start, numbers.stop)} | facts
        for name, tensor in columns.items():
            self.parts.setdefault(name, []).append(tensor.cpu())

    def gathered(self) -> dict[str, Tensor]:
        """The facts of all ranks, (N, ...) on the CPU, in the order of their numbers."""
        facts = {name: torch.cat(tensors) for name, tensors in self.parts.items()}
        if many():
            met = {name: gather_all_tensors(t.to(_meeting()).contiguous()) for name, t in facts.items()}
            facts = {name: torch.cat(tensors).cpu() for name, tensors in met.items()}
        order = facts.pop("number").argsort()
        return {name: tensor[order] for name, tensor in facts.items()}


def shares(n: int, batch_size: int) -> Iterator[range]:
    """This rank's part of each batch of 0 .. n - 1: batches of even size, none of them empty on any rank.

    Raises:
        UserError: fewer images than ranks.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if many() else (0, 1)
    if n < ranks:
        raise UserError("eval.n_samples", n, f"there are {ranks} ranks", f"eval.n_samples={ranks}")
    batches = max(1, min(-(-n // batch_size), n // ranks))
    cuts = [n * i // batches for i in range(batches + 1)]
    for first, end in pairwise(cuts):
        yield range(first + (end - first) * rank // ranks, first + (end - first) * (rank + 1) // ranks)


def read(
    data: DataModule, split: str, n: int, batch_size: int, what: str, progress: Progress
) -> Iterator[tuple[range, Batch]]:
    """This rank's part of n images that stand for a split, batch by batch with their numbers; `progress` is told."""
    for numbers in shares(n, batch_size):
        progress(what, numbers.stop, n)
        yield numbers, data.chosen(split, numbers)


def out_of_memory(error: Exception) -> bool:
    """Whether it says that memory, of a device or of the machine, ran out."""
    return isinstance(error, MemoryError) or "out of memory" in str(error)


def in_halves(
    facts: Callable[[Batch, ImageRngs], dict[str, Tensor]], batch: Batch, rngs: ImageRngs
) -> dict[str, Tensor]:
    """Facts of images, (B, ...) by name; where memory runs out, of half as many at a time."""
    try:
        return facts(batch, rngs)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error) or len(rngs) == 1:
            raise
    half, rngs = len(rngs) // 2, rngs.again()
    parts = [in_halves(facts, rows_of(batch, p), rngs[p]) for p in (slice(0, half), slice(half, None))]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def all_ranks(mine: bool) -> bool:
    """Whether every rank says True."""
    if not many():
        return mine
    said = torch.tensor([int(mine)], device=_meeting())
    dist.all_reduce(said, dist.ReduceOp.MIN)
    return bool(said)


def _meeting() -> torch.device:
    """Where the ranks exchange tensors."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
