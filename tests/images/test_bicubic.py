"""MATLAB's bicubic, beside a direct sum written down pixel by pixel and beside torch's where no edge is near."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from atelier.images.bicubic import enlarged, reduced


def images(height: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    rng = torch.Generator().manual_seed(height * width)
    return 2 * torch.rand(2, 3, height, width, generator=rng, dtype=dtype) - 1


def cubic(x: float) -> float:
    """Keys 1981, eq. 15: the kernel that gives quadratics back."""
    x = abs(x)
    if x <= 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def line(values: list[float], n_out: int) -> list[float]:
    """One row resized: pixel centres lie at whole numbers and a half, rows continue mirrored about their edges."""
    n_in, found = len(values), []
    stretch = max(1.0, n_in / n_out)
    for i in range(n_out):
        place = (i + 0.5) * n_in / n_out - 0.5
        total = weights = 0.0
        for k in range(math.floor(place - 2 * stretch) - 1, math.ceil(place + 2 * stretch) + 2):
            weight = cubic((place - k) / stretch)
            period = k % (2 * n_in)
            total += weight * values[period if period < n_in else 2 * n_in - 1 - period]
            weights += weight
        found.append(total / weights)
    return found


def direct(x: Tensor, height: int, width: int) -> Tensor:
    """Every row of every image by itself, then every column."""
    rows = torch.tensor([[[line(row.tolist(), width) for row in c] for c in image] for image in x], dtype=torch.float64)
    columns = [[[line(column.tolist(), height) for column in c.T] for c in image] for image in rows]
    return torch.tensor(columns, dtype=torch.float64).mT


@pytest.mark.parametrize("scale_factor", [2, 3, 4])
@pytest.mark.parametrize("shape", [(12, 24), (36, 12)])
def test_beside_a_direct_sum(scale_factor: int, shape: tuple[int, int]) -> None:
    height, width = shape
    x = images(height, width)
    small, large = (
        direct(x, height // scale_factor, width // scale_factor),
        direct(x, height * scale_factor, width * scale_factor),
    )
    torch.testing.assert_close(reduced(x, scale_factor), small, rtol=0, atol=1e-12)
    torch.testing.assert_close(enlarged(x, scale_factor), large, rtol=0, atol=1e-12)
    torch.testing.assert_close(reduced(x.float(), scale_factor).double(), small, rtol=0, atol=1e-6)
    torch.testing.assert_close(enlarged(x.float(), scale_factor).double(), large, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale_factor", [2, 4])
def test_beside_torch_where_no_edge_is_near(scale_factor: int) -> None:
    """torch leaves out what lies beyond an edge, MATLAB mirrors it; two pixels inside nothing is left of that."""
    x = images(64, 48)
    size = (64 // scale_factor, 48 // scale_factor)
    theirs = F.interpolate(x, size=size, mode="bicubic", antialias=True)
    inside = (..., slice(2, -2), slice(2, -2))
    ours = reduced(x, scale_factor)
    torch.testing.assert_close(ours[inside], theirs[inside], rtol=0, atol=1e-6)
    assert (ours - theirs).abs().max() > 1e-3


@pytest.mark.parametrize("scale_factor", [2, 3, 4])
def test_what_is_constant_stays_so(scale_factor: int) -> None:
    x = torch.full((1, 1, 12, 12), 0.3, dtype=torch.float64)
    for resized in (reduced(x, scale_factor), enlarged(x, scale_factor)):
        torch.testing.assert_close(resized, torch.full_like(resized, 0.3), rtol=0, atol=1e-14)


def test_a_quadratic_comes_back_enlarged_inside() -> None:
    """Keys' kernel interpolates quadratics without error."""
    x, y = torch.arange(16, dtype=torch.float64), (torch.arange(64, dtype=torch.float64) + 0.5) / 4 - 0.5
    told = enlarged((x**2 - 3 * x).expand(1, 1, 16, 16), 4)
    torch.testing.assert_close(told[0, 0, 0, 12:-12], (y**2 - 3 * y)[12:-12])


def test_sizes_that_do_not_divide_are_rounded_down() -> None:
    assert reduced(images(13, 15), 4).shape == (2, 3, 3, 3)
