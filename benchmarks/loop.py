"""The whole training loop of train.py, with logging and EMA, beside a bare loop on the same net.

    python benchmarks/loop.py                     # the paper's CIFAR-10 net, batch 32, 9 steps of each in turns

A checkpoint comes once in 80,000 steps of this recipe: its seconds are not in these.
"""

from __future__ import annotations

import beside
from omegaconf import DictConfig

WORDS = ["experiment=cifar10_ddpm", "data=shapes", "data.image_size=32", "data.flip=false", "metrics=none"]
WORDS += [
    "eval.n_samples=1",
    "model.sampler.steps=1",
    "callbacks.grids.n=1",
    "trainer=cpu",
    "trainer.precision=32-true",
]


def make(cfg: DictConfig) -> beside.Step:
    """The shortest step that trains the same net: noise, mix, net, error, clip, step."""
    import torch
    from unet import ours

    batch = cfg.data.batch_size
    torch.manual_seed(0)
    data = torch.rand(512, 3, 32, 32) * 2 - 1
    net = ours().train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-4, fused=True)

    def step(i: int) -> None:
        x = data[torch.arange(i * batch, (i + 1) * batch) % len(data)]
        eps, t = torch.randn_like(x), torch.rand(batch)
        alpha = torch.cos(t * torch.pi / 2)[:, None, None, None]
        sigma = torch.sin(t * torch.pi / 2)[:, None, None, None]
        loss = torch.nn.functional.mse_loss(net(alpha * x + sigma * eps, 999 * t), eps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()

    return step


if __name__ == "__main__":
    beside.main(__doc__.splitlines()[0], WORDS, make, batch=32, steps=9)
