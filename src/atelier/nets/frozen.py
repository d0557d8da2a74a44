"""A net that is used and never trained."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

from torch import nn


class Frozen(nn.Module):
    """Holds a net in eval mode without gradients, outside parameters(), state_dict, DDP, EMA and the optimizer.

    The net still moves with its owner: device and dtype changes are passed on. Hold plain nets, not LightningModules,
    whose `device` would go stale. A copy has modules of its own and shares what is never trained, so that an average of
    the owner costs no second net.
    """

    net: nn.Module

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "net", net.eval().requires_grad_(False))

    def _apply(self, fn: Callable, recurse: bool = True) -> Frozen:
        super()._apply(fn, recurse)
        self.net._apply(fn)
        return self

    def __deepcopy__(self, memo: dict) -> Frozen:
        never = (t for t in itertools.chain(self.net.parameters(), self.net.buffers()) if not t.requires_grad)
        memo |= {id(tensor): tensor for tensor in never}
        made = Frozen.__new__(Frozen)
        memo[id(self)] = made
        nn.Module.__init__(made)
        object.__setattr__(made, "net", copy.deepcopy(self.net, memo))
        return made
