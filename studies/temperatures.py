"""What the temperature of a flow or a code prior does to its samples.

Shares are of all of them, not of the valid ones alone, as far as the judge can tell what a broken scene shows.

    python studies/temperatures.py RUN --seed 77 --temperatures 0.5 0.7 0.9 1.0
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from atelier.core.rng import ImageRngs
from atelier.images.pixels import to_float, to_uint8
from atelier.metrics.shapes import wishes
from atelier.runs import folders
from atelier.shapes.judge import judge

N, BATCH = 1_000, 250


def shares(run: folders.LoadedRun, temperature: float, seed: int) -> dict[str, float]:
    """Of N samples: how many are valid, nearly valid, and have each attribute."""
    images, asked = [], []
    for first in range(0, N, BATCH):
        cond = run.model.condition(run.data.test_batch(first, BATCH), "")
        images.append(to_uint8(run.model.sample(cond, ImageRngs(seed, first, BATCH), temperature=temperature)))
        asked.append(cond)
    verdict = judge(to_float(torch.cat(images)))
    wanted = wishes({name: torch.cat([cond[name] for cond in asked]) for name in asked[0]})
    found = {"valid": verdict.valid, "loose": verdict.loose}
    found |= {name: getattr(verdict, name) == value for name, value in wanted.items()}
    return {name: share.double().mean().item() for name, share in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.5, 0.7, 0.9, 1.0])
    asked = parser.parse_args()
    run = folders.load(asked.run, ema=True)
    with torch.inference_mode():
        for temperature in asked.temperatures:
            told = " ".join(f"{name} {value:.3f}" for name, value in shares(run, temperature, asked.seed).items())
            print(f"temperature {temperature:g}: {told}", flush=True)


if __name__ == "__main__":
    main()
