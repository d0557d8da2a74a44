"""One rank of two: the gradients of adapters on its half of a batch, averaged by DDP. Started by test_lora.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from atelier.core.condition import Condition
from atelier.nets import lora
from atelier.nets.unet import UNet
from tests.nets.test_spatial_transformer import TINY, shaken

RANKS = 2


def adapted(checkpointing: bool) -> UNet:
    """A U-Net of tokens with adapters on linear layers, parts of them and convolutions, moved off their start."""
    torch.manual_seed(0)
    options = {"multipliers": [1, 2], "attention": [8], "heads": 2, "checkpointing": checkpointing}
    net = shaken(UNet(**TINY | options))
    lora.add(net, name="style", targets=["qkv.q", "kv", "out", "proj_in"], rank=2, alpha=3)
    lora.add(net, name="style", targets=[r"down\..*\.conv\d?", "skip"], rank=3, alpha=1)
    for block in lora.adapters(net, "style").values():
        nn.init.normal_(block.up.weight, std=0.1)
    return net


def gradients(net: nn.Module, share: slice) -> dict[str, Tensor]:
    """Of the mean over a share of one batch of 4, by the name of the weight in the net that may be wrapped."""
    generator = torch.Generator().manual_seed(1)
    x, tokens = torch.randn(4, 4, 8, 8, generator=generator), torch.randn(4, 5, 16, generator=generator)
    cond = Condition(tokens=tokens[share])
    net(x[share], torch.arange(4.0)[share], cond).square().flatten(1).mean(1).mean().backward()
    return {n.removeprefix("module."): p.grad for n, p in net.named_parameters() if p.grad is not None}


def main() -> None:
    rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
    torch.distributed.init_process_group("gloo")
    found = {}
    for checkpointing in (False, True):
        n = 4 // RANKS
        told = gradients(DistributedDataParallel(adapted(checkpointing)), slice(rank * n, rank * n + n))
        found |= {f"{checkpointing} {name}": gradient for name, gradient in told.items()}
    torch.save(found, folder / f"gradients_{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
