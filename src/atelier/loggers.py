"""Where rows and pictures go beside metrics.csv."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from atelier.ranges import Name


class Finished(WandbLogger):
    """A W&B run that ends with its job, so that the next job of a sweep gets one of its own."""

    def finish(self) -> None:
        if self._experiment is not None:
            folder = self._experiment.dir
            offline = self._offline
            self._experiment.finish(quiet=True)
            os.environ.pop("WANDB_MODE", None)
            if offline:
                print(f"W&B offline; upload with: wandb sync {Path(folder).parent}", flush=True)


class Board(TensorBoardLogger):
    """TensorBoard's files in the run folder."""

    def finish(self) -> None:
        self.experiment.close()


def csv() -> list[Logger]:
    """metrics.csv alone, which is always written."""
    return []


def tensorboard(*, folder: Name) -> list[Logger]:
    """Scalars for TensorBoard, under `folder`/tensorboard."""
    return [Board(save_dir=folder, name="tensorboard", version="")]


def wandb(
    *,
    project: Name,
    group: Name | None,
    tags: list[Name],
    mode: Literal["auto", "online", "offline"],
    folder: Name,
    described: dict[str, Any],
) -> list[Logger]:
    """Weights & Biases.

    Args:
        group: of the runs of one sweep.
        mode: auto is online where credentials are found, else offline.
        folder: where its files lie.
        described: the run's config as it shows there.
    """
    import wandb as client

    offline = mode == "offline" or (mode == "auto" and not _credentials(client))
    if offline and mode == "auto":
        print("W&B: no credentials found, the run is logged offline", flush=True)
    settings = client.Settings(disable_git=True, disable_code=True, console="off", silent=True, init_timeout=20)
    logger = Finished(
        project=project,
        group=group,
        tags=tags,
        name=Path(folder).name if described["experiment"] is None else f"{described['experiment']} {Path(folder).name}",
        save_dir=folder,
        offline=offline,
        config=described,
        settings=settings,
    )
    return [logger]


def _credentials(client: Any) -> bool:
    return bool(os.environ.get("WANDB_API_KEY") or client.api.api_key)
