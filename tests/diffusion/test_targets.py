"""Targets, the way back, and min-SNR weights against closed forms."""

import pytest
import torch

from atelier.diffusion.schedules import EDM, Cosine, Flow, Linear
from atelier.diffusion.targets import X0, Epsilon, Preconditioned, VectorField, Velocity
from atelier.diffusion.weightings import ErrorOf, LearnedUncertainty, MinSNR, Plain, SoftMinSNR

EPS, IMAGE, V, FLOW, F = TARGETS = Epsilon(), X0(), Velocity(), VectorField(), Preconditioned()
T = torch.tensor([1e-3, 0.01, 0.1, 0.5, 0.9, 0.97], dtype=torch.float64)


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("schedule", [Linear(), Cosine(), Flow(), EDM()], ids=lambda s: type(s).__name__)
def test_round_trip(target, schedule):
    torch.manual_seed(0)
    x, eps = torch.randn(2, len(T), 3, 4, 4, dtype=torch.float64)
    alpha, sigma = schedule.pair(T, like=x)
    x_t = alpha * x + sigma * eps
    torch.testing.assert_close(target.denoised(target(x, eps, alpha, sigma), x_t, alpha, sigma), x)


def test_targets_are_what_they_are_called():
    x, eps, alpha, sigma = (torch.tensor(v) for v in (0.3, -1.1, 0.8, 0.6))
    values = [float(target(x, eps, alpha, sigma)) for target in TARGETS[:4]]
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


def test_preconditioning_is_karras_table():
    """D = c_skip x_t + c_out F, of which F is asked that gives D = x (EDM, table 1)."""
    sigma, one = torch.tensor([0.02, 0.5, 3.0, 80.0], dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    x, eps = torch.randn(2, 4, dtype=torch.float64)
    c_skip = 0.25 / (sigma**2 + 0.25)
    c_out = 0.5 * sigma / (sigma**2 + 0.25).sqrt()
    torch.testing.assert_close(F(x, eps, one, sigma), (x - c_skip * (x + sigma * eps)) / c_out)
    torch.testing.assert_close(F.denoised(x, eps, one, sigma), c_skip * eps + c_out * x)
    torch.testing.assert_close(F.gain(one, sigma), c_out)


def test_preconditioned_for_unit_data_is_minus_v():
    alpha, sigma = Cosine().alpha(T), Cosine().sigma(T)
    x, eps = torch.randn(2, len(T), dtype=torch.float64)
    torch.testing.assert_close(Preconditioned(1.0)(x, eps, alpha, sigma), -V(x, eps, alpha, sigma))


def test_the_weight_of_edm_is_karras():
    """lambda(sigma) = (sigma^2 + s^2) / (sigma s)^2 of the image's error; 1 of F's own (EDM, section 5)."""
    sigma, one = torch.tensor([0.02, 0.5, 3.0, 80.0], dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(ErrorOf(F)(IMAGE, one, sigma), (sigma**2 + 0.25) / (0.5 * sigma) ** 2)
    assert torch.equal(ErrorOf(F)(Preconditioned(), one, sigma), one)
    assert not torch.allclose(ErrorOf(F)(Preconditioned(0.3), one, sigma), one)


def test_soft_min_snr_closed_form():
    """With alpha = 1 and gamma = 1 / sigma_data^2, (sigma s)^2 / (sigma^2 + s^2)^2 of F's error."""
    sigma, one = torch.tensor([0.02, 0.5, 3.0, 80.0], dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(SoftMinSNR(4.0)(F, one, sigma), (0.5 * sigma) ** 2 / (sigma**2 + 0.25) ** 2)
    snr = Linear().logsnr(T).exp()
    expected = snr * 5 / (snr + 5)
    torch.testing.assert_close(SoftMinSNR(5.0)(IMAGE, Linear().alpha(T), Linear().sigma(T)), expected)


def test_a_learned_uncertainty_comes_to_the_mean_loss_of_each_level():
    """loss / e^u + u is least where e^u is the mean loss; there every level weighs the same."""
    torch.manual_seed(0)
    weighting, logsnr = LearnedUncertainty(Plain()), torch.linspace(-8, 8, 64)
    losses = (logsnr / 4).exp()
    assert torch.equal(weighting.total(losses, logsnr), losses)  # before anything is learned
    optimizer = torch.optim.Adam(weighting.parameters(), lr=0.02)
    for _ in range(400):
        optimizer.zero_grad()
        weighting.total(losses, logsnr).mean().backward()
        optimizer.step()
    torch.testing.assert_close(weighting.total(losses, logsnr), 1 + losses.log(), rtol=0, atol=0.1)
    assert torch.equal(weighting(V, T, T), Plain()(V, T, T))
