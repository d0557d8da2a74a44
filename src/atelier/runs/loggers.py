"""Where rows and pictures go beside metrics.csv."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from atelier.core.errors import UserError
from atelier.core.lines import say
from atelier.core.ranges import Name

if TYPE_CHECKING:
    from wandb import Run

REACHED_IN = 10  # seconds in which W&B's server must answer


class Finished(WandbLogger):
    """A W&B run that ends with its job, so that the next job of a sweep gets one of its own.

    It is started here: started by Lightning it would plot over trainer/global_step, warn, and leave WANDB_MODE behind.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(experiment=run)

    def finish(self, failed: bool) -> None:
        """End the run; say how to upload it where it was written offline."""
        folder = Path(self._experiment.dir).parent
        offline = self._experiment.offline
        self._experiment.finish(exit_code=int(failed))
        if offline and folder.name.startswith("offline-run"):
            say(f"W&B offline; upload with: wandb sync {folder}")


class Board(TensorBoardLogger):
    """TensorBoard's files in the run folder."""

    def finish(self, failed: bool) -> None:
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
        group: name of a sweep, by which its runs are shown together.
        mode: auto is online where credentials are found and the server answers, else offline; or what WANDB_MODE says.
        folder: run folder; its name and W&B's files lie there.
        described: the run's config as it shows there.
    """
    import wandb as client

    page = described["experiment"] or f"{described['model']} {described['data']}"
    given = {
        "project": project,
        "group": group,
        "job_type": "train",
        "tags": tags,
        "name": f"{page} {Path(folder).name}",
        "id": _identity(Path(folder)),
        "resume": "allow",
        "dir": folder,
        "config": described,
        "settings": client.Settings(
            disable_git=True, disable_code=True, console="off", silent=True, init_timeout=2 * REACHED_IN
        ),
    }
    try:
        return [Finished(client.init(mode=_mode(mode, client), **given))]
    except client.Error as error:
        raise UserError("logger.mode", mode, str(error).splitlines()[0], "logger.mode=offline") from error


def _mode(asked: Literal["auto", "online", "offline"], client: Any) -> str:
    """Online or offline, or what WANDB_MODE says; one line where there is no choice."""
    if asked != "auto":
        return asked
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    server = client.setup().settings.base_url
    if not client.login(prompt=False, verify=False):
        say("W&B: no credentials found, the run is logged offline (wandb login asks for them)")
    elif not _answers(server):
        say(f"W&B: {server} does not answer, the run is logged offline")
    else:
        return "online"
    return "offline"


def _answers(server: str) -> bool:
    """Whether there is any answer; once W&B has tried in vain, this process cannot begin the same run offline."""
    try:
        urllib.request.urlopen(server, timeout=REACHED_IN).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def _identity(folder: Path) -> str:
    """The W&B run that a run folder goes on with."""
    path = folder / "wandb" / "id"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(uuid.uuid4().hex[:8])
    return path.read_text()
