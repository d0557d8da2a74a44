"""Samplers against diffusers, Bayes' rule and Gaussian data, for which the best denoiser and the ODE are known."""

from dataclasses import dataclass
from typing import ClassVar

import diffusers
import pytest
import torch

from atelier.core.rng import ImageRngs
from atelier.diffusion.guidance import clipped
from atelier.diffusion.inpainting import resampled
from atelier.diffusion.multistep import DPMSolver2M, DPMSolver3M
from atelier.diffusion.posterior import posterior
from atelier.diffusion.samplers import DDIM, Ancestral, Euler, Heun, slope, start
from atelier.diffusion.schedules import Cosine, Flow, Linear, ScaledLinear
from tests.counting import Counting

SCHEDULES = {
    "linear": (Linear(), {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}),
    "scaled": (ScaledLinear(), {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}),
    "cosine": (Cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
}
EVERY = [Linear(), ScaledLinear(), Cosine(), Flow()]
SHAPE = (3, 2, 4, 4)


def names(value):
    return type(value).__name__


def smooth(x_t, t):
    """Any smooth function in the range of images."""
    return torch.tanh(0.7 * x_t + t.view(-1, 1, 1, 1)).to(x_t.dtype)


def noises(n):
    """The noise that ImageRngs(7, 0, 3) hands out in n draws."""
    rngs = ImageRngs(7, 0, SHAPE[0])
    return [rngs.randn(*SHAPE[1:]).double() for _ in range(n)]


def oracle_scheduler(kind, options, monkeypatch, draws):
    """diffusers' scheduler with its own float32 betas multiplied up in float64, and noise from a list."""
    scheduler = kind(1000, clip_sample=False, prediction_type="sample", **options)
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), 0)
    scheduler.alphas = 1 - scheduler.betas.double()
    scheduler.betas = scheduler.betas.double()
    scheduler.one = scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    module = __import__(kind.__module__, fromlist=["randn_tensor"])
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: draws.pop(0))
    return scheduler


def assert_same_trajectory(sampler, schedule, scheduler, denoise, **options):
    """Each step of ours from where theirs stands, and the end of the whole way; float64 throughout."""
    torch.manual_seed(0)
    x = noise = torch.randn(SHAPE, dtype=torch.float64)
    ours = sampler.trajectory(denoise, noise, schedule, ImageRngs(7, 0, SHAPE[0]))
    for i, (x_s, aimed) in zip(scheduler.timesteps, ours, strict=True):
        t = (i + 1).double().expand(SHAPE[0]) / 1000
        x = scheduler.step(denoise(x, t), i, x, **options).prev_sample
        assert (x_s - x).abs().max() <= 1e-5
        assert aimed.shape == SHAPE


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    ("steps", "spacing", "variance"),
    [
        (1000, "trailing", "large"),
        (50, "trailing", "small"),  # not large: there diffusers adds noise in the last step
        (30, "leading", "small"),
        (30, "leading", "large"),
    ],
)
def test_ddpm_is_diffusers(name, steps, spacing, variance, monkeypatch):
    schedule, options = SCHEDULES[name]
    options = {**options, "variance_type": f"fixed_{variance}", "timestep_spacing": spacing}
    scheduler = oracle_scheduler(diffusers.DDPMScheduler, options, monkeypatch, noises(steps))
    scheduler.set_timesteps(steps)
    sampler = Ancestral(steps=steps, variance=variance, spacing=spacing)
    assert_same_trajectory(sampler, schedule, scheduler, smooth)


@pytest.mark.parametrize("steps", [7, 37, 1000])
def test_ddpm_takes_any_number_of_steps(steps, monkeypatch):
    """Strides of unequal length: diffusers needs them spelt out."""
    scheduler = oracle_scheduler(diffusers.DDPMScheduler, {}, monkeypatch, noises(steps))
    entries = (Linear().times(steps, "linspace")[:-1] * 1000 - 1).round().long()
    scheduler.set_timesteps(timesteps=entries.tolist())
    assert_same_trajectory(Ancestral(steps=steps, spacing="linspace"), Linear(), scheduler, smooth)


