from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from atelier.core.errors import UserError
from atelier.metrics import distances
from atelier.metrics.distances import fid, inception_score, kid, precision_recall


def gaussian(seed: int, n: int, d: int, mean: float = 0.0, scale: float = 1.0) -> Tensor:
    return mean + scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_frechet_of_diagonal_gaussians() -> None:
    """Sets whose moments are exact: |m|^2 + sum (s_1 - s_2)^2."""
    corners = torch.tensor([[a, b] for a in (-1.0, 1.0) for b in (-1.0, 1.0)]).repeat(50, 1)
    unit = math.sqrt(200 / 199)  # standard deviation of the corners
    real, fake = corners * torch.tensor([1.0, 2.0]), corners * torch.tensor([3.0, 0.5]) + torch.tensor([4.0, -3.0])
    assert fid(real, fake) == pytest.approx(25 + unit**2 * (2.0**2 + 1.5**2), rel=1e-9)


def test_frechet_with_fewer_images_than_features() -> None:
    """tr (C_1 C_2)^(1/2) is the nuclear norm of the product of the centred sets."""
    real, fake = gaussian(0, 10, 64).double(), gaussian(1, 12, 64, 0.5, 2).double()
    a, b = ((x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (real, fake))
    cross = torch.linalg.svdvals(a @ b.T).sum()
    expected = (real.mean(0) - fake.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * cross
    assert fid(real, fake) == pytest.approx(expected.item(), rel=1e-5)
    assert fid(real, real) == pytest.approx(0, abs=1e-3)


def test_frechet_is_not_rounded_to_the_features_precision() -> None:
    real, fake = gaussian(0, 500, 8).bfloat16(), gaussian(1, 500, 8).bfloat16()
    assert fid(real, fake) == pytest.approx(fid(real.double(), fake.double()), rel=1e-12)


def test_inception_score_equals_torch_fidelity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randperm", torch.arange)  # the two shuffle differently
    logits = gaussian(1, 300, 16, 0.3, 2.0)
    theirs = isc_features_to_metric(logits.double(), splits=10, shuffle=False)["inception_score_mean"]
    assert inception_score(logits) == pytest.approx(theirs, rel=1e-9)


def test_kid_equals_torch_fidelity() -> None:
    real, fake = gaussian(0, 300, 16).double(), gaussian(1, 300, 16, 0.3).double()
    theirs = kid_features_to_metric(
        fake,
        real,
        kid_subsets=1,
        kid_subset_size=300,
        kid_degree=3,
        kid_gamma=None,
        kid_coef0=1.0,
        kid_kernel="poly",
        rng_seed=0,
        verbose=False,
    )["kernel_inception_distance_mean"]
    assert kid(real, fake) == pytest.approx(theirs, rel=1e-9)


def test_inception_score_of_certain_balanced_classes_is_their_number() -> None:
    logits = (50 * torch.eye(4)).repeat(5000, 1)
    assert inception_score(logits) == pytest.approx(4.0, rel=1e-2)


@pytest.mark.parametrize("judged", [kid, lambda a, b: inception_score(b)])
def test_subsets_are_fixed_and_the_generator_stays(judged, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "KID_SUBSETS", 3)
    real, fake = gaussian(0, 1100, 4), gaussian(1, 1200, 4, 0.2)
    before = torch.get_rng_state()
    first = judged(real, fake)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert judged(real, fake) == first


def test_precision_and_recall_by_hand() -> None:
    """Reals at 0..4 and far away 100..104; the ball of each reaches 2, 3 or 4 (third neighbour)."""
    real = torch.tensor([0.0, 1, 2, 3, 4, 100, 101, 102, 103, 104])[:, None]
    assert precision_recall(real, real) == (1.0, 1.0)
    collapsed = torch.tensor([2.0, 2.1, 2.2, 2.3])[:, None]  # all in one mode, balls of 0.2 and 0.3
    assert precision_recall(real, collapsed) == (1.0, 0.1)  # 2 alone is covered
    wide = torch.tensor([1.0, 50, 103, 200])[:, None]  # two off; balls of 199, 150, 102, 199
    assert precision_recall(real, wide) == (0.5, 1.0)
    assert precision_recall(real, real + 1000) == (0.0, 0.0)
    edge = torch.tensor([6.5, 6.9, 7.1, 7.5])[:, None]  # the ball of 4 reaches 7, its third neighbour being 1
    assert precision_recall(real, edge)[0] == 0.5


def test_precision_and_recall_in_chunks() -> None:
    real, fake = gaussian(0, 90, 3), gaussian(1, 70, 3, 1.0)
    assert precision_recall(real, fake, chunk=7) == precision_recall(real, fake)
    assert 0 < precision_recall(real, fake)[0] < 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_net_has_the_value_nan(bad: float) -> None:
    real, fake = gaussian(0, 20, 4), gaussian(1, 20, 4)
    fake[3, 2] = bad
    values = [fid(real, fake), kid(real, fake), inception_score(fake), *precision_recall(real, fake)]
    assert all(math.isnan(value) for value in values)
    assert not min(values) < fid(real, real)


@pytest.mark.parametrize(
    ("judged", "least"),
    [(fid, 2), (kid, 2), (lambda a, b: inception_score(b), 10), (precision_recall, 4)],
)
def test_too_few_images_is_one_line(judged, least: int) -> None:
    real = gaussian(0, 20, 3)
    judged(real, gaussian(1, least, 3))
    with pytest.raises(UserError, match=rf"error: eval\.n_samples={least - 1}: .* at least {least} images"):
        judged(real, gaussian(1, least - 1, 3))


def test_any_number_of_ranks_gives_the_same_values() -> None:
    real, fake = gaussian(0, 101, 6), gaussian(1, 101, 6, 0.3)
    index = np.r_[0:101:2, 1:101:2]  # what two ranks bring, one after the other
    gathered = fake[torch.tensor(index)][torch.tensor(index).argsort()]
    for judged in (fid, kid, precision_recall, lambda a, b: inception_score(b)):
        assert judged(real, gathered) == judged(real, fake)
