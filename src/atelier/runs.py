"""Run folders: made, locked, described, found again, and loaded; and the runs that other runs stand on."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from atelier import preflight
from atelier.command_line import headline
from atelier.errors import UserError, check_words, nearest, rank, report, user_error

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import Logger
    from torch import nn

    from atelier.callbacks.judging import Judging
    from atelier.callbacks.order import Callbacks
    from atelier.data.base import DataModule
    from atelier.models.base import Generator

OUTPUTS = Path("outputs")
STOPPED = (130, 143)  # exit codes after Ctrl-C and SIGTERM
ROOT = Path(__file__).parents[2]
SETTINGS = ["model", "data", "budget", "eval", "checkpoint", "trainer", "callbacks", "metrics"]
FREE = "budget eval checkpoint metrics logger trainer run_dir resume check objective compile".split()
FREE_DATA = ("budget", "num_workers", "root", "download", "memory_mb", "on_bad_image", "cache")
RANKS = (
    "LOCAL_RANK RANK GROUP_RANK ROLE_RANK NODE_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_WORLD_SIZE ROLE_WORLD_SIZE"
    " MASTER_ADDR MASTER_PORT PL_GLOBAL_SEED WANDB_MODE WANDB_RUN_ID HYDRA_FULL_ERROR"
).split()


@functools.cache
def stamp() -> str:
    """The time of this command as a folder name; one for all ranks of torchrun, which each compose a config.

    Several tasks of a SLURM step are named by job and step, which a requeued job keeps.
    """
    if int(os.environ.get("SLURM_NTASKS") or 1) > 1 and "SLURM_STEP_ID" in os.environ:
        return f"job_{os.environ['SLURM_JOB_ID']}_{os.environ['SLURM_STEP_ID']}"
    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return now
    from torch.distributed import TCPStore

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return store.compare_set("atelier/stamp", "", now).decode()


def register() -> None:
    """Make `${stamp:}` known to configs; called once before composing."""
    if not OmegaConf.has_resolver("stamp"):
        OmegaConf.register_new_resolver("stamp", stamp, use_cache=True)


@contextlib.contextmanager
def held(cfg: DictConfig) -> Iterator[Path]:
    """The run folder, made and, on rank 0, locked; an empty one is removed again.

    Raises:
        UserError: it cannot be written, another process holds it, or `resume=never` and it holds a run.
    """
    folder = Path(cfg.run_dir)
    preflight.writable(folder)
    if cfg.resume == "never" and rank() == 0 and (folder / "config.yaml").exists():
        raise UserError("resume", "never", f"{folder} holds a run", "run_dir=ANOTHER_FOLDER")
    with locked(folder) if rank() == 0 else contextlib.nullcontext():
        begun = (folder / "config.yaml").exists()
        try:
            yield folder
        except Exception:
            if not begun and rank() == 0 and not list(folder.glob("checkpoints/*.ckpt")):
                for name in ("config.yaml", "ground.json"):  # nothing to go on from: the next try starts anew
                    (folder / name).unlink(missing_ok=True)
                shutil.rmtree(folder / "frozen", ignore_errors=True)
            raise


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


def job(work: Callable[[DictConfig], float | None], cfg: DictConfig) -> float | None:
    """Do one job of a command: a user's mistake is one line; in a multirun the other jobs go on.

    The folder is the one that Hydra chose, which the ranks that Lightning starts are told too.
    """
    hydra = HydraConfig.get()
    many = hydra.mode == RunMode.MULTIRUN
    folder = shorter(Path(hydra.runtime.output_dir))
    OmegaConf.set_readonly(cfg, False)
    cfg.run_dir = str(folder)
    if many:
        own = [word for word in hydra.overrides.task if word not in sys.argv]
        print(f"\njob {hydra.job.num}: {' '.join(own)}", flush=True)
    try:
        check_words(list(hydra.overrides.task))
        if many:
            one_process(cfg, hydra)
        value = work(cfg)
        if many:
            _note(folder, "done", "")
        return value
    except SystemExit as leaving:
        if leaving.code in STOPPED:
            words = [word for word in hydra.overrides.task if not word.startswith("run_dir=")]
            print(f"go on with: python train.py {shlex.join([*words, f'run_dir={folder}'])}", flush=True)
        raise
    except Exception as error:
        known = user_error(error)
        if known is None and not many:
            raise
        if known is None:
            traceback.print_exc()
        else:
            report(known)
        if many:
            _note(folder, "error.txt", known.line() if known else f"{type(error).__name__}: {error}")
            return math.nan
        sys.exit(2)
    finally:
        if many:
            _note(folder, "overrides.txt", "\n".join(hydra.overrides.task))
        _remove_empty(folder)


def one_process(cfg: DictConfig, hydra: DictConfig) -> None:
    """Several ranks are no business of a sweep whose jobs share a process.

    Raises:
        UserError: they were asked for.
    """
    if cfg.trainer.devices > 1 and "submitit" not in hydra.launcher._target_:
        problem = "a sweep whose jobs share a command line cannot start ranks"
        fix = "trainer.devices=1 or hydra/launcher=submitit_slurm"
        raise UserError("trainer.devices", cfg.trainer.devices, problem, fix)


def shorter(path: Path) -> Path:
    """A path as seen from here, or as it is where that is shorter."""
    return min(Path(os.path.relpath(path)), path, key=lambda p: len(str(p)))


def _remove_empty(folder: Path) -> None:
    """A folder in which nothing was written, and those above it as far as outputs/."""
    with contextlib.suppress(OSError):
        folder.rmdir()
        for above in folder.parents:
            if OUTPUTS.resolve() in (above.resolve(), *above.resolve().parents):
                above.rmdir()


def _note(folder: Path, name: str, text: str) -> None:
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text + "\n")


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The config as plain values, everything resolved."""
    return OmegaConf.to_container(cfg, resolve=True)