def test_clipped_ddpm_is_diffusers(monkeypatch):
    scheduler = oracle_scheduler(diffusers.DDPMScheduler, {}, monkeypatch, noises(20))
    scheduler.register_to_config(clip_sample=True)
    scheduler.set_timesteps(20)

    def wide(x_t, t):
        return 2 * smooth(x_t, t)

    sampler = Ancestral(steps=20, spacing="leading")
    torch.manual_seed(0)
    x = noise = torch.randn(SHAPE, dtype=torch.float64)
    result = sampler(clipped(wide), noise, Linear(), ImageRngs(7, 0, SHAPE[0]))
    for i in scheduler.timesteps:
        x = scheduler.step(wide(x, (i + 1).double().expand(SHAPE[0]) / 1000), i, x).prev_sample
    assert (result - x).abs().max() <= 1e-5


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("steps", "spacing"), [(250, "trailing"), (30, "leading"), (1, "trailing")])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_is_diffusers(name, steps, spacing, eta, monkeypatch):
    schedule, options = SCHEDULES[name]
    options = {**options, "timestep_spacing": spacing, "set_alpha_to_one": True}
    scheduler = oracle_scheduler(diffusers.DDIMScheduler, options, monkeypatch, noises(steps))
    scheduler.set_timesteps(steps)
    sampler = DDIM(steps=steps, eta=eta, spacing=spacing)
    assert_same_trajectory(sampler, schedule, scheduler, smooth, eta=eta)


@pytest.mark.parametrize("schedule", EVERY, ids=names)
def test_posterior_is_bayes_rule(schedule):
    """q(x_s | x_t, x) from q(x_s | x) and q(x_t | x_s): precisions add."""
    s, t, x, x_t = (torch.tensor(v, dtype=torch.float64) for v in (0.31, 0.62, 0.4, -0.9))
    factor = schedule.alpha(t) / schedule.alpha(s)
    noise = schedule.sigma(t) ** 2 - factor**2 * schedule.sigma(s) ** 2
    precision = 1 / schedule.sigma(s) ** 2 + factor**2 / noise
    mean = (schedule.alpha(s) * x / schedule.sigma(s) ** 2 + factor * x_t / noise) / precision
    torch.testing.assert_close(posterior(x_t, x, schedule.level(s), schedule.level(t)), (mean, 1 / precision))


MU, STD = 0.3, 0.5


def gaussian(schedule):
    """E[x | x_t] for images N(MU, STD^2)."""

    def denoise(x_t, t):
        alpha, sigma = schedule.pair(t, like=x_t)
        return MU + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x_t - alpha * MU)

    return denoise


def transported(schedule, x, t, s):
    """Where the probability-flow ODE takes x from t to s: as many standard deviations from the mean as before."""
    spread_t, spread_s = ((schedule.alpha(u) ** 2 * STD**2 + schedule.sigma(u) ** 2).sqrt() for u in (t, s))
    return schedule.alpha(s) * MU + (x - schedule.alpha(t) * MU) * spread_s / spread_t


def error(sampler, schedule, last):
    """Largest error at the time of index `last`: -1 is t = 0, -2 the smallest time above, before Heun's Euler step."""
    torch.manual_seed(0)
    noise = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    times = sampler.times(schedule, noise.device)
    exact = transported(schedule, schedule.prior_std(times[0]) * noise, times[0], times[last])
    path = list(sampler.trajectory(gaussian(schedule), noise, schedule, None))
    return float((path[last][0] - exact).abs().max())


@pytest.mark.parametrize("schedule", EVERY, ids=names)
@pytest.mark.parametrize(("kind", "order"), [(Euler, 1), (Heun, 2)], ids=["euler", "heun"])
def test_order_of_convergence(kind, order, schedule):
    coarse, fine = (error(kind(steps=n, grid="karras"), schedule, last=-2) for n in (81, 321))
    assert torch.tensor(coarse / fine).log2() / 2 == pytest.approx(order, abs=0.15)
    assert fine < {1: 0.015, 2: 5e-4}[order]


@pytest.mark.parametrize(("kind", "order"), [(Euler, 1), (Heun, 2)], ids=["euler", "heun"])
def test_order_of_convergence_on_the_straight_path(kind, order):
    coarse, fine = (error(kind(steps=n, grid="uniform"), Flow(), last=-1) for n in (40, 160))
    assert torch.tensor(coarse / fine).log2() / 2 == pytest.approx(order, abs=0.15)


