"""Images made larger and smaller as papers on super-resolution do: bicubic with antialiasing, as MATLAB's imresize."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

A = -0.5  # of the cubic kernel (Keys 1981, eq. 4)


def enlarged(images: Tensor, scale_factor: int) -> Tensor:
    """(N, C, H, W) float to (N, C, factor H, factor W), not clamped."""
    height, width = images.shape[-2:]
    return _along(_along(images, height, height * scale_factor).mT, width, width * scale_factor).mT


def reduced(images: Tensor, scale_factor: int) -> Tensor:
    """(N, C, H, W) float to (N, C, H / factor, W / factor), through a kernel as many times as wide; not clamped."""
    height, width = images.shape[-2:]
    return _along(_along(images, height, height // scale_factor).mT, width, width // scale_factor).mT


def _along(x: Tensor, n_in: int, n_out: int) -> Tensor:
    """The rows (second to last axis) of x, n_in to n_out of them."""
    return _weights(n_in, n_out).to(x) @ x


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept may be needed where gradients are
def _weights(n_in: int, n_out: int) -> Tensor:
    """(n_out, n_in) float64: the share of each old row in each new one; beyond the edge the image is mirrored."""
    scale = n_out / n_in
    wide = max(1.0, 1 / scale)  # antialiasing: the kernel spans as many old rows as one new row covers
    centre = (torch.arange(n_out, dtype=torch.float64) + 0.5) / scale - 0.5
    reach = int(4 * wide) + 2
    first = (centre - 2 * wide).floor().long()
    rows = first[:, None] + torch.arange(reach)  # (n_out, reach)
    share = _cubic((centre[:, None] - rows) / wide)
    share = share / share.sum(1, keepdim=True)
    inside = rows.remainder(2 * n_in)  # ... 1 0 | 0 1 2 ... n-1 | n-1 n-2 ...
    inside = torch.where(inside < n_in, inside, 2 * n_in - 1 - inside)
    return torch.zeros(n_out, n_in, dtype=torch.float64).scatter_add_(1, inside, share)


def _cubic(x: Tensor) -> Tensor:
    """Keys' kernel: 1 at 0, 0 at the other whole numbers and beyond 2."""
    x = x.abs()
    near = (A + 2) * x**3 - (A + 3) * x**2 + 1
    far = A * x**3 - 5 * A * x**2 + 8 * A * x - 4 * A
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))
