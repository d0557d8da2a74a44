"""Sampling with the paper's CIFAR-10 U-Net beside diffusers' DDIMPipeline on its net of the same size.

    python benchmarks/sampling.py                 # CPU, batch 8, 10 steps of DDIM, 5 rounds
    python benchmarks/sampling.py --device cuda --batch 256 --steps 50

Each round makes one batch with either, in turns, in one process, so that a busy machine slows both alike; both end in
8-bit pictures in memory. Above 1 atelier is faster.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from unet import machine, ours, theirs

from atelier.core.rng import ImageRngs
from atelier.diffusion.diffusion_sampler import DiffusionSampler
from atelier.diffusion.guidance import ClassifierFree
from atelier.diffusion.objective import Objective
from atelier.diffusion.samplers import DDIM
from atelier.diffusion.schedules import Linear
from atelier.diffusion.targets import Epsilon
from atelier.diffusion.times import Uniform
from atelier.diffusion.weightings import Plain
from atelier.images.pixels import to_uint8
from atelier.nets.conditioning import NoCondition


class Unconditional(NoCondition):
    """An embedder of nothing, and its null."""

    def null(self, n: int) -> torch.Tensor:
        return self({}, n)


def atelier(args: argparse.Namespace) -> Callable[[], object]:
    """A function that makes a batch with our loop."""
    net, embedder = ours().to(args.device).eval(), Unconditional().to(args.device)
    objective = Objective(Linear(), Epsilon(), Plain(), Uniform()).to(args.device)
    sampler = DDIM(steps=args.steps)
    made = DiffusionSampler(objective, net, embedder, sampler, ClassifierFree(guidance=1.0), clip=True)

    def batch() -> object:
        with torch.inference_mode(), torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            rngs = ImageRngs(0, 0, args.batch)
            noise = rngs.randn(3, 32, 32, device=args.device)
            return to_uint8(made({}, noise, rngs)).cpu()

    return batch


def diffusers(args: argparse.Namespace) -> Callable[[], object]:
    """A function that makes a batch with their pipeline."""
    from diffusers import DDIMPipeline, DDIMScheduler

    pipeline = DDIMPipeline(theirs().to(args.device).eval(), DDIMScheduler(timestep_spacing="trailing"))
    pipeline.set_progress_bar_config(disable=True)

    def batch() -> object:
        with torch.inference_mode(), torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            made = pipeline(batch_size=args.batch, num_inference_steps=args.steps, output_type="np")
            return (made.images * 255).round().astype("uint8")

    return batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int, default=8, help="images at once")
    parser.add_argument("--steps", type=int, default=10, help="of DDIM")
    parser.add_argument("--rounds", type=int, default=5, help="batches of each, after one that is not counted")
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    makers, taken = {"atelier": atelier(args), "diffusers": diffusers(args)}, {"atelier": [], "diffusers": []}
    for turn in range(args.rounds + 1):
        for name, make in makers.items():
            start = time.perf_counter()
            make()
            if turn:
                taken[name].append(time.perf_counter() - start)
    ratios = [b / a for a, b in zip(*taken.values(), strict=True)]
    print(f"{machine(args.device)}; batch {args.batch}, {args.steps} steps, {'bf16' if args.bf16 else 'float32'}")
    for name, seconds in taken.items():
        print(f"{name}: {args.batch / statistics.median(seconds):.2f} images/s")
    print(f"{statistics.median(ratios):.3f}x ({min(ratios):.3f} .. {max(ratios):.3f}) over {args.rounds} rounds")


if __name__ == "__main__":
    main()
