"""What a command does around its work: mistakes as one line, jobs of a sweep side by side, notes for its table."""

from __future__ import annotations

import contextlib
import math
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from atelier.cli.messages import check_words, one_line, report, user_error
from atelier.cli.start_up import load_torchmetrics
from atelier.core import lines, stopping
from atelier.core.errors import UserError, causes
from atelier.core.launchers import rank
from atelier.core.words import word
from atelier.runs import meeting
from atelier.runs.folders import OUTPUTS, has_checkpoint, register, shorter
from atelier.runs.pages import task_words

NOTES = ("done", "error.txt")


def job(work: Callable[[DictConfig], float | None], cfg: DictConfig) -> float | None:
    """Do one job of a command: a user's mistake is one line; in a multirun the other jobs go on.

    The folder is the one that Hydra chose, which the ranks that Lightning starts get too.
    """
    hydra = HydraConfig.get()
    many, words = hydra.mode == RunMode.MULTIRUN, task_words(hydra)
    register()  # a launcher's process got the function alone
    folder = shorter(Path(hydra.runtime.output_dir))
    OmegaConf.set_readonly(cfg, False)
    cfg.run_dir = str(folder)
    if many:
        stopping.listen()  # a launcher's process began elsewhere
        own = [word for word in words if word not in sys.argv]
        lines.say(f"\njob {hydra.job.num}: {' '.join(own)}")
    try:
        check_words(words)
        if many:
            for name in NOTES:  # of an earlier try
                (folder / name).unlink(missing_ok=True)
            fits_a_sweep(cfg, hydra)
        load_torchmetrics()
        value = work(cfg)
        if many:
            note(folder, "done", "")
        return worst(hydra) if value is not None and math.isnan(value) else value
    except SystemExit as leaving:
        if leaving.code in stopping.CODES:
            typed = [shlex.quote(one) for one in words if not one.startswith("run_dir=")]
            command = " ".join(["python train.py", *typed, word("run_dir", str(folder))])
            nothing = ["stopped by a signal before there was anything to save"]
            notes = getattr(leaving, "__notes__", nothing)  # of a part that was being trained
            lines.say(f"go on with: {command}" if has_checkpoint(folder) else "\n".join(notes))
        raise
    except Exception as error:
        known = user_error(error) or _removed(error, folder)
        if known is None:
            lines.keep(f"{type(error).__name__}: {error}")
            if not many:
                meeting.tell(bug(error))
                meeting.linger()
                raise
            traceback.print_exc()
        else:
            report(known)
        if many:
            note(folder, "error.txt", known.line() if known else f"{type(error).__name__}: {error}")
            return worst(hydra)
        sys.exit(2)
    finally:
        lines.forget()
        if many:
            note(folder, "overrides.txt", "\n".join(words))
        _remove_empty(folder)


def bug(error: Exception) -> UserError:
    """What other ranks learn of an error that is none of the user's."""
    return UserError("trainer.devices", "", f"rank {rank()}: {type(error).__name__}", "see its traceback")


def _removed(error: Exception, folder: Path) -> UserError | None:
    """What fails because somebody has removed the folder of the run."""
    if folder.exists() or not any(isinstance(cause, OSError | RuntimeError) for cause in causes(error)):
        return None
    return UserError("run_dir", folder, "the folder was removed under the run", "the same command starts it anew")


def direction(hydra: DictConfig) -> str | None:
    """Where a search for hyperparameters goes, `minimize` or `maximize`; None where a sweeper does not search."""
    found = hydra.sweeper.get("direction")
    return None if found is None else str(getattr(found, "name", found))


def worst(hydra: DictConfig) -> float:
    """What a sweeper gets for a job that failed or whose metric is nan, of which Optuna would end."""
    return {"maximize": -math.inf, "minimize": math.inf}.get(direction(hydra), math.nan)


def command(work: Callable[[DictConfig], None], cfg: DictConfig) -> None:
    """Do what sample.py, evaluate.py, export.py and demo.py do; a user's mistake is one line."""
    with one_line():
        check_words(task_words())
        load_torchmetrics()
        work(cfg)


def fits_a_sweep(cfg: DictConfig, hydra: DictConfig) -> None:
    """Neither several ranks, where jobs share a process, nor what writes nothing are the business of a sweep.

    Raises:
        UserError: one of them was asked for.
    """
    if cfg.get("doctor") is True:
        raise UserError("doctor", "true", "it tells of one run and writes nothing, -m is for several", "leave -m out")
    devices = cfg.trainer.devices
    if isinstance(devices, int) and devices > 1 and "submitit" not in hydra.launcher._target_:
        problem = "a sweep whose jobs share a command line cannot start ranks"
        fix = "trainer.devices=1 or hydra/launcher=submitit_slurm"
        raise UserError("trainer.devices", devices, problem, fix)


def _remove_empty(folder: Path) -> None:
    """A folder in which nothing was written, and those above it as far as outputs/."""
    with contextlib.suppress(OSError):
        folder.rmdir()
        for above in folder.parents:
            if OUTPUTS.resolve() in (above.resolve(), *above.resolve().parents):
                above.rmdir()


def note(folder: Path, name: str, text: str) -> None:
    """A file in a job's folder, for the table of the sweep."""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text + "\n")
