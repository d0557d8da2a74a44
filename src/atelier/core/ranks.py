"""What the ranks of a run tell each other; where there is one rank, everything here gives back what it was given."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def many() -> bool:
    """Whether there is more than one."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextlib.contextmanager
def patiently() -> Iterator[Callable[[], None]]:
    """A barrier at which a rank is waited for as long as it lives, whatever the patience with it otherwise.

    For work of one rank that may take longer; the ranks must enter together.
    """
    if not many():
        yield lambda: None
        return
    group = dist.new_group(backend="gloo", timeout=timedelta(days=1000))
    yield lambda: dist.barrier(group)
    dist.destroy_process_group(group)


def summed(x: Tensor) -> Tensor:
    """The sum of all ranks' x, in place."""
    if many():
        dist.all_reduce(x)
    return x


def mean(x: Tensor) -> Tensor:
    """The mean of all ranks' x: of a statistic of all their images where their batches are of one size."""
    return summed(x) / dist.get_world_size() if many() else x


class _Summed(torch.autograd.Function):
    """All ranks' x enters what each of them makes of the sum, so gradients are summed too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return summed(x.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return summed(gradient.clone())


def mean_learned(x: Tensor) -> Tensor:
    """`mean`, through which gradients go."""
    return _Summed.apply(x) / dist.get_world_size() if many() else x


def any_of(*mine: bool) -> list[bool]:
    """Whether any rank says so, of each of these; all must ask at the same place.

    The CPUs tell one another, so that no rank waits for what its GPU still has to do.
    """
    if not many():
        return list(mine)
    said = torch.tensor(mine, dtype=torch.int32)
    dist.all_reduce(said, dist.ReduceOp.MAX, group=_of_cpus(dist.group.WORLD))
    return said.bool().tolist()


@cache
def _of_cpus(all_ranks: dist.ProcessGroup) -> dist.ProcessGroup:
    return all_ranks if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


def everyones(x: Any) -> list[Any]:
    """What each rank gives, any object that can be pickled, in the order of the ranks; all of them must ask."""
    if not many():
        return [x]
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, x)
    return found


def from_first(x: Tensor) -> Tensor:
    """x on rank 0 and zeros elsewhere: summed over ranks, all hold what rank 0 chose."""
    return torch.zeros_like(x) if many() and dist.get_rank() > 0 else x


def of_first(x: Tensor) -> Tensor:
    """Rank 0's x on every rank."""
    return summed(from_first(x))


def gathered(x: Tensor) -> Tensor:
    """The rows of all ranks, (ranks * B, ...) of (B, ...) each, in the order of the ranks."""
    if not many():
        return x
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def mine(x: Tensor) -> Tensor:
    """This rank's rows of what `gathered` gave."""
    return x.chunk(dist.get_world_size())[dist.get_rank()] if many() else x


class _Gathered(torch.autograd.Function):
    """This rank's rows enter what each rank makes of all of them, so their gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return gathered(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return mine(summed(gradient.clone()))


def gathered_learned(x: Tensor) -> Tensor:
    """`gathered`, through which gradients go: to each rank's rows, summed over what all ranks made of them.

    Where every rank makes the same scalar of all rows, the mean over ranks of the gradients of weights, which DDP
    takes, is the gradient of that scalar.
    """
    return _Gathered.apply(x) if many() else x
