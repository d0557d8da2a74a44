"""Distances between two sets of features: Frechet, kernel, precision and recall, and the inception score.

Features arrive gathered from all ranks and sorted by image number, and are compared in float64 on the CPU: any
number of ranks gives the same value. A set with NaN or infinite features has the value NaN, which is never
best. Random subsets are drawn from a fixed seed, and the default generator is left as it was.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from atelier.core.errors import UserError

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
IS_SPLITS = 10
NEIGHBOURS = 3
LEAST = {"fid": 2, "kid": 2, "is": IS_SPLITS, "precision": NEIGHBOURS + 1, "recall": NEIGHBOURS + 1}  # images a side
_SEED = 0


def fid(real: Tensor, fake: Tensor) -> float:
    """Frechet distance of the Gaussians with the two sets' moments (Heusel et al. 2017, eq. 6):

    |mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)). Called FID only for features of the published
    Inception.

    Args:
        real, fake: (N, D) and (M, D) features; fewer images than features are allowed.

    Raises:
        UserError: fewer than 2 images on either side.
    """
    _need(LEAST["fid"], "a Frechet distance", real, fake)
    if not _finite(real, fake):
        return math.nan
    metric = FrechetInceptionDistance(_Given(real.shape[1]), sync_on_compute=False)
    _update(metric, real, fake)
    return metric.compute().item()


def kid(real: Tensor, fake: Tensor) -> float:
    """Unbiased squared MMD with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018), mean over subsets.

    100 subsets of 1,000 images; of sets that are smaller, all images.

    Args:
        real, fake: (N, D) and (M, D) features.

    Raises:
        UserError: fewer than 2 images on either side.
    """
    _need(LEAST["kid"], "a kernel distance", real, fake)
    if not _finite(real, fake):
        return math.nan
    size = min(KID_SUBSET_SIZE, len(real), len(fake))
    subsets = 1 if len(real) == len(fake) == size else KID_SUBSETS
    with _quiet():
        given = _Given(real.shape[1])
        metric = KernelInceptionDistance(given, subsets, size, sync_on_compute=False)
    _update(metric, real, fake)
    return _seeded(metric)


def inception_score(logits: Tensor) -> float:
    """exp E KL(p(y|x) || p(y)) (Salimans et al. 2016, section 4), mean over 10 splits.

    Args:
        logits: (N, classes) of a classifier.

    Raises:
        UserError: fewer than 10 images.
    """
    _need(LEAST["is"], "an inception score", logits)
    if not _finite(logits):
        return math.nan
    with _quiet():
        metric = InceptionScore(_Given(logits.shape[1]), IS_SPLITS, sync_on_compute=False)
    metric.update(logits.cpu().double())
    return _seeded(metric)


def precision_recall(real: Tensor, fake: Tensor, chunk: int = 2048) -> tuple[float, float]:
    """Share of fakes in the manifold of the reals, and of reals in that of the fakes.

    Kynkaanniemi et al. 2019, eqs 1 and 2. A manifold is the union of balls round its images, each reaching the
    third nearest other image.

    Args:
        real, fake: (N, D) and (M, D) features.
        chunk: rows of the distance matrix held at once.

    Raises:
        UserError: fewer than 4 images on either side.
    """
    _need(LEAST["precision"], "precision and recall", real, fake)
    if not _finite(real, fake):
        return math.nan, math.nan
    real, fake = real.cpu().double(), fake.cpu().double()
    return _inside(fake, real, chunk), _inside(real, fake, chunk)


def _inside(points: Tensor, manifold: Tensor, chunk: int) -> float:
    """Share of `points` that lie in a ball of `manifold`."""
    near = [torch.cdist(part, manifold).kthvalue(NEIGHBOURS + 1).values for part in manifold.split(chunk)]
    radii = torch.cat(near)  # the nearest of all is the image itself
    found = [(torch.cdist(part, manifold) <= radii).any(dim=1) for part in points.split(chunk)]
    return torch.cat(found).double().mean().item()


class _Given(nn.Module):
    """Stands where torchmetrics wants a feature net: the features are there already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _update(metric: Metric, real: Tensor, fake: Tensor) -> None:
    metric.update(real.cpu().double(), real=True)
    metric.update(fake.cpu().double(), real=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torchmetrics' reminder that features take memory."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Metric .* will save all extracted features")
        yield


def _seeded(metric: Metric) -> float:
    """The first of (mean, deviation) with subsets drawn from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_SEED)
        return metric.compute()[0].item()


def _finite(*sets: Tensor) -> bool:
    return all(bool(features.isfinite().all()) for features in sets)


def _need(least: int, what: str, *sets: Tensor) -> None:
    n = min(len(features) for features in sets)
    if n < least:
        raise UserError("eval.n_samples", n, f"{what} needs at least {least} images a side", "eval.n_samples=1000")
