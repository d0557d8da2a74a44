"""Targets, the way back, and min-SNR weights against closed forms."""

import pytest
import torch

from atelier.diffusion.schedules import Cosine, Flow, Linear
from atelier.diffusion.targets import X0, Epsilon, VectorField, Velocity
from atelier.diffusion.weightings import ErrorOf, MinSNR, Plain

EPS, IMAGE, V, FLOW = TARGETS = Epsilon(), X0(), Velocity(), VectorField()
T = torch.tensor([1e-3, 0.01, 0.1, 0.5, 0.9, 0.97], dtype=torch.float64)


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("schedule", [Linear(), Cosine(), Flow()], ids=lambda s: type(s).__name__)
def test_round_trip(target, schedule):
    torch.manual_seed(0)
    x, eps = torch.randn(2, len(T), 3, 4, 4, dtype=torch.float64)
    alpha, sigma = schedule.pair(T, like=x)
    x_t = alpha * x + sigma * eps
    torch.testing.assert_close(target.denoised(target(x, eps, alpha, sigma), x_t, alpha, sigma), x)


def test_targets_are_what_they_are_called():
    x, eps, alpha, sigma = (torch.tensor(v) for v in (0.3, -1.1, 0.8, 0.6))
    values = [float(target(x, eps, alpha, sigma)) for target in TARGETS]
    assert values == pytest.approx([-1.1, 0.3, 0.8 * -1.1 - 0.6 * 0.3, -1.4])


def test_min_snr_closed_forms():
    alpha, sigma = Linear().alpha(T), Linear().sigma(T)
    snr = Linear().logsnr(T).exp()
    least = snr.clamp(max=5)
    assert least.min() < 5 < snr.max()
    expected = {EPS: least / snr, V: least / (snr + 1), IMAGE: least}
    for target, value in expected.items():
        torch.testing.assert_close(MinSNR()(target, alpha, sigma), value)
    torch.testing.assert_close(MinSNR(gamma=2.0)(IMAGE, alpha, sigma), snr.clamp(max=2))


@pytest.mark.parametrize("schedule", [Linear(), Flow()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: type(t).__name__)
def test_min_snr_is_one_loss_whatever_is_predicted(target, schedule):
    """Answers that stand for the same wrong image cost the same."""
    x, eps, wrong = torch.randn(3, len(T), dtype=torch.float64)
    alpha, sigma = schedule.pair(T, like=x)
    x_t = alpha * x + sigma * eps
    answer = target(wrong, (x_t - alpha * wrong) / sigma, alpha, sigma)
    error = answer - target(x, eps, alpha, sigma)
    loss = MinSNR()(target, alpha, sigma) * error**2
    torch.testing.assert_close(loss, (alpha / sigma).square().clamp(max=5) * (wrong - x) ** 2)


def test_plain_weight_is_one():
    assert torch.equal(Plain()(V, T, T), torch.ones_like(T))
    assert torch.equal(ErrorOf(Velocity())(V, T, T), torch.ones_like(T))
