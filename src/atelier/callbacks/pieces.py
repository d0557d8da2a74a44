"""A batch taken in pieces, one after another, whose gradients add up to one step: less memory, the same batch.

Replaces lightning's accumulate_grad_batches, whose pieces are batches of the loop: the clock, averages and all that is
due by images would count pieces, and a run that goes on with another number of them would step in the middle of a
batch; tests/callbacks/test_pieces.py fails with it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from atelier.core.batch import Batch, rows_of
from atelier.models.base import Model


def take_in_pieces(model: Model, n: int) -> None:
    """From here on a training step of the model, of one optimizer, goes over n equal pieces of its batch.

    The gradient is that of the whole batch, up to rounding, for the same noise. But noise is drawn piece by piece, so
    that another n draws other noise from the same seed. What a step reports is the mean over the pieces; clipping, the
    optimizer and, of several ranks, the exchange of gradients come once, behind the last piece.

    Args:
        model: model that `takes_pieces`.
        n: number of pieces; it divides this rank's share of a batch.
    """
    step: Callable[[Batch], Tensor] = model.training_step

    def in_pieces(batch: Batch) -> None:
        optimizer = model.optimizers()
        optimizer.zero_grad()
        told = []
        for k, piece in enumerate(pieces(batch, n)):
            model.reported.clear()
            with nullcontext() if k == n - 1 else _unsynced(model.trainer):
                loss = step(piece) / n
                with torch.autocast(model.device.type, enabled=False):  # as where Lightning goes back
                    model.manual_backward(loss)
            told.append(dict(model.reported))
        model.reported.update(_means(told))
        optimizer.step()

    model.automatic_optimization = False
    model.training_step = in_pieces
    model.on_before_optimizer_step = model.configure_gradient_clipping  # there gradients are not scaled


def pieces(batch: Batch, n: int) -> list[Batch]:
    """n batches of as many images each, in their order."""
    size = len(batch["index"]) // n
    return [rows_of(batch, slice(k * size, (k + 1) * size)) for k in range(n)]


def _means(told: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Name -> the mean of what the pieces reported under it."""
    names = dict.fromkeys(name for one in told for name in one)
    return {name: torch.stack([one[name] for one in told if name in one]).mean(0) for name in names}


def _unsynced(trainer: Trainer) -> AbstractContextManager:
    """Inside, ranks keep their gradients to themselves."""
    strategy = trainer.strategy
    return strategy.block_backward_sync() if isinstance(strategy, DDPStrategy) else nullcontext()
