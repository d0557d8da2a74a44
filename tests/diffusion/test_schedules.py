"""The schedules against their closed forms, diffusers' tables and the one-step recursion."""

import math

import diffusers
import pytest
import torch

from atelier.core.errors import UserError
from atelier.diffusion.posterior import transition
from atelier.diffusion.schedules import EDM, Cosine, Flow, Linear, ScaledLinear, Sigmoid, ZeroTerminal

PAIRS = [
    (Linear(), diffusers.DDPMScheduler(1000, 1e-4, 0.02, "linear")),
    (ScaledLinear(), diffusers.DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear")),
    (Cosine(), diffusers.DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2")),
    (Linear(n_steps=50), diffusers.DDPMScheduler(50, 1e-4, 0.02, "linear")),
]
DISCRETE = [*(schedule for schedule, _ in PAIRS), Sigmoid(), ZeroTerminal(ScaledLinear())]
EVERY = [*DISCRETE, Flow()]  # all but EDM, whose images stay as they are


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


# ---- what the newer schedules are ----------------------------------------------------------------------------------


def test_sigmoid_is_its_formula():
    """Jabri et al. 2023, algorithm 1, with numbers of their figure: start -3, end 3, tau 1."""
    t = torch.tensor([1, 250, 500, 750], dtype=torch.float64) / 1000
    falling = 1 / (1 + torch.exp(-3 + 6 * t))
    ends = [1 / (1 + math.exp(place)) for place in (-3, 3)]
    expected = (falling - ends[1]) / (ends[0] - ends[1])
    torch.testing.assert_close(Sigmoid().alpha(t) ** 2, expected)
    assert Sigmoid().alpha(torch.ones(())) ** 2 == pytest.approx(1e-9)


def test_a_sigmoid_that_rises_is_refused():
    with pytest.raises(UserError, match="above start"):
        Sigmoid(start=3.0, end=3.0)


def test_zero_terminal_is_diffusers_and_ends_in_pure_noise():
    oracle = diffusers.DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", rescale_betas_zero_snr=True)
    alpha_bar = torch.cumprod(1 - oracle.betas.double(), 0)
    schedule = ZeroTerminal(ScaledLinear())
    torch.testing.assert_close(schedule.alpha(grid(schedule)) ** 2, alpha_bar, rtol=1e-3, atol=1e-6)
    assert schedule.alpha(torch.ones(())) == 0 and schedule.sigma(torch.ones(())) == 1
    first = grid(schedule)[:1]
    torch.testing.assert_close(schedule.alpha(first), ScaledLinear().alpha(first))


def test_edm_adds_noise_and_keeps_the_image():
    """Sigmas of 4 of the 7th-root steps, from 80 to 0; c_noise is ln(sigma) / 4."""
    schedule, t = EDM(), torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64)
    sigma = torch.tensor([80.0, 10.678710938, 0.625, 0.0048828125], dtype=torch.float64)
    torch.testing.assert_close(schedule.sigma(t), sigma)
    assert schedule.alpha(t).tolist() == [1, 1, 1, 1]
    torch.testing.assert_close(schedule.time(schedule.logsnr(t)), t)
    torch.testing.assert_close(schedule.input_scale(t), (sigma**2 + 0.25) ** -0.5)
    torch.testing.assert_close(schedule.net_time(t).double() / 1000, sigma.log() / 4, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(schedule.prior_std(t), sigma)


@pytest.mark.parametrize("schedule", [Linear(), Flow(), EDM()], ids=names)
def test_levels_of_the_bound_rise_from_what_an_eye_may_see_to_the_end(schedule):
    levels = schedule.levels()
    assert len(levels) == 1000 and levels[-1] == 1 and (levels.diff() > 0).all()
    assert (-schedule.logsnr(levels[0]) / 2).exp() == pytest.approx(0.01, rel=1e-3)
