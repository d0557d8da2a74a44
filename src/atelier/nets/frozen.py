"""A net that is used and never trained."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


class Frozen(nn.Module):
    """Holds a net in eval mode without gradients, outside parameters(), state_dict, DDP, EMA and the optimizer.

    The net still moves with its owner: device and dtype changes are passed on. Hold plain nets, not LightningModules,
    whose `device` would go stale.
    """

    net: nn.Module

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "net", net.eval().requires_grad_(False))

    def _apply(self, fn: Callable, recurse: bool = True) -> Frozen:
        super()._apply(fn, recurse)
        self.net._apply(fn)
        return self