def settle(cfg: DictConfig, folder: Path) -> DictConfig:
    """The config that this folder runs: the stored one decides what a resumed run may not change.

    Rank 0 trains or finds the runs it stands on, and writes config.yaml; the other ranks wait for it.
    """
    path = folder / "config.yaml"
    if rank() != 0:
        while not path.exists():
            time.sleep(0.05)
    if path.exists():
        stored = OmegaConf.load(path)
        if "first_stage" in cfg.model and cfg.model.first_stage.run in ("auto", stored.model.first_stage.run):
            cfg.model.first_stage = stored.model.first_stage
        _same(cfg, stored, folder)
        return cfg
    if "first_stage" in cfg.model:
        adopt(cfg, folder)
    from atelier.callbacks.store import write_text

    write_text(path, OmegaConf.to_yaml(OmegaConf.create(plain(cfg))))
    return cfg


def _same(cfg: DictConfig, stored: DictConfig, folder: Path) -> None:
    """A resumed run keeps its model, its data and its callbacks.

    Raises:
        UserError: the first key that differs.
    """
    new = cfg.copy()
    OmegaConf.set_struct(new, False)
    for key in FREE:
        new[key] = stored.get(key)  # what refers to it is free too: schedules follow the budget, which may grow
    for key, (old, now) in _differences(plain(stored), plain(new), "").items():
        top, _, rest = key.partition(".")
        if not (top == "data" and rest in FREE_DATA):
            key = key.removeprefix("choices.")
            raise UserError(key, now, f"the run in {folder} was started with {old}", f"{key}={old} or run_dir=NEW")


