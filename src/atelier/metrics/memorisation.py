"""Whether samples lie nearer to the training images than images do that were never trained on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 8  # of a thumbnail
Z = 1.96  # standard errors on either side of a mean, of 95 %


def thumbnails(images: Tensor) -> Tensor:
    """Features where no net is at hand: 8 x 8 mean colours, (B, 64 C) float32 on the CPU of (B, C, H, W) uint8.

    They find copies, and take what is blurred for nearer than it is: a net's features say more.
    """
    return F.adaptive_avg_pool2d(images.cpu().float() / 255, SIDE).flatten(1)


def nearest(points: Tensor, others: Tensor, chunk: int = 1024) -> Tensor:
    """Distance of each of the points (N, D) to the nearest of the others (M, D), (N,) float64."""
    others = others.cpu().double()
    return torch.cat([torch.cdist(part, others).amin(1) for part in points.cpu().double().split(chunk)])


def nearer(samples: Tensor, heldout: Tensor) -> tuple[float, float]:
    """Chance that a sample's distance is smaller than a held-out image's, ties counted half; and its 95 % half-width.

    That is the area under the ROC curve of telling one from the other by the distance: 0.5 where they are alike, 1
    where every sample is nearer. The deviation is that of DeLong et al. 1988.

    Args:
        samples: distances of samples to their nearest training image, (N,).
        heldout: those of images that were not trained on, (M,).
    """
    a, b = samples.double()[:, None], heldout.double()[None]
    won = (a < b).double() + (a == b).double() / 2  # (N, M)
    variance = sum(side.var() / len(side) for side in (won.mean(1), won.mean(0)))
    return won.mean().item(), Z * float(variance) ** 0.5