@dataclass(frozen=True, kw_only=True)
class AdamsBashforth(Euler):
    """The slope at t, and how it has changed since the step before: second order with one call a step."""

    remembers: ClassVar[int] = 1

    def step(self, x, t, s, context):
        denoised = context.predict(x, t)
        y, d = slope(x, denoised, t)
        for last in context.past:
            _, before = slope(last.x, last.denoised, last.t)
            d = d + (s.ratio - t.ratio) / (t.ratio - last.t.ratio) / 2 * (d - before)
        return (y + (s.ratio - t.ratio) * d) * s.scale, denoised


@dataclass(frozen=True, kw_only=True)
class MidpointInLogSNR(Euler):
    """The slope at the level between t and s in log-SNR, which the schedule gives   (Lu et al. 2022, DPM-Solver)."""

    def step(self, x, t, s, context):
        denoised = context.predict(x, t)
        y, d = slope(x, denoised, t)
        if s.t > 0:
            logsnr = (context.schedule.logsnr(t.t) + context.schedule.logsnr(s.t)) / 2
            m = context.schedule.level(context.schedule.time(logsnr))
            at_m = (y + (m.ratio - t.ratio) * d) * m.scale
            _, d = slope(at_m, context.predict(at_m, m), m)
        return (y + (s.ratio - t.ratio) * d) * s.scale, denoised


@pytest.mark.parametrize("schedule", EVERY, ids=names)
@pytest.mark.parametrize("kind", [AdamsBashforth, MidpointInLogSNR])
def test_a_rule_that_remembers_or_asks_the_schedule_is_of_second_order(kind, schedule):
    coarse, fine = (error(kind(steps=n, grid="karras"), schedule, last=-2) for n in (81, 321))
    assert torch.tensor(coarse / fine).log2() / 2 == pytest.approx(2, abs=0.2)
    assert fine < 1e-3


def test_past_holds_what_the_sampler_remembers():
    seen = []

    @dataclass(frozen=True, kw_only=True)
    class Remembering(Euler):
        remembers: ClassVar[int] = 2

        def step(self, x, t, s, context):
            seen.append([(float(last.t.t), float(last.x[0, 0, 0, 0])) for last in context.past])
            visited.append((float(t.t), float(x[0, 0, 0, 0])))
            return super().step(x, t, s, context)

    visited = []
    sampler = Remembering(steps=5)
    for _ in range(2):  # one image's steps are not the next one's past
        seen.clear(), visited.clear()
        sampler(smooth, torch.randn(SHAPE, dtype=torch.float64), Flow(), None)
        assert seen == [visited[max(0, k - 2) : k] for k in range(5)]


