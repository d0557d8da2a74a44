"""Targets, the way back, and min-SNR weights against closed forms."""

import pytest
import torch

from atelier.diffusion.schedules import Cosine, Flow, Linear
from atelier.diffusion.targets import denoised, target, weight

KINDS = ["eps", "x0", "v", "flow"]
T = torch.tensor([1e-3, 0.01, 0.1, 0.5, 0.9, 0.97], dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", [Linear(), Cosine(), Flow()], ids=lambda s: type(s).__name__)
def test_round_trip(kind, schedule):
    torch.manual_seed(0)
    x, eps = torch.randn(2, len(T), 3, 4, 4, dtype=torch.float64)
    alpha, sigma = schedule.pair(T, like=x)
    x_t = alpha * x + sigma * eps
    torch.testing.assert_close(denoised(kind, target(kind, x, eps, alpha, sigma), x_t, alpha, sigma), x)


def test_targets_are_what_they_are_called():
    x, eps, alpha, sigma = (torch.tensor(v) for v in (0.3, -1.1, 0.8, 0.6))
    values = {kind: float(target(kind, x, eps, alpha, sigma)) for kind in KINDS}
    assert values == pytest.approx({"eps": -1.1, "x0": 0.3, "v": 0.8 * -1.1 - 0.6 * 0.3, "flow": -1.4})


def test_min_snr_closed_forms():
    alpha, sigma = Linear().alpha(T), Linear().sigma(T)
    snr = Linear().logsnr(T).exp()
    least = snr.clamp(max=5)
    assert least.min() < 5 < snr.max()
    expected = {"eps": least / snr, "v": least / (snr + 1), "x0": least}
    for kind, value in expected.items():
        torch.testing.assert_close(weight(kind, "min_snr", alpha, sigma), value)
    torch.testing.assert_close(weight("x0", "min_snr", alpha, sigma, gamma=2.0), snr.clamp(max=2))


@pytest.mark.parametrize("schedule", [Linear(), Flow()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_is_one_loss_whatever_is_predicted(kind, schedule):
    """Answers that stand for the same wrong image cost the same."""
    x, eps, wrong = torch.randn(3, len(T), dtype=torch.float64)
    alpha, sigma = schedule.pair(T, like=x)
    x_t = alpha * x + sigma * eps
    answer = target(kind, wrong, (x_t - alpha * wrong) / sigma, alpha, sigma)
    error = answer - target(kind, x, eps, alpha, sigma)
    loss = weight(kind, "min_snr", alpha, sigma) * error**2
    torch.testing.assert_close(loss, (alpha / sigma).square().clamp(max=5) * (wrong - x) ** 2)


def test_plain_weight_is_one():
    assert torch.equal(weight("v", "plain", T, T), torch.ones_like(T))
