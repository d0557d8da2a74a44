"""The finished runs that other runs stand on: found or trained, and linked into the folder of the run above."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from atelier import runs
from atelier.command_line import headline
from atelier.errors import UserError

ROOT = Path(__file__).parents[2]
FORMS = {  # what describes a first stage in its folder, and its weights beside it: a run of ours, or diffusers' folder
    "config.yaml": "weights.safetensors",
    "config.json": "diffusion_pytorch_model.safetensors",
}
GIVEN = ("image_size", "channels", "root", "task", "factor", "resize")  # of the data, to the run that it stands on
SIGN_EVERY = 60.0  # seconds between the signs of life that the other ranks wait for
RANKS = (
    "LOCAL_RANK RANK GROUP_RANK ROLE_RANK NODE_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_WORLD_SIZE ROLE_WORLD_SIZE"
    " MASTER_ADDR MASTER_PORT SLURM_STEP_ID SLURM_STEP_NUM_TASKS SLURM_PROCID PL_GLOBAL_SEED WANDB_MODE WANDB_RUN_ID"
    " HYDRA_FULL_ERROR"
).split()


def adopt(cfg: DictConfig, folder: Path) -> None:
    """Find or train the first stage, link it into frozen/, and note its hash in the config.

    Raises:
        UserError: there is none, or it was trained on images of another size.
    """
    from atelier.callbacks.store import sha256

    first = cfg.model.first_stage
    source = Path(first.run) if first.run != "auto" else require(first.experiment, cfg, folder / "lock")
    files = next((pair for pair in FORMS.items() if all((source / name).exists() for name in pair)), None)
    if files is None:
        raise UserError("model.first_stage.run", source, "no finished run lies there", "model.first_stage.run=auto")
    _check_images(source, OmegaConf.load(source / files[0]).get("data", {}), cfg)
    _link(source, files, folder / "frozen" / "first_stage")
    OmegaConf.set_struct(first, False)
    first.run, first.sha256 = str(source), sha256(source / files[1])


def _check_images(source: Path, trained: DictConfig, cfg: DictConfig) -> None:
    """The `data` section of the first stage, where it has one, is of images as large as these."""
    for key in ("image_size", "channels"):
        if key in trained and trained[key] != cfg.data[key]:
            problem = f"it was trained on data.{key}={trained[key]}, this is data.{key}={cfg.data[key]}"
            raise UserError("model.first_stage.run", source, problem, "model.first_stage.run=auto")


def _link(source: Path, files: tuple[str, str], target: Path) -> None:
    """Hard links, or copies on another disk, so that the run above outlives the one it stands on."""
    target.mkdir(parents=True, exist_ok=True)
    for stale in target.iterdir():
        stale.unlink()
    for name in files:
        try:
            os.link(source / name, target / name)
        except OSError:  # another disk
            (target / name).write_bytes((source / name).read_bytes())


def require(experiment: str, cfg: DictConfig, lock: Path) -> Path:
    """The newest finished run of an experiment on the same data; trained now, in its own process, if there is none.

    Args:
        lock: of the run that asks; touched while this takes.

    Raises:
        UserError: there is no such experiment, or its training failed.
    """
    page = ROOT / "conf" / "experiment" / f"{experiment}.yaml"
    if not page.exists():
        raise UserError("model.first_stage.experiment", experiment, "no such page in conf/experiment", "see conf/")
    page, words = _recipe(page, cfg.choices.data)
    finished = [f for f in runs.all_runs() if _is(f, page, cfg) and (f / "weights.safetensors").exists()]
    if finished:
        print(f"first stage: {finished[-1]}", flush=True)
        return finished[-1]
    print(f"first stage: training {words} now ({headline(page)})", flush=True)
    run_dir = runs.OUTPUTS / page.stem / runs.stamp()
    command = [sys.executable, str(ROOT / "train.py"), words, f"run_dir={run_dir}"]
    command += [f"data={cfg.choices.data}", f"seed={cfg.seed}"]
    given = {key: cfg.data[key] for key in GIVEN if key in cfg.data}
    command += [f"data.{key}={'null' if value is None else value}" for key, value in given.items()]
    command += [f"model.net.factor={cfg.data.factor}"] if "factor" in cfg.data else []
    if _run(command, lock):
        raise UserError("model.first_stage.experiment", experiment, "its training failed", " ".join(command[1:]))
    return run_dir


def _recipe(page: Path, data: str) -> tuple[Path, str]:
    """The page, and the word that chooses it, of an experiment's model on this set.

    An experiment of another set gives way to one of this set with the same model, the first by name, or else to the
    model's own page.
    """
    chosen = _chosen(page)
    if chosen.get("/data", data) == data:
        return page, f"experiment={page.stem}"
    asked = {"/data": data, "/model": chosen["/model"]}
    for other in sorted(page.parent.glob("*.yaml")):
        if asked.items() <= _chosen(other).items():
            return other, f"experiment={other.stem}"
    return page.parents[1] / "model" / f"{chosen['/model']}.yaml", f"model={chosen['/model']}"


def _chosen(page: Path) -> dict[str, str]:
    """Group -> page, as an experiment's defaults say."""
    entries = (entry for entry in OmegaConf.load(page).get("defaults", []) if isinstance(entry, DictConfig))
    return {name.removeprefix("override "): value for entry in entries for name, value in entry.items()}


def _is(folder: Path, page: Path, cfg: DictConfig) -> bool:
    """Whether a run was made by this page of an experiment or of a model, on this set."""
    stored = OmegaConf.load(folder / "config.yaml")
    same = all(stored.data.get(k) == cfg.data.get(k) for k in ("_target_", *GIVEN))
    own = (None, page.stem) if page.parent.name == "model" else (page.stem, stored.choices.model)
    return (stored.choices.experiment, stored.choices.model) == own and same


def _run(command: list[str], lock: Path) -> int:
    """The exit code of a command that knows nothing of this one's ranks; `lock` is touched as long as it runs."""
    environment = {k: v for k, v in os.environ.items() if k not in RANKS and not k.startswith("TORCHELASTIC_")}
    with subprocess.Popen(command, env=environment) as process:
        try:
            while True:
                try:
                    return process.wait(SIGN_EVERY)
                except subprocess.TimeoutExpired:
                    with contextlib.suppress(OSError):
                        os.utime(lock)  # opened and closed again, it would be unlocked
        except BaseException:
            process.terminate()  # it saves what it has
            raise
