"""What a net must be to denoise: any net that keeps this contract does for a diffusion model."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from atelier.core.condition import Condition
from atelier.core.errors import UserError


@runtime_checkable
class DenoisingNet(Protocol):
    """(x, time, cond) -> a map like x; `shape` is that of one x, (C, H, W)."""

    shape: tuple[int, int, int]

    def __call__(self, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
        """x (B, C, H, W), time (B,) about 0 .. 1000, cond of B images -> (B, C, H, W)."""
        ...


def denoises(net: Any, key: str) -> None:
    """Raises UserError where the net that was given as `key` does not say the shape of what it denoises."""
    if not isinstance(net, DenoisingNet):
        problem = "it is no denoising net: it has no shape (C, H, W)"
        raise UserError(key, type(net).__name__, problem, f"{key}._target_=atelier.nets.unet.UNet")
