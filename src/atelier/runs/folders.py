"""Run folders: made, locked, found again, and loaded."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import itertools
import json
import math
import os
import shlex
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from atelier.checkpoints import hub
from atelier.checkpoints.store import LACKING, warn
from atelier.core import lines, stopping
from atelier.core.errors import UserError, nearest
from atelier.core.launchers import rank, slurm_job, srun_tasks
from atelier.core.words import word
from atelier.runs import build, ground, pipelines, preflight, published

if TYPE_CHECKING:
    from atelier.data.base import DataModule
    from atelier.models.base import Model

OUTPUTS = Path("outputs")
_HELD: list[socket.socket] = []  # until the process ends
SECTIONS = ("choices", "model", "data", "budget", "callbacks")  # that the config of each run has


@functools.cache
def stamp() -> str:
    """What the folder of this command is called: by its SLURM job, or else by the time."""
    return of_job() or time_stamp()


def of_job() -> str | None:
    """The SLURM job, and what tells this command from others of that job; None outside of one, and in a shell in one.

    A batch script that is requeued begins again under the same number, and goes on with its own runs: those of the same
    words. By hand, each srun of several tasks is a run, which all of them must call the same.
    """
    job = slurm_job()
    if job is not None and os.environ.get("ENVIRONMENT") == "BATCH":
        return f"job_{job}_{hashlib.sha256(shlex.join(sys.argv[1:]).encode()).hexdigest()[:6]}"
    return f"job_{job}_{os.environ['SLURM_STEP_ID']}" if srun_tasks() > 1 and "SLURM_STEP_ID" in os.environ else None


def time_stamp() -> str:
    """The time; one for all ranks of torchrun, which each compose a config."""
    now = _free(datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return now
    from torch.distributed import TCPStore

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return store.compare_set("atelier/stamp", "", now).decode()


def _free(name: str) -> str:
    """The name, or with a number behind it where another command of this second has it.

    A command holds its name as long as it lives, by a socket that leaves no file; afterwards its folder tells.
    """
    for k in itertools.count(1):
        one = name if k == 1 else f"{name}_{k}"
        if not any(OUTPUTS.glob(f"*/{one}")) and _held(f"{Path.cwd()}/{one}"):
            return one


def _held(name: str) -> bool:
    """Whether this process now has the name to itself; where a system has no such sockets, nobody can tell."""
    held = socket.socket(socket.AF_UNIX)
    try:
        held.bind(f"\0atelier-{hashlib.sha256(name.encode()).hexdigest()[:40]}")
    except OSError as error:
        held.close()
        return error.errno != errno.EADDRINUSE
    _HELD.append(held)
    return True


def unused(room: Path, name: str) -> Path:
    """The folder in `room` of this name, or with a number behind it where there is one."""
    names = itertools.chain([name], (f"{name}_{k}" for k in itertools.count(2)))
    return next(room / one for one in names if not (room / one).exists())


def register() -> None:
    """Make known to configs what their pages ask for; called before composing.

    `${stamp:}` is the time of this command; `${listed:ROOT,ATTRIBUTES}` and `${folders:ROOT}` are what a set on disk
    has, which is looked at where the value is needed.
    """
    if not OmegaConf.has_resolver("stamp"):
        OmegaConf.register_new_resolver("stamp", stamp, use_cache=True)
        OmegaConf.register_new_resolver("listed", _listed)
        OmegaConf.register_new_resolver("folders", _class_folders)


def _listed(root: object, attributes: list[str] | None) -> int:
    from atelier.data.celeba import n_listed

    return n_listed(str(root), attributes if isinstance(attributes, Sequence) else None)


def _class_folders(root: object) -> int:
    from atelier.data.classes import n_folders

    return n_folders(str(root))


@contextlib.contextmanager
def open_run(cfg: DictConfig) -> Iterator[Path]:
    """The run folder, made and, on rank 0, locked; a run that ends before its first checkpoint leaves it as it was.

    Raises:
        UserError: it cannot be written, another process holds it, or `resume=never` and it holds a run.
    """
    folder = Path(cfg.run_dir)
    preflight.writable(folder)
    if cfg.resume == "never" and rank() == 0 and (folder / "config.yaml").exists():
        raise UserError("resume", "never", f"{folder} holds a run", "run_dir=ANOTHER_FOLDER")
    with locked(folder) if rank() == 0 else contextlib.nullcontext():
        begun, before, log = (folder / "config.yaml").exists(), set(folder.iterdir()), folder / lines.LOG
        try:
            with lines.kept(log) if rank() == 0 else contextlib.nullcontext():
                yield folder
        except BaseException as error:
            if (
                not begun and rank() == 0 and not has_checkpoint(folder)
            ):  # nothing to go on from: the next try starts anew
                started = {folder / name for name in ("config.yaml", ground.FILE, "frozen")}
                made = set(folder.iterdir()) - before
                with stopping.undisturbed():
                    _remove(started if isinstance(error, Exception) and made - started - {log} else made)
            raise


def has_checkpoint(folder: Path) -> bool:
    """Whether a run has left a checkpoint."""
    return any(folder.glob("checkpoints/*.ckpt"))


def _remove(paths: set[Path]) -> None:
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run folder. The lock is the system's: it ends with the process, however that ends.

    Raises:
        UserError: another process holds it.
    """
    import fcntl

    path = folder / "lock"
    with path.open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.stat().st_ino != os.fstat(file.fileno()).st_ino:
                raise BlockingIOError  # its holder has just removed the file that was opened here
        except OSError as error:
            if error.errno in LACKING:
                warn(f"{folder}: its file system has no locks ({error.strerror}); let no other run use it")
                yield
                return path.unlink(missing_ok=True)
            file.seek(0)
            problem = f"in use by {file.read().strip() or 'another process'}"
            raise UserError("run_dir", folder, problem, "run_dir=ANOTHER_FOLDER, or wait") from error
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def shorter(path: Path) -> Path:
    """A path as seen from here, or as it is where that is shorter."""
    return min(Path(os.path.relpath(path)), path, key=lambda p: len(str(p)))


