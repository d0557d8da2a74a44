"""How near an image is to the one it should be: PSNR and SSIM of 8-bit images, in float64 on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from atelier.nets.quantizers import perplexity

WINDOW = 11  # pixels a side that SSIM looks at
EQUAL = 100.0  # dB that an equal pair counts as, so that one does not make a mean infinite


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair, 10 log10(255^2 / MSE) dB, but no more than EQUAL.

    Args:
        images, targets: (N, C, H, W) uint8.

    Returns:
        (N,) float64.
    """
    pair = images.cpu().double(), targets.cpu().double()
    return peak_signal_noise_ratio(*pair, data_range=255.0, reduction="none", dim=(1, 2, 3)).clamp(max=EQUAL)


def ssim(images: Tensor, targets: Tensor, inside: bool = False) -> Tensor:
    """Structural similarity of each pair (Wang et al. 2004, eq. 13): Gaussian window of 11 px, sigma 1.5.

    Args:
        images, targets: (N, C, H, W), grey levels 0 .. 255, at least 11 px a side.
        inside: the mean over places whose window lies inside of the image, as Wang's own code and the literature of
            super-resolution have it; else over all, the image mirrored at its edge.

    Returns:
        (N,) float64, at most 1.
    """
    maps = [
        structural_similarity_index_measure(
            a.cpu().double(), b.cpu().double(), data_range=255.0, reduction="none", return_full_image=True
        )[1]
        for a, b in zip(images.split(64), targets.split(64), strict=True)
    ]
    every = torch.cat(maps)
    return (crop_border(every, WINDOW // 2) if inside else every).mean((1, 2, 3))


def code_values(codes: Tensor, n_codes: int) -> dict[str, float]:
    """Use of a codebook of n_codes entries by codes (N, ...) int64 of many images.

    Returns:
        `codes/used`: share of the entries that occur; `codes/perplexity`: exp of the entropy of their frequencies,
        n_codes where all are as frequent.
    """
    used = len(codes.unique()) / n_codes
    return {"codes/used": used, "codes/perplexity": perplexity(codes, n_codes).item()}


def crop_border(images: Tensor, border: int) -> Tensor:
    """Images (N, C, H, W) without `border` pixels at each side."""
    return images[..., border : images.shape[-2] - border, border : images.shape[-1] - border]


def luma(images: Tensor) -> Tensor:
    """Y of ITU-R BT.601 in its studio range 16 .. 235, as MATLAB's rgb2ycbcr has it, of RGB images; float64.

    Y = 16 + (65.481 R + 128.553 G + 24.966 B) / 255, with R, G, B in 0 .. 255; not rounded. Grey images are R = G = B.

    Args:
        images: (N, 1 or 3, H, W) uint8.

    Returns:
        (N, 1, H, W) float64.
    """
    r, g, b = images.double().expand(-1, 3, -1, -1).unbind(1)
    return (16 + (65.481 * r + 128.553 * g + 24.966 * b) / 255)[:, None]
