from __future__ import annotations

import pytest
import torch

from atelier.metrics.image import code_values, crop_border, luma, psnr, ssim


def test_psnr_of_a_known_error() -> None:
    """And of none, which counts as 100 dB: a mean stays finite."""
    targets = torch.full((3, 3, 16, 16), 100, dtype=torch.uint8)
    images = targets.clone()
    images[1] += 1  # mean squared error 1
    images[2, 0] += 10  # 100 / 3
    assert psnr(images, targets).tolist() == pytest.approx([100.0, 48.1308036, 32.9020162], rel=1e-6)


def test_ssim_of_flat_images_is_its_luminance_term() -> None:
    """Wang et al. 2004, eq. 6: with no variance, (2 a b + C1) / (a^2 + b^2 + C1)."""
    a, b, c1 = 60.0, 180.0, (0.01 * 255) ** 2
    images, targets = (torch.full((2, 1, 16, 16), int(level), dtype=torch.uint8) for level in (a, b))
    assert ssim(images, targets).tolist() == pytest.approx([(2 * a * b + c1) / (a * a + b * b + c1)] * 2, rel=1e-7)
    assert ssim(images, images).tolist() == pytest.approx([1.0] * 2)


def test_pairs_are_judged_one_by_one_outside_autocast() -> None:
    rng = torch.Generator().manual_seed(0)
    images, targets = (torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=rng) for _ in range(2))
    for measure in (psnr, ssim):
        alone = [measure(images[k : k + 1], targets[k : k + 1]).item() for k in range(4)]
        with torch.autocast("cpu", torch.bfloat16):
            assert measure(images, targets).tolist() == pytest.approx(alone, rel=1e-12)


def test_use_of_a_codebook() -> None:
    """Two codes of four, one three times as frequent: exp(H) = 4 / 3^(3/4)."""
    assert code_values(torch.tensor([[0, 2], [0, 0]]), 4) == {
        "codes/used": 0.5,
        "codes/perplexity": pytest.approx(4 / 3**0.75),
    }
    assert code_values(torch.arange(8), 8) == {"codes/used": 1.0, "codes/perplexity": pytest.approx(8.0)}


LUMA = {  # of MATLAB's rgb2ycbcr before rounding: the rows of its matrix, 65.481, 128.553 and 24.966, add up to 219
    (0, 0, 0): 16.0,
    (255, 255, 255): 235.0,
    (255, 0, 0): 81.481,
    (0, 255, 0): 144.553,
    (0, 0, 255): 40.966,
    (51, 102, 204): 16 + 13.0962 + 51.4212 + 19.9728,
}


def test_luma_of_known_colours() -> None:
    images = torch.tensor(list(LUMA), dtype=torch.uint8)[:, :, None, None].expand(-1, -1, 2, 3)
    found = luma(images)
    assert found.shape == (6, 1, 2, 3) and found.dtype == torch.float64
    expected = torch.tensor(list(LUMA.values()), dtype=torch.float64)[:, None, None, None]
    torch.testing.assert_close(found, expected.expand(-1, 1, 2, 3), rtol=0, atol=1e-12)


def test_luma_of_grey_is_that_of_equal_colours() -> None:
    grey = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(luma(grey), luma(grey.repeat(1, 3, 1, 1)))
    torch.testing.assert_close(luma(grey), 16 + 219 * grey.double() / 255)


def test_a_border_is_left_out() -> None:
    images = torch.arange(2 * 5 * 6).view(2, 1, 5, 6)
    assert crop_border(images, 2).tolist() == [[[[14, 15]]], [[[44, 45]]]]
    assert torch.equal(crop_border(images, 0), images)
