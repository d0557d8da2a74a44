"""What a net must be to denoise: any net that keeps this contract does for a diffusion model."""

from __future__ import annotations

import inspect
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from atelier.core.condition import Condition, Embedder
from atelier.core.errors import UserError

ARGUMENTS = {"vector": "cond_dim", "tokens": "token_dim", "planes": "plane_channels"}  # a field -> its size in nets
WITHOUT = {"vector": "null", "tokens": "null", "planes": "0"}


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


def cond_sizes(cond_dim: int | None, token_dim: int | None, plane_channels: int) -> dict[str, int]:
    """What a net takes of a condition, as `Condition.sizes` tells it, by the arguments that say how large each is."""
    sizes = {"vector": cond_dim, "tokens": token_dim, "planes": plane_channels}
    return {name: size for name, size in sizes.items() if size}


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
    name_of_net, name_of_embedder = type(net).__name__, type(embedder).__name__
    for name, size in taken.items():
        option, another = _option(net, name, key), f"{key}._target_=atelier.nets.unet.UNet"
        if name not in given:
            problem = f"{name_of_net} takes {name}, {name_of_embedder} gives none"
            fix = f"{option}={WITHOUT[name]}" if option else another
            raise UserError(".embedder", name_of_embedder, problem, fix)
        if given[name] != size:
            problem = f"the embedder gives {name} of size {given[name]}, the net takes {size}"
            fix = f"{option}={given[name]}" if option else another
            raise UserError(option or key, size if option else name_of_net, problem, fix)
    ignored = [name for name in given if name not in taken]
    if ignored and embedder.conditions:
        problem = f"it takes no {ignored[0]} and would ignore {', '.join(embedder.conditions)}"
        option = _option(net, ignored[0], key)
        fix = f"{option}={given[ignored[0]]}" if option else "data.conditions=[]"
        raise UserError(key, name_of_net, problem, fix)


def _option(net: DenoisingNet, name: str, key: str) -> str | None:
    """The option that says how large a field is that the net takes; None where its kind has no such argument."""
    argument = ARGUMENTS[name]
    return f"{key}.{argument}" if argument in inspect.signature(type(net)).parameters else None
