"""What a model must beat that knows nothing of how pixels depend on each other: each number of an image on its own.

    python studies/pixel_mixture.py data=shapes data.image_size=32
    python studies/pixel_mixture.py data=fashion_mnist data.root=PATH --components 20

One mixture of Gaussians for each channel of each pixel, fitted to the whole training split by EM; bits per dimension
of `eval.n_samples` test images, dequantised with the noise that a model's `bpd` has under `seed`.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor

from atelier.core.rng import ImageRngs
from atelier.data.base import DataModule
from atelier.images.pixels import to_uint8
from atelier.runs import build

LEVELS = 256
PARTS = 4  # of a level: where the uniform noise within it is looked at
LEAST_STD = 0.1  # levels
BATCH = 500


def histogram(data: DataModule, split: str, n: int) -> Tensor:
    """How many of n images have each level at each number of an image, (C H W, 256) float32."""
    counts = torch.zeros(data.image_channels * data.image_size**2, LEVELS)
    for first in range(0, n, BATCH):
        levels = read(data, split, range(first, min(n, first + BATCH)))
        counts.scatter_add_(1, levels.T, torch.ones(1).expand(*levels.T.shape))
    return counts


def read(data: DataModule, split: str, numbers: range) -> Tensor:
    """Levels of images, (B, C H W) int64."""
    images = data.chosen(split, numbers)["image"]
    return to_uint8(images).long().flatten(1)


class Mixture:
    """K Gaussians for each of P numbers, fitted to weighted points that are the same for all.

    Starts with means at the quantiles of each number, every other one moved to its most frequent levels.
    """

    def __init__(self, counts: Tensor, components: int) -> None:
        self.points = (torch.arange(LEVELS * PARTS) + 0.5) / PARTS  # (X,)
        self.mass = counts.repeat_interleave(PARTS, 1) / (PARTS * counts[:1].sum())  # (P, X)
        ranks = (torch.arange(components) + 0.5) / components
        self.mean = (
            torch.searchsorted(self.mass.cumsum(1), ranks.expand(len(counts), -1).contiguous()) / PARTS
        )  # (P, K)
        often = counts.topk(-(-components // 2), dim=1).indices + 0.5
        self.mean[:, ::2] = often
        self.std = torch.full_like(self.mean, LEVELS / components)
        self.std[:, ::2] = 1.0
        self.log_weight = torch.full_like(self.mean, -math.log(components))

    def log_density(self, at: Tensor) -> Tensor:
        """log p of points in levels, (P, X) or (1, X) to (P, X)."""
        return self._joint(at).logsumexp(2)

    def _joint(self, at: Tensor) -> Tensor:
        """log p(point, component), (P, X, K)."""
        scaled = (at[:, :, None] - self.mean[:, None]) / self.std[:, None]
        return self.log_weight[:, None] - self.std[:, None].log() - scaled**2 / 2 - math.log(2 * math.pi) / 2

    def step(self) -> None:
        """One step of EM (Dempster et al. 1977); each component keeps the weight of a ten-thousandth of the images."""
        share = self._joint(self.points[None]).softmax(2) * self.mass[:, :, None]  # (P, X, K)
        total = share.sum(1) + 1e-12  # (P, K)
        self.mean = (share * self.points[:, None]).sum(1) / total
        spread = (share * (self.points[:, None] - self.mean[:, None]) ** 2).sum(1) / total
        self.std = spread.sqrt().clamp(min=LEAST_STD)
        self.log_weight = ((total + 1e-4) / (total + 1e-4).sum(1, keepdim=True)).log()


def fitted(counts: Tensor, components: int, iterations: int) -> list[Mixture]:
    """Mixtures of all numbers, some numbers at a time: what a core's cache holds."""
    mixtures = [Mixture(part, components) for part in counts.split(64)]
    for mixture in mixtures:
        for _ in range(iterations):
            mixture.step()
    return mixtures


def bits(mixtures: list[Mixture], data: DataModule, n: int, seed: int) -> float:
    """Bits per dimension of n test images."""
    total = 0.0
    for first in range(0, n, BATCH):
        numbers = range(first, min(n, first + BATCH))
        rngs = ImageRngs(seed, first, len(numbers))
        shape = data.image_channels, data.image_size, data.image_size
        at = (read(data, "test", numbers) + rngs.rand(*shape).flatten(1)).T  # (P, B)
        parts = zip(mixtures, at.split(64), strict=True)
        total -= sum(mixture.log_density(part).double().sum().item() for mixture, part in parts)
    return total / (n * math.prod(shape) * math.log(2))


def composed(overrides: list[str]) -> DictConfig:
    with initialize_config_dir(str(Path(__file__).parents[1] / "conf"), version_base="1.3"):
        return compose("train", overrides)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="as for train.py: data=, data.*, eval.n_samples=, seed=")
    parser.add_argument("--components", type=int, default=10, help="Gaussians of a number")
    parser.add_argument("--iterations", type=int, default=50, help="steps of EM")
    asked = parser.parse_args()
    cfg = composed(asked.overrides)
    data = build.data(cfg)
    data.prepare_data()
    n = min(cfg.eval.n_samples, len(data.split("test")))
    with torch.inference_mode():
        mixtures = fitted(histogram(data, "train", data.n_train), asked.components, asked.iterations)
        value = bits(mixtures, data, n, cfg.seed)
    print(f"{value:.3f} bits/dim of {n} test images, {asked.components} Gaussians a number, {data.n_train} images")


if __name__ == "__main__":
    main()
