"""Generative image models in PyTorch Lightning and Hydra; in Python, `load` gives a trained run that makes pictures."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from atelier.runs.asking import ReadyRun

__all__ = ["load"]


def load(
    run: str | PathLike = "last",
    *,
    root: str | None = None,
    ema: bool | int = True,
    adapters: list[str] | str | None = None,
    adapter_weights: list[float] | float | None = None,
    tile: int | None = None,
) -> ReadyRun:
    """A trained run, ready to be asked: `load("outputs/...").sample(n=16, seed=1, label=3)` are images (16, C, H, W).

    Args:
        run: run folder, `last` for the newest under outputs/, or a pipeline of diffusers.
        root: folder of its set; None: where training found it.
        ema: True: the run's first average, False: the raw weights, a number: the average of that half-life in images.
        adapters: adapters of low rank that are put on the model: a file, a run of lora=..., or a list of them.
        adapter_weights: numbers by which each of them counts; None: 1.
        tile: side of the tiles that larger latents are decoded by; None: as the run does.

    Raises:
        UserError: there is no such run, it makes no images, or the rest does not fit it.
    """
    from atelier.cli.start_up import load_torchmetrics

    load_torchmetrics()
    from atelier.runs import asking, build

    given = {"run": run, "root": root, "ema": ema, "tile": tile}
    return asking.ReadyRun(
        build.plain(asking.config(given | {"adapters": adapters, "adapter_weights": adapter_weights}))
    )
