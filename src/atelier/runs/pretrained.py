"""The finished runs that a run stands on: found or trained, linked into its folder, hashed.

A part is an argument of the model whose annotation is a contract of `nets/contracts.py`; in the config it is a section
with a `run`, and an `experiment` where it can be trained. A model may have several.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import nn

from atelier.checkpoints import forms
from atelier.core import stopping
from atelier.core.classifier import GuidingClassifier
from atelier.core.errors import UserError, within
from atelier.core.lines import duration, say
from atelier.core.words import typed_value
from atelier.nets.contracts import TextEncoder
from atelier.runs import build, folders, ground, preflight, published, trying
from atelier.runs.pages import key_of, members, task_words

ROOT = Path(__file__).parents[3]
PASSED_ON = ("debug", "trainer", "metrics", "logger", "data")  # what was typed of these, a part's training gets too
SIGN_EVERY = 60.0  # seconds between the signs of life that the other ranks wait for
STOPPED = [*stopping.CODES, *(-number for number in stopping.SIGNALS)]
RANKS = (
    "LOCAL_RANK RANK GROUP_RANK ROLE_RANK NODE_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_WORLD_SIZE ROLE_WORLD_SIZE"
    " MASTER_ADDR MASTER_PORT SLURM_STEP_ID SLURM_STEP_NUM_TASKS SLURM_PROCID PL_GLOBAL_SEED WANDB_MODE WANDB_RUN_ID"
    " ATELIER_MEETING HYDRA_FULL_ERROR"
).split()


@dataclass
class Plan:
    """A run as `python train.py words` would make it now."""

    words: list[str]
    cfg: DictConfig
    reads: bool = True  # whether images are compared, for which all are read; else they are taken for the same

    @functools.cached_property
    def alike(self) -> list[Path]:
        """Runs of the same recipe, net, budget and images, oldest first; looked for once, since all images are read."""
        idle = build.data_fields(self.cfg, "NOT_PART")
        wanted = self.identity(idle)
        alike = [folder for folder in folders.all_runs() if _stored_identity(folder, idle) == wanted]
        if not alike or not self.reads:
            return alike
        data = build.data(self.cfg)
        data.prepare_data()
        images = data.fingerprint("train")
        return [folder for folder in alike if _grounds(folder) == {images}]

    def identity(self, idle: set[str]) -> dict[str, Any]:
        """What decides what comes out of it and of what it stands on; `idle`: fields of the set that do not."""
        below = _below(self.cfg, lambda name: plan(name, self.cfg).identity(idle))
        return _identity(self.cfg, idle, below)

    @property
    def name(self) -> str:
        """The page that was chosen: `experiment=shapes_vae` or `model=vae`."""
        return self.words[0]


def link_pretrained(cfg: DictConfig, folder: Path) -> None:
    """Find or train each part, link it into frozen/, and note its hash in the config.

    What a part cannot serve is refused before anything is trained.

    Raises:
        UserError: there is none, its training failed, or the model cannot stand on it.
    """
    base = None if cfg.start_from is None else preflight.beginning(cfg.start_from)
    of_base = [name for name in build.parts(cfg) if base is not None and as_in_base(name, cfg, base)]
    plans = {name: plan(name, cfg) for name in build.parts(cfg) if build.section(cfg, name).run == "auto"}
    found = {name: finished(one) for name, one in plans.items()}
    if missing := [name for name, run in found.items() if run is None]:
        _try_untrained(cfg, {name: plans[name] for name in missing})
    for name in build.parts(cfg):
        if name in plans:
            source = found[name] or _train(name, plans[name], folder / "lock")
        else:
            source = published.folder(name, cfg)
        fix = "start_from=A run on such images" if name in of_base else f"model.{name}.run=auto"
        _take(name, source, cfg, folder, fix)
    if base is not None and cfg.get("lora") is not None:
        refuse_other_parts(cfg, build.stored_config(base), base)
        _refuse_other_levels(cfg, build.stored_config(base), base)
        shutil.rmtree(folder / "frozen" / build.BASE, ignore_errors=True)
        _link(base, folder / "frozen" / build.BASE, with_parts=False)
        OmegaConf.set_struct(cfg, False)
        cfg.base_sha256 = forms.digest(base)


def as_in_base(name: str, cfg: DictConfig, base: Path) -> bool:
    """Where nobody says which, a part is that of the run that this one begins with; gives whether it is."""
    part, theirs = build.section(cfg, name), base / "frozen" / name
    if part.run != "auto" or forms.form(theirs) is None:
        return False
    part.run = str(theirs)
    return True


def _refuse_other_levels(cfg: DictConfig, stored: DictConfig, base: Path) -> None:
    """Refuse adapters that would learn another answer, or at other noise levels, than the net that they are of gives.

    Raises:
        UserError: they would.
    """
    for key in ("target", "schedule"):
        own, theirs = (build.plain(one.model.objective[key]) for one in (cfg, stored))
        if own == theirs:
            continue
        now, then = (one["_target_"].rpartition(".")[2] for one in (own, theirs))
        place = f"model.objective.{key}"
        problem = f"the net of {folders.shorter(base)} was trained with {then}, or with other numbers of it"
        raise UserError(place, now, problem, f"{key}@{place}=PAGE and its numbers as there")


def refuse_other_parts(cfg: DictConfig, stored: DictConfig, folder: Path) -> None:
    """Refuse to begin with the weights of a run, in `folder`, that stands on other parts than this config's.

    Raises:
        UserError: it does.
    """
    own, theirs = (
        {name: build.section(one, name).get("sha256", "") for name in build.parts(one)} for one in (cfg, stored)
    )
    if own.keys() == theirs.keys() and own != theirs:
        name = next(name for name in own if own[name] != theirs[name])
        problem = f"it stands on another {name}, whose numbers mean something else"
        raise UserError("start_from", folder, problem, f"model.{name}.run={build.section(stored, name).run}")


def _take(name: str, source: Path, cfg: DictConfig, folder: Path, fix: str) -> None:
    """Link a finished run, or what is published, as a part, and note where it came from; `fix` where images differ."""
    refuse_unfit(name, source, cfg, fix)
    part = build.section(cfg, name)
    target = folder / "frozen" / name
    shutil.rmtree(target, ignore_errors=True)
    _link(source, target)
    OmegaConf.set_struct(part, False)
    part.run, part.sha256 = str(source) if part.run == "auto" else part.run, forms.digest(source)
    say(f"{name}: {folders.shorter(source)}{published.of_variant(source)}{_reached(source)}")


def refuse_unfit(name: str, source: Path, cfg: DictConfig, fix: str) -> None:
    """Refuse a folder as a part by its config, before any weights are read; `fix` where images differ.

    Raises:
        UserError: nothing lies there, or it is of other images, another page or other noise levels.
    """
    part = build.section(cfg, name)
    with within(f"model.{name}"):
        names = forms.form(source)
    if names is None:
        another = f"model.{name}.run={'auto' if part.get('experiment') else 'FOLDER'}"
        raise UserError(f"model.{name}.run", source, "no finished run lies there", another)
    contract = build.contract(cfg, name)
    if names == forms.OURS and contract is not TextEncoder:  # which no image reaches
        trained = build.stored_config(source).data
        build.same_images(f"model.{name}.run", source, trained, cfg.data, fix, labels=contract is GuidingClassifier)
    if names == forms.DIFFUSERS:
        published.check(name, cfg, source)


def _reached(source: Path) -> str:
    """What the run came to, in a few words; nothing where it was never judged."""
    summary = folders.summary(source)
    best = [f"{key} {value:.4g}" for key, value in summary["metrics"].items() if key.startswith(("recon/", "pair/"))]
    seen = [f"{summary['images_seen']:,} images"] if "images_seen" in summary else []
    return f" ({', '.join([*seen, *best[:3]])})" if seen or best else ""


def _link(source: Path, target: Path, with_parts: bool = True) -> None:
    """Hard links, or copies on another disk, so that the run above outlives the one it stands on.

    What that one stands on itself comes with it: its own config has the hash of each.
    """
    target.mkdir(parents=True)
    begun_on = {ground.FILE: source / ground.FILE} if (source / ground.FILE).exists() else {}
    for name, path in (forms.files(source) | begun_on).items():
        try:
            os.link(path.resolve(), target / name)
        except OSError:  # another disk
            (target / name).write_bytes(path.read_bytes())
    for below in source.glob("frozen/*") if with_parts else ():
        _link(below, target / "frozen" / below.name)


def _try_untrained(cfg: DictConfig, plans: dict[str, Plan]) -> None:
    """Build the model on untrained parts, so that what does not fit is an error now and not after hours.

    Parts that exist already are looked at when they are linked.
    """
    if set(plans) != set(build.parts(cfg)):
        return
    nets = {name: untrained(one) for name, one in plans.items()}
    preflight.match(build.on_parts(cfg, nets), build.data(cfg))


def untrained(one: Plan) -> nn.Module:
    """What a planned run would lend, before anything is trained."""
    return build.untrained_part(one.cfg, _untrained_parts(one))


def _untrained_parts(one: Plan) -> dict[str, nn.Module]:
    return {name: untrained(plan(name, one.cfg)) for name in build.parts(one.cfg)}


# ---- what would be trained


def plan(name: str, cfg: DictConfig) -> Plan:
    """The run that the part `name` of a config is, were it trained now.

    It has the recipe of `experiment`, the images of this config, and what was typed of `PASSED_ON`. One node
    trains it, whatever this run has: the other nodes know nothing of it.

    Raises:
        UserError: there is no such experiment.
    """
    part = build.section(cfg, name)
    page = ROOT / "conf" / "experiment" / f"{part.experiment}.yaml"
    if not page.exists():
        raise UserError(f"model.{name}.experiment", part.experiment, "no such page in conf/experiment", "see conf/")
    typed = [word for word in task_words() if key_of(word).split(".")[0] in PASSED_ON]
    words = [_recipe(page, cfg.choices.data)[1], f"data={cfg.choices.data}"]
    words += [word for word in typed if key_of(word) not in ("data", *(f"data.{key}" for key in cfg.data))]
    images = part.get("images")
    words += [f"seed={cfg.seed}", *([] if images is None else [f"budget.images={images}"])]
    composed = build.composed(words)
    own = build.plain(composed.data)
    asked, recipe = {key_of(word) for word in typed}, build.data_fields(cfg, "OWN")
    for key, value in build.plain(cfg.data).items():
        if f"data.{key}" in asked or (key not in recipe and value != own.get(key)):
            words.append(f"data.{key}={typed_value(value)}")
    words += ["trainer.num_nodes=1"] * (composed.trainer.num_nodes != 1)
    words += [f"budget.until={cfg.budget.until}"] if cfg.budget.get("until") else []
    return Plan(words, build.composed(words))


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


# ---- what has been trained


def finished(plan: Plan) -> Path | None:
    """The newest run that ended as `plan` would."""
    same = [folder for folder in plan.alike if (folder / "weights.safetensors").exists()]
    budget, batch = plan.cfg.budget.images, plan.cfg.data.batch_size
    same = [folder for folder in same if folders.summary(folder).get("images_seen", budget) < budget + batch]
    return same[-1] if same else None


def _unfinished(plan: Plan) -> Path | None:
    """The newest run that `plan` can go on with: begun, with a checkpoint, and held by nobody."""
    begun = [f for f in plan.alike if not (f / "weights.safetensors").exists() and folders.has_checkpoint(f)]
    alike = [f for f in begun if _begins_as(build.stored_config(f), plan.cfg)]
    return next((folder for folder in reversed(alike) if not folders.is_running(folder)), None)


def _begins_as(stored: DictConfig, cfg: DictConfig) -> bool:
    """Whether a resumed run may have this config: also of the same seed, of the same pages."""
    if "choices" in stored:
        stored.choices.setdefault("lora", None)  # runs from before there were these keys
    stored.data = OmegaConf.merge(dict.fromkeys(cfg.data), stored.data)
    return all(stored.get(key) == cfg.get(key) for key in ("seed", "choices", "data", "channels_last"))


def _identity(cfg: DictConfig, idle: set[str], below: dict[str, Any]) -> dict[str, Any]:
    """What of a config decides what comes out of it, but for the seed and the files themselves.

    Args:
        idle: fields of the set that do not.
        below: identity of each run that it stands on.
    """
    values = build.plain(cfg)
    data = {key: value for key, value in values["data"].items() if key not in idle}
    return {
        "model": _on_identities(values["model"], below),
        "data": data,
        "images": values["budget"]["images"],
        "start_from": values.get("start_from"),
        "lora": values.get("lora"),
        "ema": values["callbacks"]["ema"],
    }


def _below(cfg: DictConfig, identity: Callable[[str], dict[str, Any] | None]) -> dict[str, Any]:
    """What each part is: a run by its `identity`, what is published by its place."""
    sections = {name: build.section(cfg, name) for name in build.parts(cfg)}
    return {name: identity(name) if "experiment" in one else {"run": one.run} for name, one in sections.items()}


def _on_identities(model: dict[str, Any], below: dict[str, Any]) -> dict[str, Any]:
    """The values of a model, in which each part is the identity of its run."""
    found = dict(model)
    for name, identity in below.items():
        owner, _, inner = name.partition(".")
        found[owner] = _on_identities(found[owner], {inner: identity}) if inner else identity
    return found


def _stored_identity(folder: Path, idle: set[str]) -> dict[str, Any] | None:
    """That of a run folder, or of a copy in one; None where it is none of ours."""
    if not (folder / "config.yaml").exists():
        return None
    cfg = build.stored_config(folder)
    below = _below(cfg, lambda name: _stored_identity(folder / "frozen" / name, idle))
    return _identity(cfg, idle, below)


def _grounds(folder: Path) -> set[str | None]:
    """The fingerprints of the images that a run, and what it stands on, were trained on; None: not known."""
    runs = [folder, *(path.parent for path in folder.glob("frozen/**/config.yaml"))]
    return {ground.images(run) for run in runs}


# ---- training


def _train(name: str, plan: Plan, lock: Path) -> Path:
    """Train a part in a process of its own, or go on with one that was stopped; gives its folder.

    Raises:
        UserError: it failed.
        SystemExit: this process was asked to stop; where the other has saved something, a note says so.
    """
    begun = _unfinished(plan)
    run_dir = begun or _new_folder(folders.OUTPUTS / f"{plan.cfg.choices.data}_{plan.cfg.choices.model}")
    images = f"{plan.cfg.budget.images:,} images"
    if begun:
        what = f"going on with {run_dir} ({images} in all)"
    else:
        time = duration(trying.seconds(plan.cfg, _untrained_parts(plan)))
        what = f"none is finished, so {plan.name} is trained first, {images}, about {time} on this device"
    yours = f"model.{name}.run=DIR takes one of yours, model.{name}.images=N another budget"
    say(f"{name}: {what}; {yours}{_offered(name)}")
    command = [sys.executable, str(ROOT / "train.py"), *plan.words, f"run_dir={typed_value(str(run_dir))}"]
    try:
        code = _run(command, lock)
        if code == 128 + signal.SIGUSR1 and plan.cfg.budget.get("until"):
            stopping.leave(signal.SIGUSR1)  # the job ends for both
    except SystemExit as leaving:
        if folders.has_checkpoint(run_dir):
            leaving.add_note(f"{name}: what {run_dir} has learnt is saved, the same command goes on with it")
        raise
    if code in STOPPED:
        problem = f"the training of {plan.name} was stopped"
        raise UserError(f"model.{name}.run", "auto", problem, "the same command goes on with it")
    if code == -signal.SIGKILL:
        problem = f"the training of {plan.name} was killed; memory may have run out"
        raise UserError(f"model.{name}.run", "auto", problem, "the same command goes on with it")
    if code:
        problem = f"the training of {plan.name} failed, see above"
        raise UserError(f"model.{name}.run", "auto", problem, shlex.join(["python", "train.py", *plan.words]))
    return run_dir


def _offered(name: str) -> str:
    """What is published and could be taken instead, as it is typed; "" where the part's page knows of nothing."""
    word = f"{name}@model.{name}"
    if word not in HydraConfig.get().runtime.choices:
        return ""
    others = [page for page in members(name) if page != "own"]
    return f", {word}={'|'.join(others)} a pretrained one"


