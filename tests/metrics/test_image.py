from __future__ import annotations

import pytest
import torch

from atelier.metrics.image import code_values, psnr, ssim


def test_psnr_of_a_known_error() -> None:
    targets = torch.full((3, 3, 16, 16), 100, dtype=torch.uint8)
    images = targets.clone()
    images[1] += 1  # mean squared error 1
    images[2, 0] += 10  # 100 / 3
    assert psnr(images, targets).tolist() == pytest.approx([torch.inf, 48.1308036, 32.9020162], rel=1e-6)


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
