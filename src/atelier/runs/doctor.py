"""`doctor=true`: what this machine has and finds, and what the run that was asked for would take on it.

Some batches are trained on and forgotten. No folder is made, nothing is downloaded, cached or logged.
"""

from __future__ import annotations

import os
import textwrap
import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from torch import nn

from atelier.callbacks.memory import gigabytes
from atelier.callbacks.work import FITS, fitting, two_digits
from atelier.checkpoints import single_file
from atelier.core import machine, room
from atelier.core.errors import UserError, causes
from atelier.core.launchers import rank
from atelier.core.lines import duration, say
from atelier.data.base import DataModule
from atelier.data.file_images import threads
from atelier.data.finding import is_image
from atelier.data.reading import BadImage, read
from atelier.requests.files import MAX_PIXELS
from atelier.runs import build, folders, found, preflight, pretrained, published, trying
from atelier.runs.found import Rows
from atelier.runs.pages import task_words
from atelier.runs.report import described

COLUMNS, NAME, KEY = 100, 14, 32  # of a line, and of a name or a key at its left
HOUR = 3600.0
READ = 16  # files that are read to see how long one takes
LOOKED_AT = 20_000  # files and folders among which these are sought
SPLITS = {"train": "training", "test": "test"}
SMALLEST = 16  # width or pixels that are still worth a try


@dataclass
class Candidate:
    """A run that is to be tried: its command, its config, and its parts, trained or not."""

    title: str
    cfg: DictConfig
    parts: dict[str, nn.Module]
    told: Rows  # of each part, where it lies
    key: str  # of its budget, in the command that was typed; "" where it has none there


@dataclass
class Tried:
    """What some batches of a run have shown.

    Args:
        images: images of its budget.
        batch: images of a batch, over all ranks.
        ranks: processes that share a batch.
        seconds: seconds an image.
        gflop: GFLOP an image; None where they were not counted.
        plain: operations a second of a plain convolution in the number format of the run.
        memory: bytes that it takes; None where they are not known.
        free: bytes of memory that there are; None where the system does not say.
        disk: bytes that its checkpoints need.
        busy: whether other programs took their share of the cores.
    """

    images: int
    batch: int
    ranks: int
    seconds: float
    gflop: float | None
    plain: float
    memory: int | None
    free: int | None
    disk: float
    busy: bool = False

    @property
    def total(self) -> float:
        """Seconds of its budget, without judging."""
        return self.images * self.seconds


def examine(cfg: DictConfig) -> None:
    """Say all of it, section by section; rank 0 alone does.

    Raises:
        UserError: the run that is asked for cannot be made.
    """
    if rank() != 0:
        return
    device = found.the_device(cfg.trainer.accelerator)
    rates = machine.convolution_rates(device, found.SECONDS)
    section("this machine", found.of_machine(device, rates, cfg.trainer.precision, Path(cfg.run_dir)))
    section('optional parts, each by pip install -e ".[NAME]"', found.of_extras())
    section("published weights", found.of_weights())
    section("credentials", found.of_credentials())
    data = build.data(cfg)
    section("what the run finds", [("data", of_data(cfg, data)), ("metrics", of_metrics(cfg)), *left_out(cfg)])
    preflight.provided(build.family(cfg).needs, build.family(cfg), data)
    runs = to_try(cfg)
    if parts := [row for one in runs for row in one.told]:
        section("what it stands on", parts)
    tried = []
    for one in runs:
        tried.append(attempt(one, rates))
        show(of_trial(tried[-1]))
    total = sum(one.total for one in tried)
    if len(tried) > 1:
        section("together", [("time", f"about {duration(total)} without judging")])
    if total > FITS:
        budgets = {one.key: each for one, each in zip(runs, tried, strict=True) if one.key and each.total > FITS}
        section("where that is too long", advice(runs[-1], budgets, rates, device), KEY)


def section(title: str, rows: Rows, columns: int = NAME) -> None:
    """Print rows under a title, after a blank line."""
    say("\n".join(["", *textwrap.wrap(title, COLUMNS, subsequent_indent="  ")]))
    show(rows, columns)


def show(rows: Rows, columns: int = NAME) -> None:
    """Print a name in its columns and beside it a text, as wide as a page; a path that is longer stays whole."""
    for name, text in rows:
        first, others = f"  {name:<{columns - 1}} ", " " * (columns + 2)
        options = {"break_long_words": False, "break_on_hyphens": False}
        say(textwrap.fill(text, COLUMNS, initial_indent=first, subsequent_indent=others, **options))


# ---- what the run finds


def of_data(cfg: DictConfig, data: DataModule) -> str:
    """What of a set is there, or why it is not, and where it was looked for."""
    place = f" in {Path(cfg.data.root).expanduser().absolute()}" if "root" in cfg.data else ", drawn on the spot"
    try:
        counted = data.counted()
        images = " and ".join(f"{counted[split]:,} {name}" for split, name in SPLITS.items() if split in counted)
    except UserError as error:
        first = "the run downloads it first" if cfg.data.get("download") else error.fix
        return f"not there{place}: {error.problem}; {first}"
    return f"{type(data).__name__}{place}: {images} images"


