"""Likelihoods against torch.distributions."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Bernoulli as TorchBernoulli
from torch.distributions import Normal

from atelier.losses.likelihood import Bernoulli, Gaussian

RNG = torch.Generator().manual_seed(0)
X = torch.randint(0, 256, (4, 3, 2, 2), generator=RNG) / 127.5 - 1
PREDICTION = torch.randn(4, 3, 2, 2, generator=RNG)


def test_gaussian_is_torchs_normal() -> None:
    expected = -Normal(PREDICTION, 0.3).log_prob(X).flatten(1).sum(1)
    torch.testing.assert_close(Gaussian(0.3, learned=False).nll(X, PREDICTION), expected)


def test_a_learned_sigma_ends_at_the_root_mean_square_error() -> None:
    """Rybkin et al. 2021, eq. 7: the maximum-likelihood sigma."""
    likelihood = Gaussian(0.1, learned=True)
    optimizer = torch.optim.LBFGS(likelihood.parameters(), line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        nll = likelihood.nll(X, PREDICTION).mean()
        nll.backward()
        return nll

    for _ in range(10):
        optimizer.step(loss)
    assert likelihood.log_sigma.exp().item() == pytest.approx((X - PREDICTION).square().mean().sqrt().item(), rel=1e-3)
    assert not Gaussian(0.1, learned=False).log_sigma.requires_grad


def test_gaussian_levels_sum_to_one() -> None:
    """Mean over the noise of the bound's likelihood, summed over the levels that matter, is a probability."""
    likelihood, uniform = Gaussian(0.1, learned=False), torch.linspace(0.005, 0.995, 100).view(-1, 1, 1, 1)
    levels = torch.arange(-400, 656) / 127.5 - 1
    total = sum(
        (-likelihood.nll_8bit(level.expand(100, 1, 1, 1), torch.zeros(100, 1, 1, 1), uniform)).exp().mean().item()
        for level in levels
    )
    assert total == pytest.approx(1, abs=1e-3)


def test_bernoulli_is_torchs_and_binarises_by_the_noise() -> None:
    likelihood, ones = Bernoulli(), torch.where(X > 0, 1.0, -1.0)
    expected = -TorchBernoulli(logits=PREDICTION).log_prob((ones + 1) / 2).flatten(1).sum(1)
    torch.testing.assert_close(likelihood.nll(ones, PREDICTION), expected)
    torch.testing.assert_close(likelihood.nll_8bit(ones, PREDICTION, torch.rand(X.shape)), expected)
    grey = torch.zeros(20_000, 1, 1, 1)
    mean = likelihood.nll_8bit(grey, torch.full_like(grey, 2.0), torch.rand(grey.shape, generator=RNG)).mean()
    assert mean.item() == pytest.approx((math.log1p(math.exp(-2)) + math.log1p(math.exp(2))) / 2, abs=0.02)


def test_predictions_become_images() -> None:
    assert Gaussian(0.1, learned=False).image(torch.tensor([-3.0, 0.5, 3.0])).tolist() == [-1, 0.5, 1]
    assert Bernoulli().image(torch.tensor([-100.0, 0.0, 100.0])).tolist() == [-1, 0, 1]


def test_they_are_float32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        for likelihood in (Gaussian(0.1, learned=True), Bernoulli()):
            assert likelihood.nll(X, PREDICTION.bfloat16()).dtype == torch.float32
