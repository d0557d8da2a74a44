"""What a net must be to denoise: any net that keeps this contract does for a diffusion model."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from atelier.core.condition import Condition, Embedder
from atelier.core.errors import UserError


@runtime_checkable
class DenoisingNet(Protocol):
    """(x, time, cond) -> a map like x; `shape` is that of one x, (C, H, W).

    `cond_sizes` says which fields of a condition it takes and how large each is, as `Condition.sizes` does.
    """

    shape: tuple[int, int, int]
    cond_sizes: dict[str, int]

    def __call__(self, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
        """x (B, C, H, W), time (B,) about 0 .. 1000, cond of B images -> (B, C, H, W)."""
        ...


def denoises(net: Any, key: str) -> None:
    """Raises UserError where the net that was given as `key` does not say the shape of what it denoises."""
    if not isinstance(net, DenoisingNet):
        problem = "it is no denoising net, which has a shape (C, H, W) and cond_sizes"
        raise UserError(key, type(net).__name__, problem, f"{key}._target_=atelier.nets.unet.UNet")


def conditioned_by(net: DenoisingNet, embedder: Embedder, key: str) -> None:
    """Raises UserError where the net that was given as `key` would ignore conditions that its embedder gives.

    What an embedder without conditions gives says nothing, and a net need not take it.
    """
    taken, given = net.cond_sizes, embedder.cond_sizes
    for name, size in taken.items():
        if name not in given:
            problem = f"{type(net).__name__} takes {name}, {type(embedder).__name__} gives none"
            raise UserError(".embedder", type(embedder).__name__, problem, f"{key}._target_=atelier.nets.unet.UNet")
        if given[name] != size:
            problem = f"the embedder gives {name} of size {given[name]}, the net takes {size}"
            raise UserError(f"{key}.cond_dim", size, problem, f"{key}.cond_dim={given[name]}")
    ignored = [name for name in given if name not in taken]
    if ignored and embedder.conditions:
        problem = f"it takes no {ignored[0]} and would ignore {', '.join(embedder.conditions)}"
        fix = f"{key}.cond_dim={given['vector']}" if ignored[0] == "vector" else "data.conditions=[]"
        raise UserError(key, type(net).__name__, problem, fix)
