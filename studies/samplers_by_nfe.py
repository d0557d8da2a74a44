"""What each sampler makes of few calls of a diffusion model's net, from the same noise.

    python studies/samplers_by_nfe.py RUN --n 300 --nfe 5 10 20 50

Every page of conf/sampler gets as many steps as its budget of calls (NFE) allows. Guidance is the run's own; its second
half does not count. Of n samples: the share that the judge finds valid, where the set has one, and the distance to test
images (`fid`, or `fd_<net>` by another net). A table in Markdown; in the run's folder samplers_by_nfe.csv and a picture
for each figure.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from atelier.core.errors import UserError
from atelier.core.lines import duration
from atelier.core.rng import ImageRngs
from atelier.diffusion.samplers import Sampler
from atelier.evaluation.evaluator import N_TRAINING, sample, training_set
from atelier.images.charts import line_chart
from atelier.images.pixels import to_float, to_uint8
from atelier.metrics.suite import Suite
from atelier.models.base import sampling_mode
from atelier.runs import build, folders
from atelier.runs.trainer import device
from atelier.shapes.judge import judge

CONF = Path(__file__).parents[1] / "conf"
BATCH = 100


class Job(NamedTuple):
    """A sampler under its budget of calls."""

    name: str
    budget: int
    sampler: Sampler


def jobs(budgets: list[int]) -> list[Job]:
    """Every page of conf/sampler with the most steps that each budget allows; none where one step costs more."""
    found = []
    for page in sorted((CONF / "sampler").glob("*.yaml")):
        plain: Sampler = instantiate(OmegaConf.load(page), _convert_="all")
        for budget in budgets:
            fitting = [s for n in range(budget, 0, -1) if (s := replace(plain, steps=n)).nfe <= budget]
            found += [Job(page.stem, budget, fitting[0])] if fitting else []
    return found


class Measure:
    """Samples of a run judged; test images and their features are read once."""

    def __init__(self, run: folders.LoadedRun, suite: Suite, n: int, seed: int) -> None:
        self.run, self.suite, self.n, self.seed = run, suite, n, seed
        self.real = None
        if suite.active:
            suite.prepare(run.data.fingerprint("train"), lambda: training_set(run.data), run.model.device)
            n_real = min(N_TRAINING, len(run.data.split("test")))
            numbers = (range(k, min(k + BATCH, n_real)) for k in range(0, n_real, BATCH))
            images = (to_uint8(run.data.chosen("test", part)["image"]) for part in numbers)
            self.real = torch.cat([suite.features(part).cpu() for part in images])

    def __call__(self, sampler: Sampler) -> dict[str, float]:
        """Figures by name, of image k with noise k."""
        model, valid, features = self.run.model, [], []
        with sampling_mode(model, {"sampler": sampler}):
            for first in range(0, self.n, BATCH):
                size = min(BATCH, self.n - first)
                cond = model.condition(self.run.data.test_batch(first, size), "")
                rngs = ImageRngs(self.seed, first, size)
                images = to_uint8(sample(model, cond, rngs, {"sampler": sampler}))
                if self.run.data.judged:
                    valid.append(judge(to_float(images.cpu())).valid)
                if self.real is not None:
                    features.append(self.suite.features(images).cpu())
        found = {"valid": torch.cat(valid).double().mean().item()} if valid else {}
        return found | (self.suite.compare(self.real, torch.cat(features)) if features else {})


def measured(measure: Measure, asked: list[Job]) -> Iterator[tuple[Job, dict[str, float]]]:
    """Each job with its figures, none where the sampler does not suit the run; tells the time left."""
    calls, began = 0, time.monotonic()
    for k, job in enumerate(asked):
        try:
            found = measure(job.sampler)
        except UserError as error:
            found = {}
            print(f"{job.name}, {job.budget} calls: {error}", file=sys.stderr, flush=True)
        calls += job.sampler.nfe
        rest = sum(other.sampler.nfe for other in asked[k + 1 :])
        left = duration((time.monotonic() - began) / calls * rest)
        told = " ".join(f"{name} {value:.3f}" for name, value in found.items())
        line = f"{k + 1} of {len(asked)}, {left} left: {job.name}, {job.sampler.nfe} calls: {told}"
        print(line, file=sys.stderr, flush=True)
        yield job, found


def table(rows: list[tuple[Job, dict[str, float]]], budgets: list[int]) -> str:
    """A row for each sampler, a column for each budget; figures in the order of their names."""
    names = next((list(found) for _, found in rows if found), [])
    cells = {(job.name, job.budget): ", ".join(f"{found[n]:.3f}" for n in names if found) for job, found in rows}
    lines = [
        f"| {', '.join(names)} | " + " | ".join(f"NFE {b}" for b in budgets) + " |",
        "| --- " * (len(budgets) + 1) + "|",
    ]
    for sampler in dict.fromkeys(job.name for job, _ in rows):
        lines.append(f"| {sampler} | " + " | ".join(cells.get((sampler, b)) or "-" for b in budgets) + " |")
    return "\n".join(lines)


def write(rows: list[tuple[Job, dict[str, float]]], folder: Path) -> None:
    """The CSV, and a picture of each figure against the calls that were made."""
    names = next((list(found) for _, found in rows if found), [])
    with (folder / "samplers_by_nfe.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["sampler", "steps", "nfe", *names])
        for job, found in rows:
            writer.writerow([job.name, job.sampler.steps, job.sampler.nfe, *(found.get(n, "") for n in names)])
    for name in names:
        curves: dict[str, list[tuple[float, float]]] = {}
        for job, found in rows:
            if found:
                curves.setdefault(job.name, []).append((job.sampler.nfe, found[name]))
        chart = line_chart(curves, "calls of the net per image (NFE)", name, log_x=True)
        (folder / f"samplers_by_nfe_{name}.svg").write_text(chart)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a finished run of diffusion, or last")
    parser.add_argument("--n", type=int, default=300, help="samples")
    parser.add_argument("--nfe", type=int, nargs="+", default=[5, 10, 20, 50], help="budgets of calls")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--metrics", default="classifier", help="page of conf/metrics whose distance is measured")
    asked = parser.parse_args()
    run = folders.load_generator(folders.find(asked.run), True, None)
    run.model.to(device())
    with initialize_config_dir(str(CONF), version_base="1.3"):
        suite = build.metrics(compose("evaluate", [f"metrics={asked.metrics}"]))
    measure = Measure(run, suite, asked.n, asked.seed)
    rows = []
    for row in measured(measure, jobs(asked.nfe)):
        rows.append(row)
        write(rows, run.folder)
    print(table(rows, asked.nfe))


if __name__ == "__main__":
    main()
