"""What is said of test images, against the same figures computed here by hand."""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from atelier.core.rng import ImageRngs
from atelier.evaluation.reconstruction import likelihood, reconstructed
from atelier.metrics.suite import Suite
from atelier.models.base import Cond, DiscreteAutoencoder, Likelihood

N, BATCH = 5, 2
LEVELS = torch.randint(30, 220, (N, 3, 16, 16), generator=torch.Generator().manual_seed(0))
X = LEVELS / 127.5 - 1


class Data:
    """Five images of which the judge is not asked."""

    judged = False

    def chosen(self, split: str, numbers: range) -> dict[str, Tensor]:
        assert split == "test"
        return {"image": X[list(numbers)]}


class Model(DiscreteAutoencoder, Likelihood):
    """Gives image k back 2 (k + 1) levels brighter, with codes k, but at most 2, and -log p = 10 (k + 1) + noise."""

    n_codes = 8

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def encode(self, x: Tensor, rngs: ImageRngs | None = None) -> Tensor:
        assert rngs is None
        self.sizes.append(len(x))
        return x

    def number(self, x: Tensor) -> Tensor:
        return torch.stack([(X == image).flatten(1).all(1).int().argmax() for image in x])

    def decode(self, z: Tensor) -> Tensor:
        return z + (2 * (self.number(z) + 1) / 127.5)[:, None, None, None]

    def codes(self, x: Tensor) -> Tensor:
        return self.number(x).clamp(max=2)[:, None, None].expand(-1, 2, 2)

    def nll(self, x: Tensor, cond: Cond, rngs: ImageRngs) -> Tensor:
        return 10.0 * (self.number(x) + 1) + rngs.randn(1)[:, 0]

    def sample_latents(self, rngs: ImageRngs, cond: Cond) -> Tensor: ...


@pytest.fixture
def told() -> list[tuple[str, int, int]]:
    return []


def test_reconstructions_by_hand(told: list[tuple[str, int, int]]) -> None:
    model, suite = Model(), SimpleNamespace(active=False, lpips=None)
    found = reconstructed(model, Data(), suite, None, N, BATCH, nullcontext, lambda *words: told.append(words))
    psnr = [20 * math.log10(255 / (2 * (k + 1))) for k in range(N)]
    assert found["recon/psnr"] == pytest.approx(sum(psnr) / N, rel=1e-6)
    assert 0.9 < found["recon/ssim"] < 1
    assert found["codes/used"] == 3 / 8
    entropy = -sum(p * math.log(p) for p in (0.2, 0.2, 0.6))
    assert found["codes/perplexity"] == pytest.approx(math.exp(entropy), rel=1e-6)
    assert set(found) == {"recon/psnr", "recon/ssim", "codes/used", "codes/perplexity"}
    assert max(model.sizes) <= BATCH and sum(model.sizes) == N
    assert told[-1] == ("reconstructions", N, N)


def test_distances_of_reconstructions_are_to_the_given_features() -> None:
    """A net whose features are the mean colours: what comes back is brighter, the real features are handed in."""
    suite = object.__new__(Suite)
    suite.names, suite.lpips = ["fid"], None
    suite.features = lambda images: images.float().mean((2, 3))
    suite.compare = lambda real, fake: {"fid": (fake.mean() - real.mean()).item()}
    real = LEVELS.float().mean((2, 3))
    found = reconstructed(Model(), Data(), suite, real, N, BATCH, nullcontext, lambda *_: None)
    assert found["recon/fid"] == pytest.approx(6.0, abs=1e-3)  # levels: the mean of 2 .. 10


def test_likelihood_by_hand(told: list[tuple[str, int, int]]) -> None:
    """Nats of an image, and bits of each of its 3 x 16 x 16 numbers; image k has noise k of the seed."""
    found = likelihood(
        Model(), Data(), lambda first, n: ImageRngs(9, first, n), N, BATCH, nullcontext,
        lambda *words: told.append(words),
    )  # fmt: skip
    expected = sum(10.0 * (k + 1) + ImageRngs(9, k, 1).randn(1).item() for k in range(N)) / N
    assert found["nll"] == pytest.approx(expected, rel=1e-6)
    assert found["bpd"] == pytest.approx(expected / (3 * 16 * 16 * math.log(2)), rel=1e-6)
    assert told[-1] == ("likelihood", N, N)
