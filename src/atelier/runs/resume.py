"""A run goes on as it was begun: what config and which images its folder was started on."""

from __future__ import annotations

import contextlib
import inspect
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from atelier.core.errors import RankGone, UserError
from atelier.core.launchers import rank
from atelier.core.lines import say
from atelier.runs import ground, meeting
from atelier.runs.build import data_fields, parts, plain, section, stored_config
from atelier.runs.folders import shorter
from atelier.runs.pretrained import link_pretrained

if TYPE_CHECKING:
    from atelier.data.base import DataModule

FREE = (
    "budget eval checkpoint metrics logger trainer run_dir resume check doctor objective compile accumulate "
    "latent_cache text_cache"
).split()


def reconcile_config(cfg: DictConfig, folder: Path) -> DictConfig:
    """The config that this folder runs: the stored one decides what a resumed run may not change.

    Rank 0 trains or finds the runs it stands on, and writes config.yaml; the other ranks wait for it.
    """
    path = folder / "config.yaml"
    if rank() != 0:
        _wait(path, folder / "lock", 60 * cfg.trainer.timeout_minutes)
    if path.exists():
        stored = stored_config(folder)
        for name in parts(cfg):
            _as_stored(section(cfg, name), section(stored, name))
        _begun_with(cfg, stored)
        _same(cfg, stored, folder)
        return cfg
    link_pretrained(cfg, folder)
    from atelier.checkpoints.store import write_text

    write_text(path, OmegaConf.to_yaml(OmegaConf.create(plain(cfg))))
    return cfg


def _begun_with(cfg: DictConfig, stored: DictConfig) -> None:
    """The run that this one began with is the same however it is written, and needed no more."""
    if cfg.start_from is not None and stored.get("start_from") is not None:
        typed = Path(cfg.start_from)
        if not typed.exists() or typed.resolve() == Path(stored.start_from).resolve():
            cfg.start_from = stored.start_from
    if "base_sha256" in stored:
        OmegaConf.set_struct(cfg, False)
        cfg.base_sha256 = stored.base_sha256


def _as_stored(part: DictConfig, stored: DictConfig | None) -> None:
    """`auto` is the run that was found when this one began, and a folder is the same however it is written."""
    if stored is not None and (part.run == "auto" or Path(part.run).resolve() == Path(stored.run).resolve()):
        OmegaConf.set_struct(part, False)
        part.run, part.sha256 = stored.run, stored.sha256
        if "checkpointing" in part:
            stored.setdefault("checkpointing", False)
        stored.setdefault("images", None)  # runs from before there were these keys; the codec's own are compared
        for key in ("scale", "shift", "n_measured"):
            if key in part:
                stored.setdefault(key, part[key])
        if "fetch" in part and "fetch" in stored:
            part.fetch = stored.fetch  # what was downloaded lies in the folder


def _wait(path: Path, lock: Path, patience: float) -> None:
    """Until rank 0 has written `path`; where that takes long it touches its `lock` on the way.

    Raises:
        UserError: what rank 0 has refused, or no sign of it for `patience` seconds.
    """
    heard, last = time.monotonic(), _touched(lock)
    while not path.exists():
        meeting.learn(0)
        if _touched(lock) != last:
            heard, last = time.monotonic(), _touched(lock)
        if time.monotonic() - heard > patience:
            problem = f"rank {rank()} saw no sign of rank 0 there for {patience / 60:g} minutes"
            raise RankGone("run_dir", path.parent, problem, "see its output; run_dir=FOLDER_THAT_ALL_RANKS_SEE")
        time.sleep(0.05)


def _touched(lock: Path) -> int | None:
    with contextlib.suppress(OSError):
        return lock.stat().st_mtime_ns
    return None


def _same(cfg: DictConfig, stored: DictConfig, folder: Path) -> None:
    """A resumed run keeps its model, its data and its callbacks.

    Raises:
        UserError: the first key that differs.
    """
    new, stored = cfg.copy(), stored.copy()
    OmegaConf.set_struct(new, False)
    stored.setdefault("channels_last", False)  # runs from before there were these keys
    stored.setdefault("frozen_precision", "32-true")
    stored.budget.setdefault("until", None)
    stored.eval.setdefault("raw", False)
    stored.eval.setdefault("n_diagnosed", None)
    for name in ("grids", "evaluation"):
        stored.callbacks[name].setdefault("raw", stored.eval.raw)
    stored.callbacks.evaluation.evaluator.setdefault("n_diagnosed", stored.eval.n_diagnosed)
    for key in FREE:
        new[key] = stored.get(key)  # what refers to it is free too: schedules follow the budget, which may grow
    free = {f"data.{name}" for name in data_fields(cfg, "MAY_CHANGE")}
    for key, (old, now) in _differences(plain(stored), plain(new), "").items():
        if key not in free:
            key = key.removeprefix("choices.")
            raise UserError(key, now, f"the run in {folder} was started with {old}", f"{key}={old} or run_dir=NEW")


def _differences(old: Any, new: Any, prefix: str) -> dict[str, tuple[Any, Any]]:
    """Key -> its value of then and of now; an argument that is new since then had its default."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = {}
        for key in [*old, *(k for k in new if k not in old)]:
            name = f"{prefix}.{key}" if prefix else str(key)
            then = old[key] if key in old else _default(new, key)
            found |= _differences(then, new.get(key), name)
        return found
    return {} if old == new else {prefix: (old, new)}


def _default(node: dict[str, Any], key: str) -> Any:
    """What an object takes for an argument that its config leaves out; None where it is no object or takes none."""
    if "_target_" not in node:
        return None
    taken = inspect.signature(get_object(node["_target_"])).parameters.get(key)
    return None if taken is None or taken.default is inspect.Parameter.empty else taken.default


def check_same_data(cfg: DictConfig, folder: Path, data: DataModule) -> None:
    """A run goes on with the images it was started on; with another number of ranks it says what that changes.

    What the set calls its labels and attributes is kept beside, for requests where the set is not.

    Raises:
        UserError: the images are others.
    """
    if rank() != 0:
        return
    path = folder / ground.FILE
    now = {"images": data.fingerprint("train"), "ranks": cfg.trainer.devices * cfg.trainer.num_nodes}
    now["names"] = asdict(data.names)
    if not path.exists():
        path.write_text(json.dumps(now))
    before = json.loads(path.read_text())
    if "images" not in before:  # a run from before sets were known by their content
        path.write_text(json.dumps(now))
    elif before["images"] != now["images"]:
        problem = f"the run in {shorter(folder)} was started on other images"
        raise UserError("data", cfg.choices.data, problem, "run_dir=ANOTHER_FOLDER")
    elif "names" not in before:
        path.write_text(json.dumps(before | {"names": now["names"]}))
    if before["ranks"] != now["ranks"]:
        say(f"started on {before['ranks']} ranks, now {now['ranks']}: same images, other noise")
