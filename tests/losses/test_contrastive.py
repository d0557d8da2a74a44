"""The symmetric contrastive loss beside torch's cross-entropy and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from atelier.losses.contrastive import symmetric

SCALE = torch.tensor(5.0)


def vectors(n: int, dim: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.randn(2, n, dim, generator=torch.Generator().manual_seed(0))
    return F.normalize(drawn[0], dim=1), F.normalize(drawn[1], dim=1)


def test_it_is_the_mean_of_two_cross_entropies() -> None:
    image, text = vectors(7)
    logits, own = 5 * image @ text.T, torch.arange(7)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    torch.testing.assert_close(symmetric(image, text, SCALE), expected)
    torch.testing.assert_close(symmetric(image, text, SCALE, torch.eye(7).bool()), expected)


@pytest.mark.parametrize("n", [2, 128])
def test_where_nothing_is_known_it_is_the_logarithm_of_the_batch(n: int) -> None:
    alike = F.normalize(torch.ones(n, 4), dim=1)
    assert symmetric(alike, alike, SCALE).item() == pytest.approx(math.log(n), rel=1e-5)


def test_one_pair_is_always_found() -> None:
    image, text = vectors(1)
    assert symmetric(image, text, SCALE).item() == 0


def test_perfect_pairs_have_no_loss() -> None:
    own = torch.eye(8)
    assert symmetric(own, own, torch.tensor(100.0)).item() == pytest.approx(0, abs=1e-6)
    expected = math.log(1 + 7 * math.exp(-5))
    assert symmetric(own, own, SCALE).item() == pytest.approx(expected, rel=1e-5)


def test_equal_texts_are_right_ones_together() -> None:
    """k = 3 of each of 4 texts, perfectly told apart: log(1 + (B - k) / k exp(-s)); without `same` at least ln k."""
    which = torch.arange(12) % 4
    vector = torch.eye(4)[which]
    told = symmetric(vector, vector, SCALE, which[:, None] == which)
    assert told.item() == pytest.approx(math.log(1 + 9 / 3 * math.exp(-5)), rel=1e-5)
    assert symmetric(vector, vector, SCALE).item() == pytest.approx(math.log(3 + 9 * math.exp(-5)), rel=1e-5)


def test_products_are_not_rounded_under_autocast() -> None:
    image, text = vectors(16)
    with torch.autocast("cpu", torch.bfloat16):
        told = symmetric(image, text, torch.tensor(100.0))
    assert told.dtype == torch.float32
    assert torch.equal(told, symmetric(image, text, torch.tensor(100.0)))
