"""A net of convolutions on overlapping tiles of a large map, one after another: memory of a tile, not of the map.

Tiles overlap by a quarter of their side, over which one fades into the next. What a layer makes of the whole map, as
the norms and the attention of an autoencoder, it makes of a tile here: results differ a little, and where a net has
neither they differ near the seams alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

OVERLAP = 4  # a quarter


def by_tiles(work: Callable[[Tensor], Tensor], x: Tensor, tile: int) -> Tensor:
    """What `work` makes of maps x (B, C, H, W), (B, C', r H, r W); x itself goes in where no side exceeds a tile.

    Args:
        work: map of a part of x to the same part of the result, r times as large, where r tile divides by 4.
        tile: side of a tile, a multiple of 4.
    """
    if max(x.shape[2:]) <= tile:
        return work(x)
    step = tile - tile // OVERLAP
    above: list[Tensor] = []
    rows = []
    for top in range(0, x.shape[2], step):
        row: list[Tensor] = []
        for left in range(0, x.shape[3], step):
            part = x[:, :, top : top + tile, left : left + tile]
            made = work(part)
            side = tile * made.shape[3] // part.shape[3]
            if above:
                made = _faded(above[len(row)], made, side // OVERLAP, 2)
            if row:
                made = _faded(row[-1], made, side // OVERLAP, 3)
            row.append(made)
        above, kept = row, side - side // OVERLAP
        rows.append(torch.cat([made[:, :, :kept, :kept] for made in row], 3))
    return torch.cat(rows, 2)


def _faded(before: Tensor, tile: Tensor, overlap: int, dim: int) -> Tensor:
    """A tile that begins as the one before it, along `dim`, ended."""
    n = min(overlap, tile.shape[dim], before.shape[dim])
    share = (torch.arange(n, device=tile.device) / n).view(-1, *[1] * (3 - dim))
    start = before.narrow(dim, before.shape[dim] - overlap, n).lerp(tile.narrow(dim, 0, n), share.to(tile.dtype))
    return torch.cat([start, tile.narrow(dim, n, tile.shape[dim] - n)], dim)