def is_running(folder: Path) -> bool:
    """Whether a process works in a run folder now."""
    import fcntl

    try:
        with (folder / "lock").open("r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError as error:
        return error.errno not in LACKING
    return False


def all_runs() -> list[Path]:
    """Run folders under outputs/, oldest first; folders of others, and what is no config of ours, are passed over."""
    return [folder for folder in _folders() if _is_run(folder)]


def _folders() -> list[Path]:
    """What has a config.yaml under outputs/, oldest first."""
    return sorted(inside(OUTPUTS), key=lambda f: (f / "config.yaml").stat().st_mtime)


def inside(place: Path) -> list[Path]:
    """What has a config.yaml anywhere under a folder, but for the parts that runs stand on."""
    return [path.parent for path in place.rglob("config.yaml") if not {"frozen", "wandb"} & set(path.parts)]


def _is_run(folder: Path) -> bool:
    try:
        cfg = build.stored_config(folder)
        return all(isinstance(cfg[key], DictConfig) for key in SECTIONS)
    except Exception:  # of YAML, of OmegaConf, of the disk: it is none of ours
        return False


def find(run: str) -> Path:
    """A run folder by path, or `last` for the newest that has a checkpoint.

    A pipeline of diffusers is one too, by its path or by OWNER/NAME where the hub's cache on this machine has it.

    Raises:
        UserError: there is none.
    """
    if run == "last":
        with_weights = (f for f in reversed(_folders()) if has_checkpoint(f) and _is_run(f))
        if (newest := next(with_weights, None)) is None:
            raise UserError("run", run, "no run with a checkpoint under outputs/", "python train.py")
        return newest
    folder = Path(run)
    if not folder.exists() and hub.NAME.fullmatch(run):
        with contextlib.suppress(UserError):
            return hub.pipeline(run, False, "")
    if not (folder / "config.yaml").exists() and not published.lies_in(folder):
        beside = [str(path.parent) for path in folder.parent.glob("*/config.yaml")]
        close = nearest(run, [*beside, *map(str, all_runs())]) or "last"
        raise UserError("run", run, "no run folder (it has no config.yaml)", word("run", close))
    return folder


@contextlib.contextmanager
def kept_where_writable(folder: Path) -> Iterator[None]:
    """Inside, a run folder that cannot be written costs a warning: what it would hold was printed."""
    try:
        yield
    except OSError as error:
        warn(f"{folder} cannot be written ({error.strerror}): what was found is only printed")


def append(path: Path, line: str) -> None:
    """A line more of a file in a run folder."""
    with kept_where_writable(path.parent), path.open("a") as file:
        file.write(line + "\n")


def summary(folder: Path) -> dict[str, Any]:
    """summary.json, its nulls as nan; without metrics where no evaluation was made."""
    path = folder / "summary.json"
    found = json.loads(path.read_text()) if path.exists() else {"metrics": {}, "protocol": {}}
    return found | {"metrics": {name: math.nan if v is None else v for name, v in found["metrics"].items()}}


@dataclass
class LoadedRun:
    """A run brought back: its config, data and model in eval mode, and how long it had trained."""

    folder: Path
    cfg: DictConfig
    data: DataModule
    model: Model
    images_seen: int
    ema: list[int]  # half-life of the averaged weights, in images; [] for the raw ones

    @property
    def place(self) -> Path:
        """Where what is made of it goes: its folder, or one under outputs/ where it is a pipeline of others."""
        return OUTPUTS / "published" / self.folder.name if published.lies_in(self.folder) else self.folder

    @property
    def pictures(self) -> Path:
        """Where its pictures go."""
        return self.place / "pictures"


@contextlib.contextmanager
def _of_this_version(folder: Path) -> Iterator[None]:
    """A config whose objects take other arguments, or weights of other names, are of another version of the project."""
    try:
        yield
    except (InstantiationException, RuntimeError) as error:
        if not isinstance(error, RuntimeError) and not isinstance(error.__cause__, TypeError):
            raise
        reason = str(error.__cause__ or error).splitlines()[0].rstrip(": ")
        problem = f"another version of the project made it ({reason})"
        raise UserError("run", folder, problem, "train it anew, or that version") from error


def load(folder: Path, ema: bool | int, root: str | None = None) -> LoadedRun:
    """The newest whole checkpoint of a run, with averaged weights or the raw ones.

    Args:
        ema: average of this half-life in images; True: the first of the run, False: none.
        root: folder of its set; None: where training found it.

    Raises:
        UserError: there is no checkpoint or no such average, its set has no files, or its model is not what that is
            today.
    """
    from atelier.callbacks.ema import copy_average
    from atelier.checkpoints.store import load as load_checkpoint
    from atelier.checkpoints.store import newest

    if published.lies_in(folder):
        _average(ema, [])  # it has none
        if root is not None:
            raise UserError("root", root, "a pipeline of diffusers has no set", "leave root out")
        cfg, model = pipelines.as_run(folder)
        return LoadedRun(folder, cfg, build.data(cfg), model.eval(), 0, [])
    cfg = build.safe_config(folder)
    path = newest(folder / "checkpoints")
    if path is None:
        raise UserError("run", folder, "it has no checkpoint yet", "run=last")
    checkpoint = load_checkpoint(path)
    if root is not None:
        if "root" not in cfg.data:
            raise UserError("root", root, "the set of this run has no files", "leave root out")
        cfg.data.root = root
    with _of_this_version(folder):
        data, model = build.data(cfg), build.model(build.without_perceptual(cfg), folder)
        model.restore(checkpoint["state_dict"])
    if (known := ground.names(folder)) is not None:
        data.names = known
    averages = checkpoint["callbacks"]["EMA"]["nets"]
    chosen = _average(ema, list(averages))
    for half_life in chosen:
        copy_average(model, averages[half_life])
    images_seen = checkpoint["callbacks"]["Clock"]["images_seen"]
    return LoadedRun(folder, cfg, data, model.eval(), images_seen, [int(half_life) for half_life in chosen])


def _average(ema: bool | int, known: list[str]) -> list[str]:
    """The half-life that is asked for, as checkpoints name it; none of the raw weights."""
    if isinstance(ema, bool):
        return known[: int(ema)]
    if str(ema) not in known:
        problem = f"the run has averages of half-lives {', '.join(known)}" if known else "the run has no averages"
        raise UserError("ema", ema, problem, f"ema={known[0] if known else 'false'}")
    return [str(ema)]


def load_generator(folder: Path, ema: bool | int, root: str | None) -> LoadedRun:
    """As `load`, of a run whose model makes images; a line says how far it is where it is not at its end.

    Raises:
        UserError: it makes none.
    """
    from atelier.models.base import Generator

    run = load(folder, ema, root)
    if not isinstance(run.model, Generator):
        raise UserError("run", folder, f"{type(run.model).__name__} makes no images", "run=DIR of a model that does")
    if not published.lies_in(folder) and run.images_seen < run.cfg.budget.images:
        lines.say(f"{folder}: {run.images_seen:,} of {run.cfg.budget.images:,} images so far", error=True)
    return run