def of_metrics(cfg: DictConfig) -> str:
    """Whether what judges the run finds its files."""
    try:
        build.metrics(cfg).check()
    except (UserError, InstantiationException) as error:  # of what lies in the suite, inside of Hydra's own
        known = next((cause for cause in causes(error) if isinstance(cause, UserError)), None)
        if known is None:
            raise
        known = known.at("metrics.lpips")
        return f"{known.key}={known.value}: {known.problem}; {known.fix}"
    return f"metrics={cfg.metrics.net}: nothing is missing"


def left_out(cfg: DictConfig) -> Rows:
    """What of a command is not tried."""
    told = {
        "compile": "compiling takes minutes, so the net is tried as it is",
        "latent_cache": "images are encoded in the trial; latents that are kept are faster",
        "text_cache": "texts are encoded in the trial; those that are kept are faster",
    }
    rows = [(key, text) for key, text in told.items() if cfg[key]]
    if (Path(cfg.run_dir) / "config.yaml").exists():
        rows.append(("run_dir", f"{cfg.run_dir} holds a run, with which this command goes on"))
    return rows


# ---- what is tried


def to_try(cfg: DictConfig) -> list[Candidate]:
    """The runs that would be trained first, as what this one stands on, and itself behind them.

    Raises:
        UserError: a part that is named is not there, or does not fit.
    """
    words = [word for word in task_words() if not word.startswith("doctor=")]
    return _with_those_below(cfg, " ".join(["python train.py", *words]), "budget.images")


def _with_those_below(cfg: DictConfig, title: str, key: str) -> list[Candidate]:
    below: list[Candidate] = []
    nets: dict[str, nn.Module] = {}
    told: Rows = []
    base = None if cfg.start_from is None else preflight.beginning(cfg.start_from)
    for part in build.parts(cfg):
        if base is not None:
            pretrained.as_in_base(part, cfg, base)
        node = build.section(cfg, part)
        plan = replace(pretrained.plan(part, cfg), reads=False) if node.run == "auto" else None
        source = named(part, cfg) if plan is None else pretrained.finished(plan)
        if source is None:
            first = f"first, for {part}: {' '.join(['python train.py', *plan.words])}"
            below += _with_those_below(plan.cfg, first, f"model.{part}.images" if key else "")
            nets[part] = pretrained.untrained(plan)
            where = folders.OUTPUTS.absolute()
            told.append((part, f"not there: no finished run of {plan.name} under {where}, so it is trained first"))
        else:
            pretrained.refuse_unfit(part, source, cfg, f"model.{part}.run=auto")
            nets[part] = build.part(source, None, cfg, node)
            told.append((part, f"there: {source}"))
    return [*below, Candidate(title, cfg, nets, told, key)]


def named(part: str, cfg: DictConfig) -> Path:
    """The folder of a part that the config names.

    Raises:
        UserError: it is not there, would be downloaded, or lies in a single file, which a run unpacks.
    """
    place = Path(build.section(cfg, part).run).expanduser()
    if any(path.suffix == single_file.SUFFIX and path.is_file() for path in (place, *place.parents)):
        problem = "a single file is unpacked when a run begins on it, and doctor writes nothing"
        raise UserError(f"model.{part}.run", place, problem, "doctor=false")
    offline = cfg.copy()
    fetched = [one for one in (build.section(offline, part), offline.model.get("net")) if "fetch" in (one or {})]
    asked = any(one.fetch for one in fetched)
    for one in fetched:
        one.fetch = False
    try:
        return published.folder(part, offline)
    except UserError as error:
        if asked:
            problem = "it is in no folder here and not in the cache of the hub, and doctor downloads nothing"
            raise UserError(error.key, error.value, problem, "doctor=false") from error
        raise


def attempt(run: Candidate, rates: dict[str, float]) -> Tried:
    """Some batches of a run, on one device, as training takes them; of several ranks, the share of one.

    Raises:
        UserError: its model cannot be made, or does not fit.
    """
    cfg, whole = trying.share_of_one(run.cfg), run.cfg.data.batch_size
    ranks = run.cfg.trainer.devices * run.cfg.trainer.num_nodes
    model, data = build.untaught(cfg, run.parts), build.data(cfg)
    grows = [("grows", "at its full size; it begins small and takes less time")] if model.to_full_size() else []
    section(run.title, [("model", described(model, data, cfg.choices.model)), *grows, *of_reading(cfg)])
    work, trial = trying.some_batches(cfg, model, data, lambda line: show([("too little", line)]))
    seconds, images = trial.seconds_per_batch / whole, cfg.budget.images
    if cfg.budget.minutes is not None:
        images = min(images, int(60 * cfg.budget.minutes / seconds))
    disk = preflight.checkpoint_bytes(model, len(cfg.callbacks.ema.half_lives))
    device = found.the_device(cfg.trainer.accelerator)
    plain = rates["float32" if found.resolved(cfg.trainer.precision, device.type == "cuda") == "32-true" else "bf16"]
    free = room.there(device)
    needed, busy = work.memory.needed, machine.busy() is not None
    return Tried(images, whole, ranks, seconds, work.gflop_per_image, plain, needed, free, disk, busy)