def _differences(old: Any, new: Any, prefix: str) -> dict[str, tuple[Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        found = {}
        for key in [*old, *(k for k in new if k not in old)]:
            name = f"{prefix}.{key}" if prefix else str(key)
            found |= _differences(old.get(key), new.get(key), name)
        return found
    return {} if old == new else {prefix: (old, new)}


def check_metrics(cfg: DictConfig) -> None:
    """Refuse metrics whose weights are missing, before anything is trained."""
    instantiate(cfg.metrics, _convert_="all").check()


def build_callbacks(cfg: DictConfig) -> Callbacks:
    from atelier.callbacks.order import Callbacks

    return Callbacks(instantiate(cfg.callbacks, _convert_="all"))


@contextlib.contextmanager
def logging(cfg: DictConfig) -> Iterator[list[Logger]]:
    """The loggers of a config, which are rank 0's business; they end with the job, whether it failed or not."""
    made: list[Logger] = []
    failed = True
    try:
        if rank() == 0:
            made = _loggers(cfg)
        yield made
        failed = False
    finally:
        for logger in made:
            logger.finish(failed)


def _loggers(cfg: DictConfig) -> list[Logger]:
    node = cfg.logger.copy()
    if "described" in node:
        node.described = described(cfg)
    if "group" in node and node.group is None and HydraConfig.get().mode == RunMode.MULTIRUN:
        node.group = Path(cfg.run_dir).parent.name
    return instantiate(node, _convert_="all", _recursive_=False)  # what is described is not built


def described(cfg: DictConfig) -> dict[str, Any]:
    """A run's config as a logger shows it: the pages' names to filter by, and every setting."""
    every = plain(OmegaConf.masked_copy(cfg, [key for key in cfg if key != "logger"]))
    return {**every["choices"], "seed": every["seed"], "settings": {key: every[key] for key in SETTINGS}}


def build_trainer(cfg: DictConfig, model: Generator, callbacks: Callbacks, loggers: list[Logger]) -> Trainer:
    """Lightning's Trainer; evaluations come every so many batches of the clock.

    Raises:
        UserError: an evaluation would come more often than batches.
    """
    every = cfg.eval.every_images // cfg.data.batch_size
    if every < 1:
        problem = f"less than one batch of {cfg.data.batch_size}"
        raise UserError("eval.every_images", cfg.eval.every_images, problem, f"eval.every_images={cfg.data.batch_size}")
    given = {"model": model, "callbacks": list(callbacks), "loggers": loggers, "evaluate_every": every}
    return instantiate(cfg.trainer, _convert_="all")(**given)


def same_ground(cfg: DictConfig, folder: Path, data: DataModule) -> None:
    """A run goes on with the images it was started on; with another number of ranks it says what that changes.

    Raises:
        UserError: the images are others.
    """
    path = folder / "ground.json"
    now = {"data": data.fingerprint("train"), "ranks": cfg.trainer.devices * cfg.trainer.num_nodes}
    if rank() != 0:
        return
    if not path.exists():
        path.write_text(json.dumps(now))
    before = json.loads(path.read_text())
    if before["data"] != now["data"]:
        problem = f"the run in {shorter(folder)} was started on other images"
        raise UserError("data", cfg.choices.data, problem, "run_dir=ANOTHER_FOLDER")
    if before["ranks"] != now["ranks"]:
        print(f"started on {before['ranks']} ranks, now {now['ranks']}: same images, other noise", flush=True)


def build_data(cfg: DictConfig) -> DataModule:
    return instantiate(cfg.data, _convert_="all")


def build_model(cfg: DictConfig, folder: Path) -> Generator:
    """The model of a config; a first stage comes from the copy in the run folder."""
    node = cfg.model.copy()
    OmegaConf.set_struct(node, False)
    if "first_stage" not in node:
        return instantiate(node, _convert_="all")
    first = OmegaConf.to_container(node.pop("first_stage"))
    net = frozen_net(folder / "frozen" / "first_stage", first["sha256"])
    return instantiate(node, _convert_="all", _partial_=True)(first_stage=net)


def stored_config(folder: Path) -> DictConfig:
    """The config of a run folder, which may call only what a page may.

    Raises:
        UserError: it calls something else.
    """
    cfg = OmegaConf.load(folder / "config.yaml")
    preflight.targets(cfg)
    return cfg


def frozen_net(folder: Path, expected: str) -> nn.Module:
    """The `net` of a finished run, with its final weights.

    Raises:
        UserError: the weights are not those that the run was trained on.
    """
    from safetensors.torch import load_file

    from atelier.callbacks.store import sha256

    path = folder / "weights.safetensors"
    if not path.exists() or sha256(path) != expected:
        problem = "these are not the weights that this run stands on"
        fix = f"put back the file with sha256 {expected[:12]}..., or retrain"
        raise UserError("model.first_stage", path, problem, fix)
    model = build_model(stored_config(folder), folder)
    model.load_state_dict(load_file(path))
    return model.net


def adopt(cfg: DictConfig, folder: Path) -> None:
    """Find or train the first stage, link it into frozen/, and note its hash in the config."""
    from atelier.callbacks.store import sha256

    first = cfg.model.first_stage
    source = Path(first.run) if first.run != "auto" else require(first.experiment, cfg)
    weights = source / "weights.safetensors"
    if not weights.exists():
        raise UserError("model.first_stage.run", source, "no finished run lies there", "model.first_stage.run=auto")
    stored = OmegaConf.load(source / "config.yaml")
    for key in ("image_size", "channels"):
        if stored.data[key] != cfg.data[key]:
            problem = f"it was trained on data.{key}={stored.data[key]}, this is data.{key}={cfg.data[key]}"
            raise UserError("model.first_stage.run", source, problem, "model.first_stage.run=auto")
    target = folder / "frozen" / "first_stage"
    target.mkdir(parents=True, exist_ok=True)
    for name in ("config.yaml", "weights.safetensors"):
        (target / name).unlink(missing_ok=True)
        try:
            os.link(source / name, target / name)
        except OSError:  # another disk
            (target / name).write_bytes((source / name).read_bytes())
    OmegaConf.set_struct(first, False)
    first.run, first.sha256 = str(source), sha256(weights)


def require(experiment: str, cfg: DictConfig) -> Path:
    """The newest finished run of an experiment on the same data; trained now, in its own process, if there is none."""
    finished = [f for f in all_runs() if _is(f, experiment, cfg) and (f / "weights.safetensors").exists()]
    if finished:
        print(f"first stage: {finished[-1]}", flush=True)
        return finished[-1]
    page = ROOT / "conf" / "experiment" / f"{experiment}.yaml"
    if not page.exists():
        raise UserError("model.first_stage.experiment", experiment, "no such page in conf/experiment", "see conf/")
    takes = headline(page)
    print(f"first stage: training experiment={experiment} now ({takes})", flush=True)
    run_dir = OUTPUTS / experiment / stamp()
    command = [sys.executable, str(ROOT / "train.py"), f"experiment={experiment}", f"run_dir={run_dir}"]
    command += [f"data={cfg.choices.data}", f"seed={cfg.seed}"]
    command += [f"data.{key}={cfg.data[key]}" for key in ("image_size", "channels", "root") if key in cfg.data]
    environment = {k: v for k, v in os.environ.items() if k not in RANKS and not k.startswith("TORCHELASTIC_")}
    if subprocess.run(command, env=environment).returncode:
        raise UserError("model.first_stage.experiment", experiment, "its training failed", " ".join(command[1:]))
    return run_dir


def _is(folder: Path, experiment: str, cfg: DictConfig) -> bool:
    stored = OmegaConf.load(folder / "config.yaml")
    same = all(stored.data.get(k) == cfg.data.get(k) for k in ("_target_", "image_size", "channels", "root"))
    return stored.choices.experiment == experiment and same


def all_runs() -> list[Path]:
    """Run folders under outputs/, oldest first."""
    found = [path.parent for path in OUTPUTS.rglob("config.yaml") if not {"frozen", "wandb"} & set(path.parts)]
    return sorted(found, key=lambda f: (f / "config.yaml").stat().st_mtime)


def find(run: str) -> Path:
    """A run folder by path, or `last` for the newest that has a checkpoint.

    Raises:
        UserError: there is none.
    """
    if run == "last":
        runs = [f for f in all_runs() if list((f / "checkpoints").glob("*.ckpt"))]
        if not runs:
            raise UserError("run", run, "no run with a checkpoint under outputs/", "python train.py")
        return runs[-1]
    folder = Path(run)
    if not (folder / "config.yaml").exists():
        beside = [str(path.parent) for path in folder.parent.glob("*/config.yaml")]
        close = nearest(run, [*beside, *map(str, all_runs())]) or "last"
        raise UserError("run", run, "no run folder (it has no config.yaml)", f"run={close}")
    return folder


@dataclass
class Loaded:
    """A run brought back: its config, data and model in eval mode, and how long it had trained."""

    folder: Path
    cfg: DictConfig
    data: DataModule
    model: Generator
    images_seen: int
    ema: list[int]  # half-life of the averaged weights, in images; [] for the raw ones


def load(folder: Path, ema: bool) -> Loaded:
    """The newest whole checkpoint of a run, with the averaged weights (ema) or the raw ones."""
    from atelier.callbacks.ema import copy_average
    from atelier.callbacks.store import load as load_checkpoint
    from atelier.callbacks.store import newest

    cfg = stored_config(folder)
    path = newest(folder / "checkpoints")
    if path is None:
        raise UserError("run", folder, "it has no checkpoint yet", "run=last")
    checkpoint = load_checkpoint(path)
    data, model = build_data(cfg), build_model(cfg, folder)
    model.load_state_dict(checkpoint["state_dict"])
    averages = checkpoint["callbacks"]["EMA"]["nets"]
    first = list(averages)[: int(ema)]
    for half_life in first:
        copy_average(model, averages[half_life])
    images_seen = checkpoint["callbacks"]["Clock"]["images_seen"]
    return Loaded(folder, cfg, data, model.eval(), images_seen, [int(half_life) for half_life in first])


def summary(folder: Path) -> dict[str, Any]:
    """summary.json, its nulls as nan; without metrics where no evaluation was made."""
    path = folder / "summary.json"
    told = json.loads(path.read_text()) if path.exists() else {"metrics": {}, "protocol": {}}
    return told | {"metrics": {name: math.nan if v is None else v for name, v in told["metrics"].items()}}


def options(cfg: DictConfig, model: Generator, maker: Callable) -> dict[str, Any]:
    """The options of a model's method that the user gave.

    Raises:
        UserError: the method does not take one, or it would change nothing.
    """
    given = [name for name in ("sampler", "guidance") if cfg.get(name) is not None]
    for name in given:
        value = HydraConfig.get().runtime.choices.get(name, cfg[name])
        if name not in inspect.signature(maker).parameters:
            raise UserError(name, value, f"{type(model).__name__} takes no {name} here", f"leave {name} out")
        if name == "guidance" and not model.needs:
            raise UserError(name, value, "the model was trained without conditions", f"leave {name} out")
    return {name: instantiate(cfg[name], _convert_="all") if name == "sampler" else float(cfg[name]) for name in given}


def build_judging(cfg: DictConfig) -> Judging:
    return instantiate(cfg.judging, _convert_="all")


def command(work: Callable[[DictConfig], None], cfg: DictConfig) -> None:
    """Do what sample.py and evaluate.py do; a user's mistake is one line."""
    try:
        check_words(list(HydraConfig.get().overrides.task))
        work(cfg)
    except Exception as error:
        known = user_error(error)
        if known is None:
            raise
        report(known)
        sys.exit(2)
