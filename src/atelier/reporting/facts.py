"""What a report knows of a run: what its built model says and shows, and what training has left in its folder.

Asking a model takes seconds, so what it said is kept in the run's folder, in report/, until the run has trained on.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from atelier.callbacks.table import Row, read_rows
from atelier.checkpoints.store import Manifest, write_text
from atelier.core.errors import UserError
from atelier.core.provenance import device as device_name
from atelier.core.rng import ImageRngs
from atelier.evaluation.evaluator import sample
from atelier.images.pictures import save_png
from atelier.images.pixels import to_uint8
from atelier.models.base import Autoencoder, Generator, Likelihood, Translator, sampling_mode
from atelier.models.diffusion_model import DiffusionModel
from atelier.models.two_players import TwoPlayers
from atelier.reporting import structure
from atelier.reporting.structure import Part, Structure
from atelier.requests.checks import verbs
from atelier.requests.folder import COLUMNS
from atelier.requests.request import Request
from atelier.runs import build, folders
from atelier.runs.folders import LoadedRun
from atelier.runs.trainer import autocast, device

FOLDER, FACTS = "report", "facts.json"  # in a run's folder
SAMPLES, SOURCES, REAL, WALK = "samples.png", "sources.png", "real.png", "walk.png"
TIMED, TIMES = 16, 3  # images that are made at once, and how often; the shortest time counts
TRACED = 4  # images of the training step that is looked at
KINDS: dict[str, type] = {  # what panels and tables put beside one another; the first that a model is
    "translators": Translator,
    "diffusion": DiffusionModel,
    "autoencoders": Autoencoder,
    "two players": TwoPlayers,
    "likelihood": Likelihood,
}


@dataclasses.dataclass
class Facts:
    """What a model says of itself, and what was measured of it.

    Args:
        images_seen: images that it had been trained on.
        page, data, task: pages of the model and of the set, and the task that the set is for.
        size: channels and sides of an image.
        family: class of the model.
        kind: one of `KINDS`, or "others".
        losses: class of its adversarial loss, "" where it has none.
        likelihood: whether it says how probable images are.
        verbs: words of what it can be asked for.
        parameters: number of them, with those of what it stands on.
        stands_on: run folders that it stands on.
        training, sampling: arrows and parts; `sampling` is None of what makes no images.
        ms: milliseconds for an image; None likewise.
        timed: words that say how that was measured.
    """

    images_seen: int
    page: str
    data: str
    task: str
    size: str
    family: str
    kind: str
    losses: str
    likelihood: bool
    verbs: list[str]
    parameters: int
    stands_on: list[str]
    training: Structure
    sampling: Structure | None = None
    ms: float | None = None
    timed: str = ""


@dataclasses.dataclass
class Told:
    """A run in a report.

    Args:
        name: name there.
        folder: run folder.
        idea, formula: as the class of its model has them today.
        facts: words and numbers of its model.
        summary: object in summary.json.
        rows: rows of metrics.csv.
        below: summaries of the runs that it stands on.
    """

    name: str
    folder: Path
    idea: str
    formula: str
    facts: Facts
    summary: dict[str, Any]
    rows: list[Row]
    below: list[dict[str, Any]]

    def picture(self, name: str) -> Path | None:
        """A picture of it by its file's name; None where it has none."""
        path = self.folder / FOLDER / name
        return path if path.exists() else None

    def metric(self, *names: str) -> float | None:
        """The first of these figures that the last evaluation has; of a model of several cases, that of the first."""
        found = self.summary["metrics"]
        for name in names:
            for key, value in found.items():
                if figure(key) == name and not math.isnan(value):
                    return value
        return None

    @property
    def tflop(self) -> float | None:
        return self.summary.get("tflop")

    @property
    def tflop_below(self) -> float:
        """Training work of the runs that it stands on."""
        return sum(one.get("tflop") or 0.0 for one in self.below)


def figure(key: str) -> str:
    """A figure's name in summary.json or metrics.csv without `val/` and the case of its model: `judge/valid`."""
    return re.sub(r"^(val/)?(\w+2\w+/)?", "", key)


def told(runs: list[Path], say: Callable[[str], None]) -> list[Told]:
    """Each run as a report has it, called by its page, or by its folder where two of a set have one page.

    A run that can no longer be asked is left out, and `say` tells why.

    Raises:
        UserError: none can be asked; that of the last.
    """
    found = []
    for k, run in enumerate(runs, 1):
        say(f"{k} of {len(runs)}: {run.name}")
        try:
            found.append(_told(run))
        except UserError as error:
            if k == len(runs) and not found:
                raise
            say(f"{run.name}: left out, {error.line().removeprefix('error: ')}")
    places = [(one.facts.data, one.facts.page) for one in found]
    for one in found:
        if places.count((one.facts.data, one.facts.page)) > 1:
            one.name = one.folder.name
    return found