def of_trial(tried: Tried) -> Rows:
    """What a trial has shown."""
    took = two_digits(tried.seconds * tried.batch)
    step = f"{tried.batch} images in {took} s, {two_digits(1 / tried.seconds)} images/s"
    if tried.gflop is not None:
        share = tried.gflop * 1e9 / tried.seconds / tried.ranks / tried.plain
        step += f"; {two_digits(tried.gflop)} GFLOP an image, {100 * share:.0f} % as fast as that convolution"
    if tried.ranks > 1:
        step += f"; a share of 1/{tried.ranks} was tried, without what ranks exchange"
    rows = [("step", step)]
    if tried.memory is not None:
        free = "" if tried.free is None else f", {gigabytes(tried.free)} are free"
        rows.append(("memory", f"{gigabytes(tried.memory)}{free}"))
    disk = gigabytes(tried.disk) if tried.disk >= 1e9 else f"{two_digits(tried.disk / 1e6)} MB"
    rows.append(("disk", f"{disk} for checkpoints"))
    work = "" if tried.gflop is None else f" ({two_digits(tried.gflop * tried.images / 1e3)} TFLOP)"
    alone = "; alone it is faster" if tried.busy else ""
    rows.append(("time", f"{tried.images:,} images: about {duration(tried.total)} without judging{work}{alone}"))
    return rows


def of_reading(cfg: DictConfig) -> Rows:
    """How fast image files of the set are read, which the trial of a step does not do."""
    if "root" not in cfg.data:
        return []
    size, channels, taken = cfg.data.image_size, cfg.data.image_channels, []
    there = islice(Path(cfg.data.root).expanduser().rglob("*"), LOOKED_AT)
    for path in islice((one for one in there if is_image(one.name)), READ):
        begun = time.perf_counter()
        try:
            read(path, size, channels, "white", MAX_PIXELS)
        except BadImage:
            continue
        taken.append(time.perf_counter() - begun)
    if not taken:
        return [("images", "the step is tried on noise of their size")]
    each, readers = sum(taken) / len(taken), cfg.data.num_workers or threads()
    speed = f"a file is read in {two_digits(1e3 * each)} ms, so {readers} at once give {two_digits(readers / each)}"
    where = "images/s where the set does not stay in memory"
    return [("images", f"the step is tried on noise of their size; {speed} {where}")]


# ---- what to change


def advice(run: Candidate, budgets: dict[str, Tried], rates: dict[str, float], device: torch.device) -> Rows:
    """Keys that shorten a run, each with about how much.

    Args:
        run: run that is asked for.
        budgets: key of a budget -> the run that it is of, which takes long.
        rates: operations a second of convolutions, by number format.
        device: device that trains.
    """
    cfg, rows = run.cfg, []
    for key, tried in budgets.items():
        rows.append((f"{key}={fitting(FITS, tried.seconds):_}", "fits 3 min; schedules follow it"))
        if tried.total > HOUR:
            rows.append((f"{key}={fitting(HOUR, tried.seconds):_}", "fits an hour"))
    on_gpu = device.type == "cuda"
    if other := found.faster(found.resolved(cfg.trainer.precision, on_gpu), rates):
        rows.append((f"trainer.precision={other[0]}", f"up to {other[1]:.2g} times as fast, as convolutions are"))
    share, asked = machine.cores() / cfg.trainer.devices, "OMP_NUM_THREADS" in os.environ
    wanted = machine.threads_to_set(share, torch.get_num_threads(), asked)
    if wanted and not on_gpu:
        rows.append((f"OMP_NUM_THREADS={wanted}", f"before the command: torch uses {torch.get_num_threads()}"))
    if on_gpu and torch.cuda.device_count() > cfg.trainer.devices:
        n = torch.cuda.device_count()
        rows.append((f"trainer=ddp trainer.devices={n}", f"all {n} GPUs; data.batch_size is of all of them"))
    halves = {"model.net.width": "a smaller net", "data.image_size": "smaller images"}
    for key, what in halves.items():
        half = (OmegaConf.select(cfg, key) or 0) // 2
        if half >= SMALLEST and _can_be(run, key, half):
            rows.append((f"{key}={half}", f"about a quarter of the work, {what}"))
    if not on_gpu:
        rows.append(("a GPU", "trainer=auto takes it where torch sees one"))
    return rows


def _can_be(run: Candidate, key: str, value: int) -> bool:
    """Whether a model can be made with another value of a key; on parts it cannot with images of another size."""
    if run.parts and key.startswith("data."):
        return False
    other = run.cfg.copy()
    OmegaConf.update(other, key, value)
    try:
        build.untaught(other, run.parts)
    except (InstantiationException, UserError):
        return False
    return True
