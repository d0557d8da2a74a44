"""Where in an image each token is looked at, for drawing. B batch, N = H W places of a map, T tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atelier.nets.layers import CrossAttention


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """How much each place of one cross-attention looks at each token.

    Args:
        weights: softmax over tokens, the mean over heads, (B, N, T) float32; places row by row; zeros where an image
            has no token.
        height: rows of places.
        width: places of a row.
    """

    weights: Tensor
    height: int
    width: int


@contextmanager
def attention_maps(net: nn.Module) -> Iterator[list[AttentionMap]]:
    """Within, each cross-attention of the net adds its map to the list that is given, one a call, in their order.

    What the net gives stays the same. A net with `checkpointing` that goes back within adds those of what it computes
    again; a net without tokens adds none.
    """
    found: list[AttentionMap] = []

    def watch(weights: Tensor, height: int) -> None:
        found.append(AttentionMap(weights.detach(), height, weights.shape[1] // height))

    layers = [layer for layer in net.modules() if isinstance(layer, CrossAttention)]
    before = [layer.watch for layer in layers]
    for layer in layers:
        layer.watch = watch
    try:
        yield found
    finally:
        for layer, earlier in zip(layers, before, strict=True):
            layer.watch = earlier


def joined(found: list[AttentionMap], n: int) -> Tensor:
    """The mean of maps of several sizes at that of the largest, of the last n of their images, (n, T, H, W).

    The last are those with a condition, which guidance puts behind those without.
    """
    size = max((one.height, one.width) for one in found)
    maps = (one.weights[-n:].transpose(1, 2).unflatten(2, (one.height, one.width)) for one in found)
    return torch.stack([F.interpolate(one, size=size, mode="bilinear") for one in maps]).mean(0)