def _told(folder: Path) -> Told:
    facts, model = kept(folder), build.family(build.safe_config(folder))
    below = [folders.summary(Path(one)) for one in facts.stands_on]
    rows = read_rows(folder / "metrics.csv")
    return Told(facts.page, folder, model.idea, model.formula, facts, folders.summary(folder), rows, below)


def kept(folder: Path) -> Facts:
    """The facts that are kept beside a run, or those of its model, asked now and kept.

    Raises:
        UserError: its model cannot be built or its set is not there.
    """
    path = folder / FOLDER / FACTS
    if path.exists():
        found = json.loads(path.read_text())
        whole = set(found) == {field.name for field in dataclasses.fields(Facts)}  # else another version kept it
        saved = Manifest(folder / "checkpoints").read()["files"]
        if whole and saved and found["images_seen"] == saved[-1]["images_seen"]:
            return _facts(found)
    run = folders.load(folder, ema=True)
    with folders.kept_where_writable(folder):
        path.parent.mkdir(exist_ok=True)
    facts = asked(run, path.parent)
    with folders.kept_where_writable(folder):
        write_text(path, json.dumps(dataclasses.asdict(facts), indent=1))
    return facts


def _facts(found: dict[str, Any]) -> Facts:
    for name in ("training", "sampling"):
        if (kept := found[name]) is not None:
            parts = [Part(**part) for part in kept["parts"]]
            found[name] = Structure(parts, [(a, b) for a, b in kept["arrows"]])
    return Facts(**found)


def asked(run: LoadedRun, place: Path) -> Facts:
    """What the model of a run says and shows; its pictures go to `place`."""
    model, cfg = run.model.to(device()), run.cfg
    run.data.prepare_data()
    facts = Facts(
        images_seen=run.images_seen,
        page=cfg.choices.get("experiment") or cfg.choices.model,
        data=cfg.choices.data,
        task=cfg.data.get("task") or "image",
        size=f"{run.data.image_channels} x {run.data.image_size} x {run.data.image_size}",
        family=type(model).__name__,
        kind=next((name for name, kind in KINDS.items() if isinstance(model, kind)), "others"),
        losses=type(model.loss).__name__ if getattr(model, "loss", None) is not None else "",
        likelihood=isinstance(model, Likelihood),
        verbs=list(verbs(model)) if isinstance(model, Generator) else [],
        parameters=sum(p.numel() for _, part, _ in structure.parts(model) for p in part.parameters()),
        stands_on=[str(path) for path in build.below(cfg)],
        training=Structure([], []),
    )
    run.data.test_batch(0, TIMED)  # what a set keeps of its images is not to be made in inference mode
    if isinstance(model, Generator):
        _draw(run, facts, place)
        facts.ms, facts.timed = _milliseconds(run)
        cond = model.condition(run.data.test_batch(0, 1), model.cases[0])
        facts.sampling = structure.of_sampling(model, cond)
    model.images_seen = run.images_seen  # where all that begins late takes part
    split = run.data.split("train")
    facts.training = structure.of_training(model.cpu(), split.read(list(range(min(TRACED, len(split)))), None))
    return facts


def _draw(run: LoadedRun, facts: Facts, place: Path) -> None:
    """Samples under the conditions of the first test images, what they were made of, and a way between latents."""
    model = run.model
    request = Request(model, run.data, case=model.cases[0])
    with sampling_mode(model, {}), autocast(model, run.cfg.trainer.precision):
        made = request.sample(0, COLUMNS)
        batch = run.data.test_batch(0, COLUMNS)
        shown = {SAMPLES: made.images, SOURCES: made.sources}
        shown[REAL] = None if model.source_fields else to_uint8(batch["image"])
        if "interpolate" in facts.verbs:
            shown[WALK] = request.interpolate(0, COLUMNS).images
    for name, images in shown.items():
        if images is not None:
            with folders.kept_where_writable(run.folder):
                save_png(torch.cat(list(images.cpu()), dim=2), place / name)


def _milliseconds(run: LoadedRun) -> tuple[float, str]:
    """The shortest time of an image that is made beside others, and how that was measured.

    One thread of a CPU is timed by what it worked itself, which other programs on that core do not lengthen.
    """
    model = run.model
    alone = model.device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.monotonic
    cond = model.condition(run.data.test_batch(0, TIMED), model.cases[0])
    took = []
    with sampling_mode(model, {}), autocast(model, run.cfg.trainer.precision):
        for _ in range(TIMES):
            begun = clock()
            sample(model, cond, ImageRngs(0, 0, TIMED), {}).cpu()
            took.append(1e3 * (clock() - begun) / TIMED)
    how = f"{TIMED} at once, the shortest of {TIMES} times, {device_name(model.device)}"
    return min(took), how + (", its own time" if alone else "")
