"""The pyramid beside matrices, LPIPS from files, ranges, and float32 where it matters."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from atelier.core.errors import UserError
from atelier.losses.perceptual import LPIPS, Pyramid, VGGFeatures
from atelier.nets.vgg import VGG19, vgg
from tests.counting import Counting


def images(seed: int, size: int = 16, channels: int = 3) -> Tensor:
    return 2 * torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(seed)) - 1


def halving(n: int) -> Tensor:
    """(n / 2, n): output i weighs pixels 2 i - 1 .. 2 i + 2 by 1, 3, 3, 1 eighths, the border repeated."""
    matrix = torch.zeros(n // 2, n, dtype=torch.float64)
    for i in range(n // 2):
        for offset, weight in zip(range(-1, 3), (1, 3, 3, 1), strict=True):
            matrix[i, min(max(2 * i + offset, 0), n - 1)] += weight / 8
    return matrix


def doubling(n: int) -> Tensor:
    """(2 n, n): pixel i lies at (i + 1/2) / 2 - 1/2 between two of the smaller, the border repeated."""
    matrix = torch.zeros(2 * n, n, dtype=torch.float64)
    for i in range(2 * n):
        place = (i + 0.5) / 2 - 0.5
        low = int(place // 1)
        for k, weight in ((low, 1 - (place - low)), (low + 1, place - low)):
            matrix[i, min(max(k, 0), n - 1)] += weight
    return matrix


@pytest.mark.parametrize(("levels", "size"), [(1, 16), (3, 16), (9, 8)])
def test_the_pyramid_is_that_of_matrices(levels: int, size: int) -> None:
    x, y = images(0, size), images(1, size)
    rest, expected = (x - y).double(), torch.zeros(2, dtype=torch.float64)
    for _ in range(levels):
        n = rest.shape[-1]
        if n < 4:
            break
        low = halving(n) @ rest @ halving(n).T
        band = rest - doubling(n // 2) @ low @ doubling(n // 2).T
        expected, rest = expected + band.abs().mean((1, 2, 3)), low
    expected = expected + rest.abs().mean((1, 2, 3))
    torch.testing.assert_close(Pyramid(n_levels=levels)(x, y).double(), expected, rtol=1e-5, atol=1e-6)


def test_the_pyramid_counts_areas_and_edges() -> None:
    """A constant c costs c; stripes of one pixel cost as much again, which the mean of pixels alone would not tell."""
    pyramid, flat = Pyramid(n_levels=3), torch.zeros(1, 3, 64, 64)
    assert pyramid(flat, flat).item() == 0
    assert pyramid(flat, flat + 0.5).item() == pytest.approx(0.5)
    noise = images(3, 64)[:1]
    assert pyramid(noise, flat) > 1.1 * noise.abs().mean()
    assert torch.equal(pyramid(noise, flat), pyramid(flat, noise))


def test_the_pyramid_is_float32_under_bf16() -> None:
    x, y, pyramid = images(0), images(1), Pyramid(n_levels=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pyramid(x, y), pyramid.float()(x, y)) and pyramid(x, y).dtype == torch.float32
        assert torch.mm(x[0, 0], y[0, 0]).dtype == torch.bfloat16  # autocast was on
    assert not pyramid.state_dict() and not list(pyramid.parameters())


@pytest.fixture(scope="module")
def lpips(lpips_files: dict[str, str]) -> LPIPS:
    return LPIPS(**lpips_files)


def test_lpips_is_outside_of_what_is_trained_and_saved(lpips: LPIPS) -> None:
    assert not lpips.state_dict() and not list(lpips.parameters())
    net = lpips.train().net.net
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    y = images(1).requires_grad_()
    lpips(images(0), y).sum().backward()
    assert y.grad.abs().sum() > 0


def test_lpips_is_float32_under_bf16(lpips: LPIPS) -> None:
    expected = lpips(images(0), images(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lpips(images(0), images(1)), expected)
    assert expected.shape == (2,) and expected.dtype == torch.float32


def test_lpips_wants_minus_one_to_one(lpips_files: dict[str, str]) -> None:
    """The same images in [0, 1] have another distance; the first batch gives the mistake away."""
    x, y = images(0), images(1)
    lpips = LPIPS(**lpips_files)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        right = lpips(x, y)
    assert torch.equal(right, lpips.net.net(x, y))  # which tests/nets/test_lpips.py compares in [-1, 1]
    assert ((lpips((x + 1) / 2, (y + 1) / 2) - right).abs() / right > 0.05).all()
    with pytest.warns(UserWarning, match=r"as in \[0, 1\]"):
        LPIPS(**lpips_files)((x + 1) / 2, (y + 1) / 2)
    with pytest.raises(ValueError, match=r"\[-1, 1\]"):
        LPIPS(**lpips_files)(127.5 * x + 127.5, y)
    LPIPS(**lpips_files)(x, 3 * y)  # what a net makes may lie outside


@pytest.mark.parametrize("key", ["vgg", "heads"])
def test_a_file_that_is_not_there_or_broken_is_one_line(key: str, lpips_files: dict[str, str], tmp_path: Path) -> None:
    other = {"vgg": "heads", "heads": "vgg"}[key]
    (tmp_path / "cut.pth").write_bytes(Path(lpips_files[key]).read_bytes()[:1000])
    for path, problem in ((tmp_path / "none.pth", "no such file"), (tmp_path / "cut.pth", "it is cut"),
                          (lpips_files[other], "it holds other layers")):  # fmt: skip
        with pytest.raises(UserError) as caught:
            LPIPS(**(lpips_files | {key: str(path)}))
        line = caught.value.line()
        assert line.startswith(f"error: .{key}=") and problem in line


def vgg_loss(folder: Path) -> VGGFeatures:
    torch.manual_seed(0)
    torch.save({f"features.{name}": v for name, v in vgg(VGG19)[:-1].state_dict().items()}, folder / "vgg19.pth")
    return VGGFeatures(vgg=str(folder / "vgg19.pth"))


@pytest.mark.parametrize("which", ["lpips", "vgg"])
def test_nothing_goes_back_through_true_images(which: str, lpips: LPIPS, tmp_path: Path) -> None:
    """What was made has the gradient that it has in one pass with them, and costs three passes, not four."""
    distance = lpips if which == "lpips" else vgg_loss(tmp_path)
    x, y = images(0), images(1).requires_grad_()
    with Counting() as counted:
        apart = distance(x, y)
        apart.sum().backward()
    alone = Counting()
    with alone, torch.no_grad():
        together = distance(x, y)
    assert torch.equal(apart, together)
    pass_of_one = alone.flop[torch.float32] / 2
    assert counted.flop[torch.float32] == pytest.approx(3 * pass_of_one, rel=0.02)
    z = images(0).requires_grad_()  # in one pass where both take gradients
    one = distance(z, again := images(1).requires_grad_())
    one.sum().backward()
    assert torch.equal(one, apart) and torch.equal(again.grad, y.grad) and z.grad.abs().sum() > 0
