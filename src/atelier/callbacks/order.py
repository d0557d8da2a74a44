"""The callbacks of a run, in their one order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback

from atelier.callbacks.calibration import Calibration
from atelier.callbacks.checkpoint import Checkpoints
from atelier.callbacks.clock import Clock
from atelier.callbacks.diagnostics import Diagnostics
from atelier.callbacks.ema import EMA
from atelier.callbacks.evaluation import Evaluation
from atelier.callbacks.grids import Grids
from atelier.callbacks.memory import Memory
from atelier.callbacks.progress import Progress
from atelier.callbacks.table import Table
from atelier.callbacks.work import Work


class Callbacks(list[Callback]):
    """What saves comes after what is saved, what judges comes last; an average
    that moved after the save would be one update behind in the checkpoint.

    Args:
        pages: the clock, and for each other one a callable that waits for the callbacks before it.
    """

    def __init__(self, pages: dict[str, Any]) -> None:
        make: dict[str, Callable] = pages
        self.clock: Clock = pages["clock"]
        self.progress = Progress(self.clock)
        self.ema: EMA = make["ema"](clock=self.clock)
        self.memory = Memory(self.ema, self.progress)
        self.work = Work(self.clock, self.progress, self.memory)
        self.table: Table = make["table"](clock=self.clock, work=self.work)
        self.grids: Grids = make["grids"](clock=self.clock, ema=self.ema, table=self.table)
        self.checkpoints: Checkpoints = make["checkpoint"](clock=self.clock, ema=self.ema)
        self.diagnostics = Diagnostics(self.clock, self.table)
        self.evaluation: Evaluation = make["evaluation"](
            clock=self.clock,
            ema=self.ema,
            table=self.table,
            checkpoints=self.checkpoints,
            progress=self.progress,
            work=self.work,
            diagnostics=self.diagnostics,
        )
        super().__init__(
            [
                self.clock,
                Calibration(self.clock),
                self.memory,
                self.work,
                self.ema,
                self.table,
                self.diagnostics,
                self.grids,
                self.checkpoints,
                self.evaluation,
                self.progress,
            ]
        )
