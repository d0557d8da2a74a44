"""A training step per floating-point operation: atelier's beside that of denoising-diffusion-pytorch.

    pip install denoising-diffusion-pytorch
    python benchmarks/gflop_rate.py               # CPU, batch 8, 7 rounds, float32

Their net is not ours: what is compared is how many of the operations of its own net each does a second, forward,
backward and a step of AdamW, with the loss of its own library, interleaved in one process. Operations are counted by
torch. Above 1 atelier does more a second.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from unet import machine, ours

from atelier.diffusion.objective import Objective
from atelier.diffusion.schedules import Linear
from atelier.diffusion.targets import Epsilon
from atelier.diffusion.times import Uniform
from atelier.diffusion.weightings import Plain


def atelier() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    net, objective = ours(), Objective(Linear(), Epsilon(), Plain(), Uniform())
    return net, lambda x: objective(net, x).mean()


def peer() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    net = Unet(dim=128, dim_mults=(1, 2, 2, 2), dropout=0.1)
    diffusion = GaussianDiffusion(net, image_size=32, timesteps=1000, objective="pred_noise", auto_normalize=False)
    return net, diffusion


def stepper(net: nn.Module, loss: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    """A function that does one training step."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-4, fused=True)

    def step() -> None:
        loss(x).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if x.is_cuda:
            torch.cuda.synchronize()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    x = torch.rand(args.batch, 3, 32, 32, device=args.device) * 2 - 1
    steps, gflop, taken = {}, {}, {"atelier": [], "denoising-diffusion-pytorch": []}
    for name, make in zip(taken, (atelier, peer), strict=True):
        net, loss = make()
        net.to(args.device).train()
        steps[name] = stepper(net, loss, x)
        with FlopCounterMode(display=False) as counter:
            steps[name]()
        gflop[name] = counter.get_total_flops() / 1e9
    for turn in range(args.rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:
                taken[name].append(gflop[name] / (time.perf_counter() - start))
    print(f"{machine(args.device)}; batch {args.batch}, float32")
    for name, rates in taken.items():
        print(f"{name}: {gflop[name] / args.batch:.1f} GFLOP an image, {statistics.median(rates):.1f} GFLOP/s")
    ratios = [a / b for a, b in zip(*taken.values(), strict=True)]
    print(f"{statistics.median(ratios):.3f}x ({min(ratios):.3f} .. {max(ratios):.3f}) over {args.rounds} rounds")


if __name__ == "__main__":
    main()