def _new_folder(group: Path) -> Path:
    """The time of this command, and a number where another job of it has that folder."""
    names = (f"{folders.stamp()}{end}" for end in ("", *(f"_{k}" for k in range(2, 1000))))
    return next(group / name for name in names if not (group / name).exists())


def _run(command: list[str], lock: Path) -> int:
    """The exit code of a command that knows nothing of this one's ranks; `lock` is touched as long as it runs.

    Signals to this process are handed on, once each, and end both.
    """
    environment = {k: v for k, v in os.environ.items() if k not in RANKS and not k.startswith("TORCHELASTIC_")}
    with _handed_on() as (asked, begun), subprocess.Popen(command, env=environment, start_new_session=True) as process:
        begun.append(process)
        if asked:  # while it was started
            process.terminate()
        while True:
            try:
                code = process.wait(SIGN_EVERY)
                break
            except subprocess.TimeoutExpired:
                with contextlib.suppress(OSError):
                    os.utime(lock)  # opened and closed again, it would be unlocked
    if asked:
        stopping.leave(asked[0])
    return code


@contextlib.contextmanager
def _handed_on() -> Iterator[tuple[list[int], list[subprocess.Popen]]]:
    """The signals that came inside, in order, and a list for the process that has begun.

    The first signal asks that one to save and end, a second Ctrl-C ends it.
    """
    asked: list[int] = []
    begun: list[subprocess.Popen] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        if stopping.echo():
            return
        if asked and number == signal.SIGINT:
            for process in begun:
                process.kill()
        elif not asked:
            stopping.promise(number)
            for process in begun:
                process.terminate()
        asked.append(number)

    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    stopping.listen(hand_on)
    try:
        yield asked, begun
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
