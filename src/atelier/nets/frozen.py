"""A net that is used and never trained, and weights that are never trained in half the memory."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

HALF = torch.bfloat16
HALVED = (nn.Linear, nn.Conv2d, nn.Embedding)  # nearly all weights of a net; norms stay as they are


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


def halved(net: nn.Module) -> list[str]:
    """Hold the weights of layers that take no gradients in bf16 from here on; gives the names of these layers.

    Such a layer computes in bf16, as autocast has it, also where autocast is off; then it takes and gives float32 all
    the same. Layers that take gradients, adapters on halved ones (`nets/lora.py`), norms and numbers of a net itself
    stay in float32. What is rounded once stays: a state dict holds bf16, and comes back to the bit. Adapters that are
    merged into halved weights are rounded with them.
    """
    found = []
    for name, layer in net.named_modules():
        own = list(layer.parameters(recurse=False))
        if isinstance(layer, HALVED) and own and not any(p.requires_grad or p.dtype == HALF for p in own):
            for weight in own:
                weight.data = weight.data.to(HALF)
            layer.register_forward_pre_hook(_narrowed)
            layer.register_forward_hook(_widened, prepend=True)  # before adapters add to it
            found.append(name)
    return found


def _narrowed(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """The input in the precision of the weights, where autocast does not see to it."""
    x = inputs[0]
    return (x.to(HALF),) if x.is_floating_point() and not _autocast(x) else None


def _widened(layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """The output in float32, but where autocast wants it as it is."""
    return out if _autocast(out) and not isinstance(layer, nn.Embedding) else out.float()


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)
