"""Some batches of a run, trained on and forgotten: what it will take on this device, known before it begins."""

from __future__ import annotations

from collections.abc import Callable

from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from atelier.callbacks.memory import Memory
from atelier.callbacks.pieces import take_in_pieces
from atelier.callbacks.trial import Trial
from atelier.callbacks.work import Work
from atelier.data.base import DataModule
from atelier.data.stand_in import stand_in
from atelier.models.base import Model
from atelier.runs import build
from atelier.runs.trainer import give_back_memory

TRIAL = 4.0  # seconds after which a trial begins no further batch


class _Aside:
    """In place of the bar: says elsewhere what the memory's callback has to say."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say


def share_of_one(cfg: DictConfig) -> DictConfig:
    """The config of what one of a run's ranks does, alone."""
    cfg = cfg.copy()
    ranks = cfg.trainer.devices * cfg.trainer.num_nodes
    cfg.trainer.devices, cfg.trainer.num_nodes, cfg.trainer.profiler = 1, 1, None
    cfg.data.batch_size = max(1, cfg.data.batch_size // ranks)
    return cfg


def some_batches(cfg: DictConfig, model: Model, data: DataModule, say: Callable[[str], None]) -> tuple[Work, Trial]:
    """Train on some batches, as training takes them, on noise where images lie in files.

    Args:
        cfg: config of the run, of one rank.
        model: model of it, whose weights change.
        data: set of it.
        say: takes a line about memory, where there is too little.

    Returns:
        What has counted the operations of the batches, and what has timed them.
    """
    clock, aside = instantiate(cfg.callbacks.clock, _convert_="all"), _Aside(say)
    ema = instantiate(cfg.callbacks.ema, _convert_="all")(clock=clock)
    memory = Memory(ema, aside)
    work, trial = Work(clock, aside, memory), Trial(TRIAL)
    trainer = build.trainer(cfg, model, [clock, memory, work, ema, trial], [])
    trainer.limit_val_batches = 0
    if cfg.accumulate > 1:
        take_in_pieces(model, cfg.accumulate)
    trainer.fit(model, stand_in(data) if "root" in cfg.data else data)
    return work, trial


def seconds(cfg: DictConfig, parts: dict[str, nn.Module]) -> float:
    """How long the training of a run will take without judging, in seconds.

    Args:
        cfg: config of the run.
        parts: nets that it stands on, trained or not.
    """
    one = share_of_one(cfg)
    _, trial = some_batches(one, build.untaught(one, parts), build.data(one), lambda line: None)
    each = trial.seconds_per_batch / cfg.data.batch_size
    give_back_memory()  # to the process that trains it
    return each * cfg.budget.images
