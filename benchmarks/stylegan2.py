"""The training loop of train.py on StyleGAN2, with logging and EMA, beside a bare loop over the same nets.

    python benchmarks/stylegan2.py                # the page at 64 px, batch 16, 3 rounds of 6 steps each

Rounds alternate; a loop's figure is the median step of all its rounds, the first two steps of each left out. A step is
one of the discriminator and one of the generator, with style mixing; the lazy penalties are switched off in both loops.
Memory is the peak of the whole process, imports and data included.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ["model=stylegan2", "model.r1_gamma=0", "model.path_weight=0", "data=shapes", "data.n_train_scenes=512"]
SHORT = ["metrics=none", "eval.n_samples=1", "callbacks.grids.n=1", "trainer=cpu", "trainer.precision=32-true"]
WARM = 2


def bare(steps: int, batch: int, size: int) -> None:
    """The shortest loop that trains the same nets. Prints each step's seconds and the peak memory in MiB."""
    import torch
    import torch.nn.functional as F
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate
    from torch import Tensor

    from atelier import runs
    from atelier.nets.stylegan2 import mixed

    runs.register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", [*PAGE, f"data.image_size={size}", "run_dir=unused"])
    node = cfg.model
    torch.manual_seed(0)
    G, D, ours, theirs = (
        instantiate(node[name], _convert_="all")
        for name in ("generator", "discriminator", "generator_embedder", "discriminator_embedder")
    )
    parts = [(G, ours, node.generator_optimizer), (D, theirs, node.discriminator_optimizer)]
    optimizers = [
        instantiate(o, _convert_="all")([*net.parameters(), *embedder.parameters()]) for net, embedder, o in parts
    ]
    data = torch.rand(512, 3, size, size) * 2 - 1
    told = {"label": torch.randint(36, (512,)), "attributes": torch.randint(2, (512, 14)).float()}

    def fake(cond: dict[str, Tensor]) -> Tensor:
        z, known = torch.randn(2, batch, G.noise_dim), ours(cond, batch)
        styles = mixed(G.mapping(z[0], known), G.mapping(z[1], known), G.synthesis.n_styles, node.mixing)
        G.mapping.mean.lerp_(styles.detach()[:, 0].mean(0), 1 - node.mean_memory)
        return G.synthesis(styles, [torch.randn(batch, 1, n, n) for n in G.synthesis.noise_sizes])

    seconds = []
    for step in range(steps):
        start = time.perf_counter()
        rows = torch.arange(step * batch, (step + 1) * batch) % len(data)
        x, cond = data[rows], {name: values[rows] for name, values in told.items()}
        with torch.no_grad():
            made = fake(cond)
        known = theirs(cond, batch)
        loss = F.softplus(-D(x, known)).mean() + F.softplus(D(made, known)).mean()
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
        loss = F.softplus(-D(fake(cond), theirs(cond, batch))).mean()
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
        seconds.append(time.perf_counter() - start)
    print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))


def bare_steps(steps: int, batch: int, size: int) -> tuple[list[float], float]:
    command = [sys.executable, __file__, "--bare", str(steps), "--batch", str(batch), "--size", str(size)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def whole_steps(steps: int, batch: int, size: int) -> tuple[list[float], float]:
    """Seconds between the ends of two batches of train.py, from its own table, and its peak memory in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        words = [f"budget.images={steps * batch}", f"data.batch_size={batch}", f"data.image_size={size}"]
        words += [f"run_dir={folder}/run", f"callbacks.table.every_images={batch}"]
        command = [sys.executable, "-c", MEASURED, str(ROOT / "train.py"), *PAGE, *SHORT, *words]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        with open(f"{folder}/run/metrics.csv") as file:
            rates = [row["perf/images_per_second"] for row in csv.DictReader(file)]
    return [batch / float(rate) for rate in rates if rate], float(told.splitlines()[-1])


MEASURED = """
import resource, subprocess, sys
subprocess.run([sys.executable, *sys.argv[1:]], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bare", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bare is not None:
        bare(args.bare, args.batch, args.size)
        return
    taken: dict[str, list[float]] = {"bare": [], "train.py": []}
    memory = dict.fromkeys(taken, 0.0)
    for _ in range(args.rounds):
        for name, measure in (("bare", bare_steps), ("train.py", whole_steps)):
            seconds, peak = measure(args.steps + WARM, args.batch, args.size)
            taken[name] += seconds[WARM:]
            memory[name] = max(memory[name], peak)
    medians = {name: statistics.median(seconds) for name, seconds in taken.items()}
    print("| loop | seconds a step | images/s | of bare | peak MiB |\n|---|---|---|---|---|")
    for name, median in medians.items():
        rate = f"{args.batch / median:.2f} | {medians['bare'] / median:.3f} | {memory[name]:.0f}"
        print(f"| {name} | {median:.3f} | {rate} |")


if __name__ == "__main__":
    main()
