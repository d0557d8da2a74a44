"""Exponential moving averages of the nets that a model names in `ema_nets`.

Replaces lightning's WeightAveraging, which averages frozen and discriminator nets too, misses updates with two
optimizers, leaves weights exchanged after an error and judges them by the raw net's batch statistics;
tests/callbacks/test_ema.py fails with it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from atelier.callbacks import statistics
from atelier.callbacks.clock import Clock
from atelier.core.batch import Batch
from atelier.core.ranges import PositiveInt, Probability
from atelier.core.ranks import many
from atelier.data.base import DataModule
from atelier.models.base import Model


class EMA(Callback):
    """Keeps exponential moving averages of a model's nets.

    Args:
        half_lives: half-lives in images; the first is what evaluation and sampling use.
        ramp: largest half-life as a share of the images seen so far, so that early weights are forgotten.
        clock: clock of the run, which counts images.
    """

    def __init__(self, half_lives: list[PositiveInt], ramp: Probability, clock: Clock) -> None:
        self.half_lives, self.ramp, self.clock = half_lives, ramp, clock
        self.nets: dict[str, dict[str, nn.Module]] = {}  # half-life -> name -> net
        self.frozen: dict[str, set[str]] = {}  # name of a net -> names of weights in it that are never trained
        self.updated_at = 0
        self.statistics_current = False  # whether the averages' batch norms hold their own statistics
        self.data: DataModule | None = None  # of the run, from its start
        self._stepped = False
        self._averaged: set[int] = set()  # ids of weights that are trained and averaged

    def setup(self, trainer: Trainer, model: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.nets = {str(h): average_of(model) for h in self.half_lives}
            self._averaged = {id(weight) for name in model.ema_nets for weight in model.trained(name).values()}
            self.frozen = {name: _frozen(model, name) for name in model.ema_nets}
            model.averages = next(iter(self.nets.values()), {})

    def state_dict(self) -> dict:
        nets = {h: {name: self._state(name, net) for name, net in nets.items()} for h, nets in self.nets.items()}
        return {"nets": nets, "updated_at": self.updated_at}

    def _state(self, name: str, net: nn.Module) -> dict[str, Tensor]:
        return {key: value for key, value in net.state_dict().items() if key not in self.frozen[name]}

    def load_state_dict(self, state: dict) -> None:
        self.updated_at, self.statistics_current = state["updated_at"], False
        for half_life, nets in self.nets.items():
            for name, net in nets.items():
                _load(net, state["nets"][half_life][name], self.frozen[name])

    def on_fit_start(self, trainer: Trainer, model: LightningModule) -> None:
        self.data = trainer.datamodule
        for nets in self.nets.values():
            for net in nets.values():
                net.to(model.device)

    def on_before_optimizer_step(self, trainer: Trainer, model: LightningModule, optimizer: Optimizer) -> None:
        """A generator step is the step of an optimizer of averaged weights."""
        if any(id(p) in self._averaged for group in optimizer.param_groups for p in group["params"]):
            self._stepped = True

    def on_train_batch_end(
        self, trainer: Trainer, model: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        if self._stepped:
            self._stepped = False
            self.update(model)

    @torch.no_grad()
    def update(self, model: LightningModule) -> None:
        """average += (1 - decay) (weights - average), decay = 0.5 ** (images since the last update / half-life)."""
        now = self.clock.images_seen
        for half_life, nets in self.nets.items():
            length = max(1.0, min(float(half_life), self.ramp * now))
            gain = 1 - 0.5 ** ((now - self.updated_at) / length)
            for name, net in nets.items():
                raw = getattr(model, name)
                pairs = zip(net.parameters(), raw.parameters(), strict=True)
                if moving := [(average, weight) for average, weight in pairs if average is not weight]:
                    averages, weights = zip(*moving, strict=True)
                    torch._foreach_lerp_(averages, weights, gain)
                for average, buffer in zip(net.buffers(), raw.buffers(), strict=True):
                    average.copy_(buffer)
        self.updated_at, self.statistics_current = now, False

    def on_validation_start(self, trainer: Trainer, model: LightningModule) -> None:
        self.update_statistics(model)
        self.broadcast_buffers(model)

    def update_statistics(self, model: LightningModule) -> None:
        """Batch norms of the averages get their own statistics, where the averages have moved since they last did."""
        if self.statistics_current:
            return
        for nets in self.nets.values():
            with swapped(model, nets):
                statistics.take(model, self.data)
        self.statistics_current = True

    def broadcast_buffers(self, model: LightningModule) -> None:
        """Each rank has BatchNorm statistics of its own; rank 0's are the ones that count and are saved."""
        if many():
            for buffer in [*model.buffers(), *(b for n in self.nets.values() for m in n.values() for b in m.buffers())]:
                dist.broadcast(buffer, 0)

    @contextmanager
    def averaged(self, model: LightningModule) -> Iterator[None]:
        """Inside, the model's nets hold the first average; the raw weights come back whatever happens."""
        self.update_statistics(model)
        with swapped(model, next(iter(self.nets.values()), {})):
            yield


def average_of(model: Model) -> dict[str, nn.Module]:
    """A copy of each net under average, in eval mode and without gradients; weights that are not trained are shared."""
    trained = {id(weight) for name in model.ema_nets for weight in model.trained(name).values()}
    nets = {name: getattr(model, name) for name in model.ema_nets}
    shared = {id(p): p for net in nets.values() for p in net.parameters() if id(p) not in trained}
    return {name: copy.deepcopy(net, dict(shared)).eval().requires_grad_(False) for name, net in nets.items()}


@contextmanager
def swapped(model: nn.Module, nets: dict[str, nn.Module]) -> Iterator[None]:
    """Inside, the model's nets hold the tensors of these, and these hold the model's."""
    swap(model, nets)
    try:
        yield
    finally:
        swap(model, nets)


def swap(model: nn.Module, nets: dict[str, nn.Module]) -> None:
    """Exchange tensors in place, so that every holder of a net, compiled or not, sees the change."""
    for name, net in nets.items():
        raw = getattr(model, name)
        pairs = [*zip(raw.parameters(), net.parameters(), strict=True), *zip(raw.buffers(), net.buffers(), strict=True)]
        for a, b in pairs:
            a.data, b.data = b.data, a.data


def copy_average(model: Model, nets: dict[str, dict[str, Tensor]]) -> None:
    """Load saved averages (name -> state dict) into the model's nets."""
    for name, state in nets.items():
        _load(getattr(model, name), state, _frozen(model, name))


def _frozen(model: Model, name: str) -> set[str]:
    trained = model.trained(name)
    return {key for key, _ in getattr(model, name).named_parameters() if f"{name}.{key}" not in trained}


def _load(net: nn.Module, state: dict[str, Tensor], frozen: set[str]) -> None:
    """Load the average of a net, in which weights that are never trained are not saved."""
    swapped = {key: value for key, value in net.state_dict().items() if key in frozen}
    net.load_state_dict(swapped | state)
