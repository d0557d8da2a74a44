"""What a piece of code costs a device, counted without one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class Counting(TorchDispatchMode):
    """Inside, what is computed is counted.

    `flop`: type of numbers -> floating-point operations of convolutions and products. `waits`: how often a number was
    read off a tensor, for which a CPU waits until a GPU has done all that it was given. `calls`: operation -> how
    often.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flop: Counter[torch.dtype] = Counter()
        self.calls: Counter[str] = Counter()

    @property
    def waits(self) -> int:
        return self.calls["_local_scalar_dense"]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.calls[func.overloadpacket.__name__] += 1
        if (flop := flop_registry.get(func.overloadpacket)) is not None:
            kind = next(x.dtype for x in tree_leaves(args) if isinstance(x, Tensor))
            self.flop[kind] += flop(*args, **kwargs, out_val=out)
        return out
