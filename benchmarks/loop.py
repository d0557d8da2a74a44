"""The whole training loop of train.py, with logging, EMA and checkpoints, beside a bare loop on the same net.

    python benchmarks/loop.py                     # the paper's CIFAR-10 net, batch 8, median of 3

Both are timed from outside as the difference between a long and a short run, which takes start-up and the
last evaluation out; each round runs both, one after the other.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECIPE = ["experiment=cifar10_ddpm", "data=shapes", "data.image_size=32", "eval.every_images=1000000000"]


def bare(images: int, batch: int) -> None:
    """The shortest loop that trains the same net: noise, mix, net, error, step. Images lie in memory."""
    import torch
    from unet import ours

    torch.manual_seed(0)
    data = torch.rand(512, 3, 32, 32) * 2 - 1
    net = ours().train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-4, fused=True)
    for start in range(0, images, batch):
        x = data[torch.arange(start, start + batch) % len(data)]
        eps, t = torch.randn_like(x), torch.rand(batch)
        alpha = torch.cos(t * torch.pi / 2)[:, None, None, None]
        sigma = torch.sin(t * torch.pi / 2)[:, None, None, None]
        loss = torch.nn.functional.mse_loss(net(alpha * x + sigma * eps, 999 * t), eps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def command(kind: str, images: int, batch: int, folder: str, overrides: list[str]) -> list[str]:
    """What a child process runs: the bare loop of this file, or train.py into an empty folder."""
    if kind == "bare":
        return [sys.executable, __file__, "--bare", str(images), "--batch", str(batch)]
    budget = [f"budget.images={images}", f"data.batch_size={batch}", f"run_dir={folder}/{images}"]
    return [sys.executable, str(ROOT / "train.py"), *RECIPE, *budget, *overrides]


def images_per_second(kind: str, short: int, long: int, batch: int, overrides: list[str]) -> float:
    """(long - short) images over the difference of the two runs' seconds."""
    taken = []
    with tempfile.TemporaryDirectory() as folder:
        for images in (short, long):
            start = time.perf_counter()
            subprocess.run(command(kind, images, batch, folder, overrides), check=True, capture_output=True)
            taken.append(time.perf_counter() - start)
    return (long - short) / (taken[1] - taken[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40, help="steps by which the long run is longer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bare", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="further overrides for train.py")
    args = parser.parse_args()
    if args.bare is not None:
        bare(args.bare, args.batch)
        return
    short, long = 4 * args.batch, (4 + args.steps) * args.batch
    speed = {"bare": [], "train.py": []}
    for _ in range(args.rounds):
        for kind, values in speed.items():
            values.append(images_per_second(kind, short, long, args.batch, args.overrides))
    plain, whole = (statistics.median(values) for values in speed.values())
    print("| loop | images/s | of bare |\n|---|---|---|")
    print(f"| bare | {plain:.2f} | 1 |\n| train.py | {whole:.2f} | {whole / plain:.3f} |")


if __name__ == "__main__":
    main()
