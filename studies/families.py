"""Every family by the same training work: a short run of each page on shapes and on Fashion-MNIST, then their report.

    python studies/families.py outputs/families --fashion_mnist PATH

Both sets at 16 px (super-resolution 16 to 64). A page is first trained for a few batches, which tell its work an image;
its short run then has as many images as WORK allows. What stands on another run stands on the short run of that page
here, whose work comes on top. Finished runs are taken as they are, a stopped one goes on. At the end it writes the
summaries that docs/families.md quotes into results/families.jsonl, and the report. These are short runs: they show what
each family does first, not what it comes to.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atelier.reporting.contents import Around
    from atelier.reporting.facts import Told

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]
DOCUMENT, RESULTS = ROOT / "docs" / "families.md", ROOT / "results" / "families.jsonl"
TITLE = "What the families do, in short runs of the same work"

WORK = 5.0  # TFLOP of each short run
PROBED = 16  # batches that tell the work of an image: a whole turn of penalties that come at each 16th
COUNTED = 7  # one of so many batches of a run has its work counted: prime, so that every n-th penalty is met
SIZE, N_JUDGED, N_REAL, TIMES = 16, 200, 1_000, 3  # side in px; images judged, and beside; times judged on the way
COMMON = (
    f"data.batch_size=32 metrics=classifier metrics.names=[fid,recall] eval.n_samples={N_JUDGED} eval.n_real={N_REAL}"
    " eval.n_diagnosed=0 checkpoint.every_images=1_000_000"
).split()


@dataclass(frozen=True)
class Short:
    """The short run of a page: words of its own, the page that it stands on, and keys in shares of its images."""

    page: str
    words: str = ""
    first: str = ""
    shares: dict[str, float] = field(default_factory=dict)


GROWING = dict.fromkeys(("model.stable_images", "model.fade_images"), 1 / 8)  # half of the images at full size
LATE = {"model.discriminator_start": 0.7, "model.adversarial_start": 0.75}
FAST = (  # half as wide and at a rate for minutes, as the recipes of shapes have it
    "model.generator.channel_base=512 model.generator_optimizer.lr=1e-2 model.discriminator_optimizer.lr=1e-2"
)
R1 = "adversarial@model.loss=non_saturating model.r1_gamma=0.3"
FAMILIES = (  # one page of each, of any set
    Short("ae"),
    Short("vae"),
    Short("autoencoder_kl", shares=LATE),
    Short("vqvae"),
    Short("vqprior", first="vqvae"),
    Short("cgan"),
    Short("progan", f"{FAST} {R1} model.gp_weight=0 model.drift=0", shares=GROWING),
    Short("stylegan", f"{FAST} {R1} model.style_mixing_prob=0", shares=GROWING),
    Short("stylegan2", f"{FAST} model.r1_gamma=0.3 model.path_weight=0 model.style_mixing_prob=0"),
    Short("glow"),
    Short("flow"),
    Short("ldm", first="vae"),
)
MEMBERS = (  # further ones, of shapes alone
    Short("dcgan"),
    Short("r3gan", "model.generator.width=16 model.penalty_every=4 model.r1_gamma=0.3 model.r2_gamma=0.3"),
    Short("ddpm"),
    Short("edm"),
    Short("dit"),
    Short("realnvp"),
)
TRANSLATED = (  # of images that have a source, which Fashion-MNIST's have not
    Short("pix2pix", "data.task=label_map model.generator={source_levels:7,n_downs:3,n_dropout:1}"),
    Short("cyclegan", "data.task=fill"),
    Short("cut", "data.task=fill"),
    Short("stargan", "data.task=attribute_transfer model.n_critic=1"),
    Short("srresnet", "data.task=low_resolution data.image_size=64 eval.batch_size=50"),
    Short("srgan", "data.task=low_resolution data.image_size=64 eval.batch_size=50", first="srresnet"),
)
LEFT_OUT = {
    "gan, flow_tiny, iddpm, adm, vqgan, rrdbnet, esrgan": "members beside dcgan, flow, ddpm, autoencoder_kl and srgan",
    "clip, noisy_classifier": "make no images",
    "text_to_image, label_map_to_image, inpaint, instruct_pix2pix": "ldm with other conditions",
    "stable_diffusion, stable_diffusion_2, sdxl and what is made of them, kl_tuned": "begin with weights of others",
    "pix2pix, cyclegan, cut, stargan, srresnet, srgan on fashion_mnist": "its images have no sources",
}


@dataclass(frozen=True)
class Job:
    """A short run on one set, in a folder beside the others."""

    short: Short
    data: tuple[str, ...]
    folder: Path

    @property
    def words(self) -> list[str]:
        """What train.py is told, but for the number of images and where it goes."""
        first = [f"model.first_stage.run={self.beside(self.short.first)}"] if self.short.first else []
        return [f"model={self.short.page}", *self.data, *COMMON, *self.short.words.split(), *first]

    def beside(self, page: str) -> Path:
        return self.folder.with_name(self.folder.name.replace(self.short.page, page))

    def of(self, images: int) -> list[str]:
        """The words of its run of so many images."""
        shares = [f"{key}={round(share * images)}" for key, share in self.short.shares.items()]
        return [*self.words, f"budget.images={images}", *shares]


def jobs(folder: Path, fashion_mnist: str | None) -> Iterator[Job]:
    """Short runs in the order in which they may stand on one another, one of each family first."""
    sets = [("shapes", (*FAMILIES, *TRANSLATED)), ("fashion_mnist", FAMILIES), ("shapes", MEMBERS)]
    for name, shorts in sets:
        if name == "fashion_mnist" and fashion_mnist is None:
            continue
        root = [f"data.root={fashion_mnist}"] if name == "fashion_mnist" else []
        for short in shorts:
            yield Job(short, (f"data={name}", f"data.image_size={SIZE}", *root), folder / f"{name}_{short.page}")


def trained(words: list[str], folder: Path, counted: int) -> dict[str, Any]:
    """The summary of the run of `python train.py words` in a folder, which is begun, gone on with, or finished.

    Args:
        words: as train.py takes them.
        folder: run folder.
        counted: its work is counted in each of so many batches, in a run that is too short for the usual number.
    """
    import train
    from atelier.callbacks import work
    from atelier.runs.folders import summary
    from tests.compose import composed

    sys.argv[:] = ["train.py", *words, f"run_dir={folder}"]
    every, work.EVERY = work.EVERY, counted
    try:
        train.train(composed(*words, run_dir=folder))
    finally:
        work.EVERY = every
    return summary(folder)


def images(job: Job, work: float) -> int:
    """How many images the work (TFLOP) allows, in whole batches; found once and kept beside the run."""
    kept = job.folder.with_suffix(".json")
    if not kept.exists():
        probe = job.folder.with_name(f"probe_{job.folder.name}")
        quick = "metrics=none eval.n_samples=2 eval.n_real=2 callbacks.grids.n=1".split()
        told = trained([*job.of(32 * PROBED), *quick], probe, 1)
        shutil.rmtree(probe)
        kept.write_text(json.dumps({"gflop_per_image": told["gflop_per_image"]}))
    return max(1, round(1e3 * work / json.loads(kept.read_text())["gflop_per_image"] / 32)) * 32


def finished(job: Job) -> bool:
    return (job.folder / "weights.safetensors").exists() and (job.folder / "summary.json").exists()


def run(job: Job, work: float) -> None:
    """Train a short run unless it is finished; a mistake of one is told, and costs that one alone."""
    if finished(job):
        return
    try:
        n = images(job, work)
        curves = [f"eval.every_images={max(32, -(-n // TIMES))}", f"callbacks.table.every_images={max(32, n // 50)}"]
        trained([*job.of(n), *curves], job.folder, COUNTED)
    except Exception:
        traceback.print_exc()
        print(f"{job.folder.name}: left out, see above", flush=True)


def row(one: Told) -> dict[str, Any]:
    """The row of a short run in results/families.jsonl: its summary, and what the report asked its model."""
    from atelier.core import provenance
    from atelier.runs import ledger

    told, facts = one.summary, dataclasses.asdict(one.facts)
    del facts["stands_on"]
    made = {
        "experiment": one.name,
        "overrides": [ledger.portable(word) for word in ledger.typed(one.folder, told["command"])],
        "judged_with": [],
        "run": ledger.named(one.folder),
        "seeds": dict.fromkeys(("training", "judging"), told["protocol"]["seed"]),
        "n": told["protocol"]["n_samples"],
        "values": {name: None if math.isnan(value) else value for name, value in told["metrics"].items()},
        "tflop_below": one.tflop_below,
        "an_image": one.facts.sampling and {"gflop": one.facts.sampling.gflop, "calls": one.facts.sampling.evaluations},
        **{
            name: told[name] for name in ("intervals", "protocol", "images_seen", "tflop", "gflop_per_image", "seconds")
        },
        **{name: told[name] for name in ("device", "commit", "versions")},
        "facts": facts,
        "reported": provenance.commit(),
    }
    return made | {"checksum": ledger.checksum(made)}


def settings() -> str:
    """What short runs set otherwise than their pages: `page: words` of each."""
    told = []
    for short in (*FAMILIES, *TRANSLATED, *MEMBERS):
        shares = [f"{key}={share:g}*IMAGES" for key, share in short.shares.items()]
        if words := [*short.words.split(), *shares]:
            told.append(f"`{short.page}: {' '.join(words)}`")
    return "; ".join(told)


def around(found: list[Told], work: float) -> Around:
    """What stands above the report, and how its runs were made below it."""
    from atelier.reporting.contents import Around

    total = sum(one.tflop or 0.0 for one in found)
    sets = " or ".join(dict.fromkeys(one.facts.data for one in found))
    out = "; ".join(f"{pages}: {why}" for pages, why in LEFT_OUT.items())
    first = [
        f"Short runs, {len(found)} of them, each trained with {work:g} TFLOP on {sets} at {SIZE} px (super-resolution"
        f" to {4 * SIZE}), {total:.1f} TFLOP in all. They show what a family does first, not what it comes to:"
        " docs/results.md has the recipes' numbers. What stands on another run stands on the short run of that page"
        " here, whose work comes on top and is told beside it.",
        f"One seed each, {N_JUDGED} samples judged beside {N_REAL:,} test images. Seconds of training pass on a clock,"
        " also while other programs run; an image's milliseconds are of one thread's own time.",
        "ProGAN has R1 here in place of WGAN-GP and drift, StyleGAN and StyleGAN2 mix no styles, and StyleGAN2 has no"
        " penalty on path lengths: the last paragraph has all settings that are not those of the pages.",
    ]
    last = [
        f"Left out: {out}.",
        "`python studies/families.py RUNS --fashion_mnist PATH` makes all of it: the runs, this file, its pictures,"
        " `results/families.jsonl` with a row for each run, and the report as a page.",
        f"Settings of the short runs alone (IMAGES: of that run): {settings()}; of all: `{' '.join(COMMON)}`.",
    ]
    return Around(first, last)


def report(folders: list[Path], page: Path, work: float) -> None:
    """Write the page, docs/families.md with its pictures, and results/families.jsonl."""
    from atelier.reporting import facts, writing

    found = facts.told(folders, print)
    RESULTS.write_text("".join(json.dumps(row(one)) + "\n" for one in found))
    writing.write(page, DOCUMENT, found, TITLE, around(found, work), RESULTS.stem)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of the short runs; report.html is written there")
    parser.add_argument("--fashion_mnist", help="folder of Fashion-MNIST; without it, shapes alone")
    parser.add_argument("--work", type=float, default=WORK, help="TFLOP of each short run")
    parser.add_argument("--only_report", action="store_true", help="of the runs that are finished, train none")
    asked = parser.parse_args()
    asked.runs.mkdir(parents=True, exist_ok=True)
    from atelier.runs import folders

    folders.register()
    chosen = list(jobs(asked.runs.absolute(), asked.fashion_mnist))
    for k, job in enumerate([] if asked.only_report else chosen, 1):
        print(f"---- {k} of {len(chosen)}: {job.folder.name}", flush=True)
        run(job, asked.work)
    done = sorted((job for job in chosen if finished(job)), key=lambda job: job.data[0] != "data=shapes")
    report([job.folder for job in done], asked.runs / "report.html", asked.work)


if __name__ == "__main__":
    main()
