"""The schedules against their closed forms, diffusers' tables and the one-step recursion."""

import diffusers
import pytest
import torch

from atelier.diffusion.samplers import transition
from atelier.diffusion.schedules import Cosine, Flow, Linear, ScaledLinear

PAIRS = [
    (Linear(), diffusers.DDPMScheduler(1000, 1e-4, 0.02, "linear")),
    (ScaledLinear(), diffusers.DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear")),
    (Cosine(), diffusers.DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2")),
    (Linear(n_steps=50), diffusers.DDPMScheduler(50, 1e-4, 0.02, "linear")),
]
DISCRETE = [schedule for schedule, _ in PAIRS]
EVERY = [*DISCRETE, Flow()]


def names(value):
    return type(value).__name__


def grid(schedule):
    return torch.arange(1, schedule.n_steps + 1, dtype=torch.float64) / schedule.n_steps


@pytest.mark.parametrize(("schedule", "oracle"), PAIRS, ids=names)
def test_table_is_diffusers(schedule, oracle):
    alpha_bar = torch.cumprod(1 - oracle.betas.double(), 0)  # its betas are float32
    t = grid(schedule)
    torch.testing.assert_close(schedule.alpha(t) ** 2, alpha_bar, rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(schedule.sigma(t) ** 2, 1 - alpha_bar, rtol=2e-5, atol=1e-7)


def test_linear_table_is_met_exactly():
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha = torch.cumprod(1 - beta, 0).sqrt()
    torch.testing.assert_close(Linear().alpha(grid(Linear())), alpha, rtol=1e-12, atol=0)


@pytest.mark.parametrize("schedule", EVERY, ids=names)
def test_ends_and_order(schedule):
    t = torch.linspace(0, 1, 4001, dtype=torch.float64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    assert alpha.dtype == sigma.dtype == torch.float64
    assert alpha[0] == 1
    assert sigma[0] == 0
    assert (alpha.diff() < 0).all()
    assert (sigma.diff() > 0).all()
    assert schedule.alpha(t.float()[:6].view(2, 3)).shape == (2, 3)


@pytest.mark.parametrize("schedule", EVERY, ids=names)
def test_logsnr_agrees_and_time_inverts_it(schedule):
    t = torch.tensor([1e-4, 3e-3, 0.02, 0.2504, 0.5, 0.77777, 0.999], dtype=torch.float64)
    logsnr = schedule.logsnr(t)
    expected = 2 * (schedule.alpha(t) / schedule.sigma(t)).log()
    torch.testing.assert_close(logsnr, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(schedule.time(logsnr), t, rtol=1e-9, atol=1e-12)


def test_logsnr_is_linear_between_entries():
    schedule = Linear()
    a, m, b = schedule.logsnr(torch.tensor([0.4, 0.40025, 0.401], dtype=torch.float64))
    torch.testing.assert_close(m, 0.75 * a + 0.25 * b)


@pytest.mark.parametrize("schedule", DISCRETE, ids=names)
def test_net_time_is_the_index(schedule):
    time = schedule.net_time(grid(schedule))
    assert time.dtype == torch.float32
    assert torch.equal(time, torch.arange(schedule.n_steps, dtype=torch.float32))


def test_flow_is_the_straight_line():
    t = torch.tensor([0.0, 0.25, 1.0])
    assert Flow().alpha(t).tolist() == [1, 0.75, 0]
    assert Flow().sigma(t).tolist() == [0, 0.25, 1]
    assert Flow().net_time(t).tolist() == [0, 250, 1000]


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 7, 10, 16, 50, 333, 1000])
def test_times_are_diffusers(spacing, steps):
    oracle = diffusers.DDIMScheduler(1000, timestep_spacing=spacing)
    oracle.set_timesteps(steps)
    times = Linear().times(steps, spacing)
    assert times.dtype == torch.float64
    assert torch.equal((times[:-1] * 1000 - 1).round().long(), oracle.timesteps)
    assert times[-1] == 0
    assert (times.diff() < 0).all()


def test_flow_times_are_uniform():
    assert Flow().times(4).tolist() == [1, 0.75, 0.5, 0.25, 0]


def test_snap_gives_every_entry_the_same_share():
    u = (torch.arange(5000, dtype=torch.float64) + 0.5) / 5000
    counts = torch.bincount(Linear(50).net_time(Linear(50).snap(u)).long())
    assert counts.tolist() == [100] * 50


@pytest.mark.parametrize("schedule", EVERY, ids=names)
def test_single_steps_compose_to_the_closed_form(schedule):
    """Mean and variance of q(x_t | x_0) from the recursion over q(x_t | x_s)."""
    times = torch.linspace(0, 0.95, 20, dtype=torch.float64)
    mean, variance = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for s, t in zip(times[:-1], times[1:], strict=True):
        factor, added = transition(schedule.level(s), schedule.level(t))
        mean, variance = factor * mean, factor**2 * variance + added
        torch.testing.assert_close(mean, schedule.alpha(t), rtol=1e-9, atol=0)
        torch.testing.assert_close(variance, schedule.sigma(t) ** 2, rtol=1e-9, atol=0)


def test_single_steps_are_the_betas():
    schedule = Linear()
    t = grid(schedule)
    factor, variance = transition(schedule.level(t[:-1]), schedule.level(t[1:]))
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)[1:]
    torch.testing.assert_close(variance, beta, rtol=1e-8, atol=0)
    torch.testing.assert_close(factor, (1 - beta).sqrt(), rtol=1e-10, atol=0)


def test_noising_step_by_step_gives_the_closed_form_distribution():
    """Monte Carlo: 50 single steps of x = 0.7, 200,000 times."""
    torch.manual_seed(0)
    schedule = Linear(n_steps=50, beta_max=0.1)
    x = torch.full((200_000,), 0.7)
    for beta in torch.linspace(1e-4, 0.1, 50):
        x = (1 - beta).sqrt() * x + beta.sqrt() * torch.randn_like(x)
    end = torch.ones(())
    assert abs(x.mean() - 0.7 * schedule.alpha(end)) < 4 / 200_000**0.5
    assert abs(x.var() / schedule.sigma(end) ** 2 - 1) < 4 * (2 / 200_000) ** 0.5


def test_tables_are_not_saved():
    assert Linear().state_dict() == {}
