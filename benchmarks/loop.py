"""The whole training loop of train.py, with logging and EMA, beside a bare loop on the same net.

    python benchmarks/loop.py                     # the paper's CIFAR-10 net, batch 32, 3 rounds of 4 steps each

Rounds alternate; a loop's figure is the median step of all its rounds, the first two steps of each left out. A
checkpoint comes once in 80,000 steps of this recipe: its seconds are told beside it.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

from rounds import WARM, compare, output, whole

RECIPE = ["experiment=cifar10_ddpm", "data=shapes", "data.image_size=32", "data.flip=false", "metrics=none"]
SHORT = ["eval.n_samples=1", "model.sampler.steps=1", "callbacks.grids.n=1", "trainer.precision=32-true"]


def bare(steps: int, batch: int) -> None:
    """The shortest loop that trains the same net: noise, mix, net, error, clip, step.

    Prints each step's seconds and the peak memory in MiB.
    """
    import torch
    from unet import ours

    torch.manual_seed(0)
    data = torch.rand(512, 3, 32, 32) * 2 - 1
    net = ours().train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-4, fused=True)
    seconds = []
    for step in range(steps):
        start = time.perf_counter()
        x = data[torch.arange(step * batch, (step + 1) * batch) % len(data)]
        eps, t = torch.randn_like(x), torch.rand(batch)
        alpha = torch.cos(t * torch.pi / 2)[:, None, None, None]
        sigma = torch.sin(t * torch.pi / 2)[:, None, None, None]
        loss = torch.nn.functional.mse_loss(net(alpha * x + sigma * eps, 999 * t), eps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bare", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bare is not None:
        bare(args.bare, args.batch)
        return
    again = [__file__, "--bare", str(args.steps + WARM), "--batch", str(args.batch)]
    loops = {
        "bare": lambda: json.loads(output(again)),
        "train.py": lambda: whole([*RECIPE, *SHORT], args.steps + WARM, args.batch),
    }
    compare(loops, args.rounds, args.batch)


if __name__ == "__main__":
    main()
