"""Losses of the two players by hand, penalties on gradients in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from atelier.losses.adversarial import (
    Adversarial,
    Hinge,
    LeastSquares,
    NonSaturating,
    Relativistic,
    RelativisticAverage,
    Wasserstein,
)
from atelier.losses.regularizers import gradient_penalty, r1_penalty

REAL, FAKE = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])


def test_cross_entropy_by_hand() -> None:
    loss = NonSaturating()
    expected = -(torch.sigmoid(REAL).log().mean() + (1 - torch.sigmoid(FAKE)).log().mean())
    torch.testing.assert_close(loss.discriminator(REAL, FAKE), expected)
    torch.testing.assert_close(loss.generator(None, FAKE), -torch.sigmoid(FAKE).log().mean())
    assert loss.generator(None, torch.tensor([-200.0])) == 200  # no saturation, no infinity


def test_the_others_by_hand() -> None:
    assert LeastSquares().discriminator(REAL, FAKE).item() == pytest.approx((0 + 9) / 4 + (0.25 + 9) / 4)
    assert LeastSquares().generator(None, FAKE).item() == pytest.approx((0.25 + 4) / 4)
    assert Hinge().discriminator(REAL, FAKE).item() == pytest.approx((0 + 3) / 2 + (1.5 + 4) / 2)
    assert Hinge().generator(None, FAKE).item() == pytest.approx(-1.75)
    assert Wasserstein().discriminator(REAL, FAKE).item() == pytest.approx(1.75 + 0.5)
    assert Wasserstein().generator(None, FAKE).item() == pytest.approx(-1.75)
    pairs = torch.tensor([0.5 - 1.0, 3.0 + 2.0])
    softplus = (1 + pairs.exp()).log().mean().item()
    assert Relativistic().discriminator(REAL, FAKE).item() == pytest.approx(softplus)
    assert Relativistic().generator(REAL, FAKE).item() == pytest.approx((1 + (-pairs).exp()).log().mean().item())
    assert [loss.needs_real_logits for loss in (Relativistic, RelativisticAverage, Hinge)] == [True, True, False]


def test_against_the_average_by_hand() -> None:
    """Wang et al. 2018, eq. 1 and 2: real images have mean -0.5, generated ones 1.75."""
    real, fake = torch.sigmoid(REAL - 1.75), torch.sigmoid(FAKE + 0.5)
    loss = RelativisticAverage()
    torch.testing.assert_close(loss.discriminator(REAL, FAKE), -real.log().mean() - (1 - fake).log().mean())
    torch.testing.assert_close(loss.generator(REAL, FAKE), -(1 - real).log().mean() - fake.log().mean())


LOSSES = NonSaturating(), LeastSquares(), Hinge(), Wasserstein(), Relativistic(), RelativisticAverage()


@pytest.mark.parametrize("loss", LOSSES)
def test_players_pull_a_fake_logit_in_opposite_directions_in_float32(loss: Adversarial) -> None:
    fake = torch.zeros(4, dtype=torch.bfloat16, requires_grad=True)
    real = torch.zeros(4, dtype=torch.bfloat16)
    theirs, ours = loss.discriminator(real, fake), loss.generator(real, fake)
    assert theirs.dtype == ours.dtype == torch.float32
    down, up = (torch.autograd.grad(value, fake)[0] for value in (theirs, ours))
    assert (up < 0).all() and (down >= 0).all() and (down.any() or isinstance(loss, LeastSquares))  # whose goal is 0


def test_gradient_penalty_of_a_linear_and_a_quadratic_discriminator() -> None:
    """D = w.x has ||w||^2 at every image, D = |x|^2 / 2 has |x|^2."""
    x = torch.randn(5, 3, 4, 4, requires_grad=True)
    w = torch.randn(3, 4, 4)
    penalty = r1_penalty((x * w).flatten(1).sum(1), x)
    assert penalty.item() == pytest.approx(w.square().sum().item(), rel=1e-6)
    quadratic = r1_penalty(x.square().flatten(1).sum(1) / 2, x)
    assert quadratic.item() == pytest.approx(x.square().flatten(1).sum(1).mean().item(), rel=1e-6)


def test_gradient_penalty_can_be_learned_from() -> None:
    """d/dw ||w||^2 = 2 w."""
    x, w = torch.randn(4, 3, requires_grad=True), torch.randn(3, requires_grad=True)
    r1_penalty(x @ w, x).backward()
    torch.testing.assert_close(w.grad, 2 * w.detach())


def test_lipschitz_in_closed_form() -> None:
    """D = w.x has (|w| - 1)^2 everywhere, and d/dw of it is 2 (|w| - 1) w / |w|."""
    w = nn.Parameter(torch.randn(3, 4, 4))
    real, fake = torch.randn(2, 5, 3, 4, 4)
    penalty = gradient_penalty(lambda x: (x * w).flatten(1).sum(1), real, fake)
    assert penalty.item() == pytest.approx((w.norm().item() - 1) ** 2, rel=1e-5)
    penalty.backward()
    torch.testing.assert_close(w.grad, (2 * (w.norm() - 1) * w / w.norm()).detach())


def test_lipschitz_looks_between_real_and_generated_images() -> None:
    """D = |x|^2 / 2 on the way from -1 to 3, one place for each image: |gradient| = |x| sqrt(n)."""
    seen = []
    gradient_penalty(
        lambda x: seen.append(x) or x.square().flatten(1).sum(1), -torch.ones(500, 1, 2, 2), 3 * torch.ones(1)
    )
    places = seen[0].flatten(1)
    assert (places == places[:, :1]).all() and places.min() > -1 and places.max() < 3
    assert places.mean().item() == pytest.approx(1, abs=0.2)
