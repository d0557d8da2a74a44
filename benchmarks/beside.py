"""train.py and a bare loop on the same net, a step of each in turns: what loop.py and stylegan2.py share.

Both stand in one process, so that what a machine does to one in a noisy minute it does to the other, and what the
allocator has kept serves both. The time of train.py's step is all that lies between two of the other's: its data, its
callbacks, a row of its table. Memory is the peak of a process in which one of them runs alone, imports included.
"""

from __future__ import annotations

import argparse
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig

ROOT = Path(__file__).parents[1]
WARM = 3  # steps of each that are left out
ALONE = 5  # steps for a look at the memory

Step = Callable[[int], None]  # the bare loop's i-th


def main(title: str, words: list[str], make: Callable[[DictConfig], Step], batch: int, steps: int) -> None:
    """Print a table of the two; `make` gives the bare step of a config."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "words", nargs="*", metavar="KEY=VALUE", help="of train.py, as model.generator.channel_base=512"
    )
    args = parser.parse_args()
    words = [*words, f"data.batch_size={args.batch}", f"callbacks.table.every_images={args.batch}", *args.words]
    if args.alone:
        bare(words, make)
        return
    again = [sys.argv[0], "--alone", "--batch", str(args.batch), *args.words]
    pairs = turns(words, make, args.steps, args.batch)[WARM:]
    ratio = statistics.median(theirs / ours for ours, theirs in pairs)
    with tempfile.TemporaryDirectory() as folder:
        whole = [str(ROOT / "train.py"), *words, f"budget.images={ALONE * args.batch}", f"run_dir={folder}/run"]
        peaks = [peak(command) for command in (whole, again)]
    print("| loop | seconds a step | images/s | peak MiB |\n|---|---|---|---|")
    for name, seconds, top in zip(("train.py", "bare"), zip(*pairs, strict=True), peaks, strict=True):
        median = statistics.median(seconds)
        print(f"| {name} | {median:.3f} | {args.batch / median:.2f} | {top:.0f} |")
    print(f"train.py is as fast as {ratio:.3f} of the bare loop: the median over {len(pairs)} pairs of steps")


def turns(words: list[str], make: Callable[[DictConfig], Step], steps: int, batch: int) -> list[tuple[float, float]]:
    """Seconds of each step of train.py with these words, and of the bare step after it."""
    from lightning.pytorch import Callback, LightningModule, Trainer

    from atelier.core.batch import Batch
    from atelier.runs import build

    class Beside(Callback):
        """The last callback of a batch."""

        def __init__(self, step: Step) -> None:
            self.step, self.taken, self.since = step, [], time.perf_counter()

        def on_train_batch_end(
            self, trainer: Trainer, model: LightningModule, outputs: object, batch: Batch, batch_idx: int
        ) -> None:
            whole = time.perf_counter()
            self.step(batch_idx)
            done = time.perf_counter()
            self.taken.append((whole - self.since, done - whole))
            self.since = done

    taken: list[Beside] = []
    trainer = build.trainer

    def with_beside(cfg: DictConfig, *rest: object) -> Trainer:
        made = trainer(cfg, *rest)
        taken.append(Beside(make(cfg)))
        made.callbacks.append(taken[0])
        return made

    with tempfile.TemporaryDirectory() as folder:
        build.trainer = with_beside
        sys.argv = ["train.py", *words, f"budget.images={steps * batch}", f"run_dir={folder}/run"]
        sys.path.insert(0, str(ROOT))
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    return taken[0].taken


def bare(words: list[str], make: Callable[[DictConfig], Step]) -> None:
    """A few steps of the bare loop in a process of its own."""
    from hydra import compose, initialize_config_dir

    from atelier.runs import folders
    from atelier.runs.trainer import keep_freed_memory

    keep_freed_memory()
    folders.register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        step = make(compose("train", [*words, "run_dir=unused"]))
    for i in range(ALONE):
        step(i)


def peak(command: list[str]) -> float:
    """Of a Python command's memory, in MiB, as the system counts it."""
    lines = "import resource, subprocess, sys\nsubprocess.run([sys.executable, *sys.argv[1:]], check=True)\n"
    lines += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)"
    done = subprocess.run([sys.executable, "-c", lines, *command], check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])
