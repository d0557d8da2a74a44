"""Two loops beside each other, in turns: what benchmarks/loop.py and benchmarks/stylegan2.py share."""

from __future__ import annotations

import csv
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
WARM = 2  # steps of each round that are left out
MEASURED = """
import resource, subprocess, sys
subprocess.run([sys.executable, *sys.argv[1:]], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
"""

Measure = Callable[[], tuple[list[float], float]]  # to the seconds of each step, and the peak memory in MiB


def output(command: list[str]) -> str:
    """The last line that a Python command prints."""
    done = subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()[-1]


def whole(words: list[str], steps: int, batch: int) -> tuple[list[float], float]:
    """Seconds between the ends of two batches of train.py, from its own table, and its peak memory in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*words, f"budget.images={steps * batch}", f"data.batch_size={batch}", f"run_dir={folder}/run"]
        words += [f"callbacks.table.every_images={batch}"]
        peak = float(output(["-c", MEASURED, str(ROOT / "train.py"), *words]))
        with open(f"{folder}/run/metrics.csv") as file:
            rates = [row["perf/images_per_second"] for row in csv.DictReader(file)]
    return [batch / float(rate) for rate in rates if rate], peak


def compare(loops: dict[str, Measure], rounds: int, batch: int) -> None:
    """Let the loops take turns; print the median step and the peak memory of each beside the first's."""
    taken: dict[str, list[float]] = {name: [] for name in loops}
    peaks = dict.fromkeys(loops, 0.0)
    for _ in range(rounds):
        for name, measure in loops.items():
            seconds, peak = measure()
            taken[name] += seconds[WARM:]
            peaks[name] = max(peaks[name], peak)
    medians = {name: statistics.median(seconds) for name, seconds in taken.items()}
    first = next(iter(medians.values()))
    print("| loop | seconds a step | images/s | of bare | peak MiB |\n|---|---|---|---|---|")
    for name, median in medians.items():
        print(f"| {name} | {median:.3f} | {batch / median:.2f} | {first / median:.3f} | {peaks[name]:.0f} |")