@pytest.mark.parametrize("schedule", EVERY, ids=names)
def test_euler_on_the_uniform_grid_is_ddim(schedule):
    torch.manual_seed(0)
    noise = torch.randn(SHAPE, dtype=torch.float64)
    euler = Euler(steps=12, grid="uniform")(smooth, noise, schedule, None)
    torch.testing.assert_close(euler, DDIM(steps=12)(smooth, noise, schedule, None), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", EVERY, ids=names)
def test_karras_grid_is_the_paper_s(schedule):
    """Evenly spaced in (sigma / alpha)^(1/7) between 80 and 0.01, or the table's own ends."""
    times = Heun(steps=9, grid="karras").times(schedule, torch.device("cpu"))
    ratios = schedule.sigma(times) / schedule.alpha(times)
    ends = schedule.snap(torch.tensor([1e-9, 1.0], dtype=torch.float64))
    low, high = (schedule.sigma(ends) / schedule.alpha(ends)).clamp(0.01, 80).tolist()
    wanted = torch.linspace(high ** (1 / 7), low ** (1 / 7), 9, dtype=torch.float64) ** 7
    torch.testing.assert_close(ratios[:-1], wanted, rtol=1e-8, atol=0)
    assert times[-1] == 0


GAUSSIAN = {
    "ddpm-small": Ancestral(steps=1000),
    "ddpm-large": Ancestral(steps=1000, variance="large"),
    "ddim-0": DDIM(steps=200),
    "ddim-1": DDIM(steps=1000, eta=1.0),
    "euler": Euler(steps=100, grid="uniform"),
    "heun": Heun(steps=30),
}


@pytest.mark.parametrize("schedule", EVERY, ids=names)
@pytest.mark.parametrize("name", GAUSSIAN)
def test_samples_of_gaussian_data_have_its_mean_and_deviation(name, schedule):
    rngs = ImageRngs(1, 0, 1)
    x = GAUSSIAN[name](gaussian(schedule), rngs.randn(1, 64, 64), schedule, rngs)
    assert x.dtype == torch.float32
    forgotten = MU * float(schedule.alpha(torch.ones(())))  # the prior is centred, x_1 is not quite
    assert x.mean() == pytest.approx(MU, abs=0.03 + forgotten)
    assert x.std() == pytest.approx(STD, rel=0.035)


@pytest.mark.parametrize(
    ("sampler", "nfe"),
    [(Ancestral(steps=5), 5), (DDIM(steps=5), 5), (Euler(steps=5), 5), (Heun(steps=5), 9)],
    ids=["ddpm", "ddim", "euler", "heun"],
)
def test_nfe_counts_the_calls(sampler, nfe):
    calls = []

    def denoise(x_t, t):
        assert t.shape == (3,)
        assert x_t.dtype == torch.float32
        assert t.min() > 0
        calls.append(t)
        return x_t / 2

    path = list(sampler.trajectory(denoise, torch.randn(SHAPE), Flow(), ImageRngs(0, 0, 3)))
    assert len(calls) == sampler.nfe == nfe
    assert len(path) == 5


@pytest.mark.parametrize("sampler", [Ancestral(steps=5), DDIM(steps=5, eta=0.5), Heun(steps=5)], ids=names)
def test_an_image_does_not_depend_on_its_batch(sampler):
    noise, rngs = ImageRngs(3, 0, 4).randn(*SHAPE[1:]), ImageRngs(3, 0, 4)
    together = sampler(smooth, noise, Linear(), rngs)
    rngs = ImageRngs(3, 0, 4)
    apart = [sampler(smooth, noise[i : i + 2], Linear(), rngs[i : i + 2]) for i in (0, 2)]
    torch.testing.assert_close(together, torch.cat(apart))


def test_the_call_is_the_last_of_the_trajectory():
    noise = torch.randn(SHAPE)
    path = list(Ancestral(steps=6).trajectory(smooth, noise, Linear(), ImageRngs(3, 0, 3)))
    assert torch.equal(path[-1][0], Ancestral(steps=6)(smooth, noise, Linear(), ImageRngs(3, 0, 3)))


def test_where_an_image_is_not_yet_lost_in_its_noise():
    """On the grid of training times, sigma / alpha at 80 or just above; Linear ends at 157, ScaledLinear at 15."""
    cpu = torch.device("cpu")
    assert [start(schedule, cpu) for schedule in EVERY] == [0.931, 1.0, 0.992, 1.0]
    for schedule in (Linear(), Cosine()):
        first = start(schedule, cpu)
        before, at = schedule.level(torch.tensor([first - 0.001, first], dtype=torch.float64)).ratio
        assert before < 80 <= at


NOISY = [
    Ancestral(steps=9),
    Ancestral(steps=9, variance="large"),
    DDIM(steps=9, eta=0.5),
    Heun(steps=9, churn=20.0),
    DPMSolver2M(steps=9, grid="logsnr", stochastic=True),
    DPMSolver3M(steps=9, grid="logsnr", stochastic=True),
]


@pytest.mark.parametrize("sampler", NOISY, ids=str)
@pytest.mark.parametrize("shape", [SHAPE, (3, 1, 3, 5)], ids=str)
def test_noise_of_several_steps_at_once_changes_no_bit(sampler, shape, monkeypatch):
    """Of a way that also rises, as RePaint's; and all generators stand where they stood."""
    times, x = resampled(sampler.times(Linear(), torch.device("cpu")), 2), torch.ones(shape, dtype=torch.float64)

    def way(rngs):
        return [x for pair in sampler.along(times, smooth, x, Linear(), rngs) for x in pair], rngs.randn(16)

    together, after = way(ImageRngs(1, 0, 3))
    monkeypatch.setattr(Ancestral, "always_draws", False)
    monkeypatch.setattr(type(sampler), "always_draws", False)
    one_by_one, after_one_by_one = way(ImageRngs(1, 0, 3))
    assert torch.equal(torch.stack(together), torch.stack(one_by_one)) and torch.equal(after, after_one_by_one)


@pytest.mark.parametrize("sampler", [s for s in NOISY if not isinstance(s, Heun)], ids=str)
def test_noise_of_a_way_is_drawn_at_once(sampler):
    """One draw for each of three images, in place of nine."""
    with Counting() as counted:
        sampler(smooth, torch.ones(SHAPE), Linear(), ImageRngs(1, 0, 3))
    assert counted.calls["normal_"] == 3
