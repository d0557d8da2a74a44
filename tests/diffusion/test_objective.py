"""The objective: what it draws, what the net sees, what it costs."""

import math
from itertools import pairwise

import pytest
import torch

from atelier.core.condition import Condition
from atelier.core.errors import UserError
from atelier.diffusion.bound import below, bits, log_bin, prior_term, snapped, step_term
from atelier.diffusion.objective import Objective
from atelier.diffusion.posterior import log_variance_of, posterior, transition
from atelier.diffusion.schedules import EDM, Cosine, Flow, Linear, ScaledLinear
from atelier.diffusion.targets import X0, Epsilon, Preconditioned, VectorField, Velocity
from atelier.diffusion.times import LogitNormal, LogNormal, Uniform
from atelier.diffusion.weightings import ErrorOf, MinSNR, Plain
from atelier.images.pixels import to_float, to_uint8

CHOICES = [
    (schedule, target, weighting, times)
    for schedule in (Linear(), ScaledLinear(), Cosine(), Flow())
    for target in (Epsilon(), X0(), Velocity(), VectorField())
    for weighting in (Plain(), MinSNR())
    for times in (Uniform(), LogitNormal(), LogNormal())
    if not (isinstance(schedule, Flow) and isinstance(target, Epsilon))
]
CPU = torch.device("cpu")


def name(value):
    return type(value).__name__


def objective_of(schedule, target, weighting=None, times=None):
    return Objective(schedule, target, weighting or Plain(), times or Uniform())


class Perfect:
    """A net that knows the image: x0 = 0, so x_t = sigma eps."""

    def __init__(self, objective):
        self.objective, self.calls = objective, []

    def __call__(self, x_t, time, cond):
        self.calls.append((x_t, time, cond))
        n = getattr(self.objective.schedule, "n_steps", None)
        t = (time.double() + 1) / n if n else time.double() / 1000
        alpha, sigma = self.objective.schedule.pair(t, like=x_t)
        eps = x_t / sigma
        return {Epsilon: eps, X0: 0 * eps, Velocity: alpha * eps, VectorField: eps}[type(self.objective.target)]


@pytest.mark.parametrize(("schedule", "target", "weighting", "times"), CHOICES, ids=name)
def test_a_perfect_net_costs_nothing(schedule, target, weighting, times):
    torch.manual_seed(0)
    objective = objective_of(schedule, target, weighting, times)
    net, cond = Perfect(objective), Condition(torch.ones(64, 5))
    loss = objective(net, torch.zeros(64, 1, 4, 4), cond)
    x_t, time, passed = net.calls[0]
    assert loss.shape == (64,)
    assert loss.dtype == x_t.dtype == time.dtype == torch.float32
    assert loss.max() < 1e-5
    assert passed is cond
    assert time.shape == (64,)


def test_loss_is_the_weighted_square_of_the_answer():
    """A net that answers 0: E |eps|^2 = 1 for eps, E |eps - x|^2 = 2 for flow with unit-variance images."""
    torch.manual_seed(0)
    x = torch.randn(512, 1, 8, 8)
    for schedule, target, expected in [
        (Linear(), Epsilon(), 1.0),
        (Flow(), VectorField(), 2.0),
        (Linear(), Velocity(), 1.0),
    ]:
        loss = objective_of(schedule, target)(lambda x_t, time, cond: torch.zeros_like(x_t), x)
        assert loss.mean() == pytest.approx(expected, rel=0.03)


def test_discrete_times_are_uniform_over_the_table():
    torch.manual_seed(0)
    t = objective_of(Linear(n_steps=10), Epsilon()).sample_times(20_000, CPU)
    counts = torch.bincount((t * 10).round().long(), minlength=11)
    assert counts[0] == 0
    assert (counts[1:] - 2000).abs().max() < 4 * 1800**0.5
    torch.testing.assert_close(t * 10, (t * 10).round(), rtol=1e-12, atol=0)


def test_the_ends_of_the_generator_s_range_are_harmless(monkeypatch):
    monkeypatch.setattr(torch, "rand", torch.zeros)  # 0 is drawn now and then, 1 never
    objective = objective_of(Flow(), X0(), MinSNR())
    assert objective.sample_times(2, CPU).tolist() == [1, 1]
    assert objective(lambda x_t, time, cond: x_t, torch.zeros(2, 1, 4, 4)).isfinite().all()


def test_logit_normal_is_normal_in_logits():
    torch.manual_seed(0)
    logits = objective_of(Flow(), VectorField(), times=LogitNormal()).sample_times(20_000, CPU).logit()
    assert abs(logits.mean()) < 4 / 20_000**0.5
    assert abs(logits.std() - 1) < 4 / 40_000**0.5


def test_logit_normal_with_a_mean_and_a_deviation():
    torch.manual_seed(0)
    objective = objective_of(Flow(), X0(), times=LogitNormal(logit_mean=0.4, logit_std=1.3))
    logits = objective.sample_times(20_000, CPU).logit()
    assert abs(logits.mean() - 0.4) < 4 * 1.3 / 20_000**0.5 and abs(logits.std() - 1.3) < 4 * 1.3 / 40_000**0.5


@pytest.mark.parametrize(("images_seen", "mean"), [(0, 0.9), (500, 0.35), (1000, -0.2), (5000, -0.2)])
def test_the_mean_moves_with_the_images_seen(images_seen, mean):
    torch.manual_seed(0)
    objective = objective_of(
        Flow(), X0(), times=LogitNormal(logit_mean=0.9, logit_mean_end=-0.2, logit_mean_images=1000)
    )
    assert abs(objective.sample_times(20_000, CPU, images_seen).logit().mean() - mean) < 4 / 20_000**0.5


@pytest.mark.parametrize("schedule", [Flow(), Cosine(), Linear()])
@pytest.mark.parametrize("space", [X0(), Velocity(), VectorField(), Epsilon()], ids=name)
@pytest.mark.parametrize("target", [X0(), Velocity(), VectorField()], ids=name)
def test_the_space_of_the_error_is_not_the_target(schedule, target, space):
    """Two nets that say the same of the image, one in its own words: the loss in `space` is that of the net which
    answers `space` itself."""
    torch.manual_seed(0)
    x, x_hat, eps = torch.randn(3, 64, 1, 4, 4).double()
    t = schedule.snap(torch.linspace(0.05, 0.95, 64, dtype=torch.float64))
    alpha, sigma = schedule.pair(t, like=x)
    eps_hat = (alpha * x + sigma * eps - alpha * x_hat) / sigma
    right, given = (space(*pair, alpha, sigma) for pair in ((x, eps), (x_hat, eps_hat)))
    own = target(x_hat, eps_hat, alpha, sigma) - target(x, eps, alpha, sigma)
    told = objective_of(schedule, target, ErrorOf(space)).weight(t, like=x) * own**2
    torch.testing.assert_close(told, (given - right) ** 2)


def test_times_below_the_floor_are_weighted_as_it_is():
    t = torch.tensor([0.01, 0.1, 0.2, 0.5], dtype=torch.float64)
    objective = objective_of(Flow(), X0(), ErrorOf(VectorField(), time_floor=0.2))
    weights = objective.weight(t, like=torch.zeros(4, 1, 1, 1).double())
    torch.testing.assert_close(weights.flatten(), torch.tensor([25.0, 25.0, 25.0, 4.0], dtype=torch.float64))


@pytest.mark.parametrize(("schedule", "target", "weighting", "times"), CHOICES[::2], ids=name)
def test_denoise_returns_the_image(schedule, target, weighting, times):
    torch.manual_seed(0)
    objective = objective_of(schedule, target, weighting, times)
    t = schedule.snap(torch.tensor([0.02, 0.5, 0.98], dtype=torch.float64))
    _, sigma = schedule.pair(t, like=torch.zeros(3, 1, 1, 1))
    image = objective.denoise(Perfect(objective), sigma * torch.randn(3, 1, 4, 4), t)
    assert image.dtype == torch.float32
    assert image.abs().max() < 2e-4


@pytest.mark.parametrize("target", [Epsilon(), Velocity()], ids=name)
def test_noising_and_loss_stay_float32_around_a_bf16_net(target):
    conv = torch.nn.Conv2d(3, 3, 3, padding=1)
    seen = []

    def net(x_t, time, cond):
        output = conv(x_t)
        seen.append((x_t.dtype, output.dtype))
        return output

    with torch.autocast("cpu", torch.bfloat16):
        objective = objective_of(Linear(), target)
        loss = objective(net, torch.zeros(2, 3, 4, 4))
        image = objective.denoise(net, torch.zeros(2, 3, 4, 4), torch.tensor([0.5, 1.0]))
    assert seen == [(torch.float32, torch.bfloat16)] * 2
    assert loss.dtype == image.dtype == torch.float32


def test_eps_from_pure_noise_is_refused():
    with pytest.raises(UserError, match="pure noise"):
        objective_of(Flow(), Epsilon())


def test_log_normal_is_normal_in_the_logarithm_of_sigma():
    torch.manual_seed(0)
    objective = objective_of(EDM(), Preconditioned(), times=LogNormal())
    logs = objective.schedule.sigma(objective.sample_times(20_000, CPU)).log()
    assert abs(logs.mean() + 1.2) < 4 * 1.2 / 20_000**0.5 and abs(logs.std() - 1.2) < 4 * 1.2 / 40_000**0.5
    assert objective_of(Linear(), X0(), times=LogNormal(log_mean=9.0)).sample_times(9, CPU).tolist() == [1] * 9


def test_a_shift_moves_times_towards_noise():
    """t -> s t / (1 + (s - 1) t), whose logit is ln s further on."""
    torch.manual_seed(0)
    logits = objective_of(Flow(), X0(), times=LogitNormal(shift=3.0)).sample_times(20_000, CPU).logit()
    assert abs(logits.mean() - math.log(3)) < 4 / 20_000**0.5


def test_the_net_sees_images_of_unit_size_whatever_the_noise():
    torch.manual_seed(0)
    objective, seen = objective_of(EDM(), Preconditioned(), times=LogNormal(log_std=3.0)), []
    objective(lambda x_t, time, cond: seen.append(x_t) or x_t, 0.5 * torch.randn(64, 3, 16, 16))
    deviations = seen[0].flatten(1).std(1)
    assert (deviations - 1).abs().max() < 0.15


# ---- one answer, whatever it is called ------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [Epsilon(), X0(), Velocity(), VectorField(), Preconditioned()], ids=name)
@pytest.mark.parametrize("schedule", [Linear(), Cosine(), EDM()], ids=name)
def test_the_same_image_said_in_any_words_costs_the_same(schedule, target):
    """Nets that stand for one wrong image, each in its own target's words, under the same total weight."""
    torch.manual_seed(0)
    objective = objective_of(schedule, target, ErrorOf(Velocity()))
    x, eps, guess = torch.randn(3, 8, 1, 4, 4).double()
    t = objective.sample_times(8, CPU)
    alpha, sigma = schedule.pair(t, like=x)
    seen = (alpha * (x - guess) + sigma * eps) / sigma  # the noise that the wrong image would leave
    found = objective.squared_error(target(guess, seen, alpha, sigma), x, eps, t)
    right = Velocity()(guess, seen, alpha, sigma) - Velocity()(x, eps, alpha, sigma)
    torch.testing.assert_close(found, (right**2).flatten(1).mean(1), rtol=1e-6, atol=0)


# ---- the variational bound ------------------------------------------------------------------------------------------


def gaussian(std):
    """The objective that trains the variance too, and the exact net of N(0, std^2) images under it, v at the least."""
    objective = Objective(Linear(), Epsilon(), Plain(), Uniform(), "vlb", learned_variance=True)

    def net(x_t, time, cond):
        t = (time.double() + 1) / 1000
        alpha, sigma = objective.schedule.pair(t, like=x_t.double())
        eps = sigma / (alpha**2 * std**2 + sigma**2) * x_t
        return torch.cat([eps, -torch.ones_like(eps)], dim=1)

    return objective, net


@pytest.mark.parametrize("std", [0.25, 1.0])
def test_the_terms_of_a_gaussian_model_are_known(std):
    """E L_t = (SNR_s - SNR_t) s^2 / (1 + s^2 SNR_t) / 2, with the posterior's own variance."""
    torch.manual_seed(0)
    objective, net = gaussian(std)
    x = std * torch.randn(4000, 1, 2, 2)
    for entry in (2, 100, 700, 1000):
        t, s = (torch.full((4000,), e / 1000, dtype=torch.float64) for e in (entry, entry - 1))
        alpha, sigma = objective.schedule.pair(t, like=x)
        x_t = alpha * x + sigma * torch.randn_like(x)
        output, v = objective.answer(net, x_t, t, None)
        denoised = Epsilon().denoised(output, x_t, alpha, sigma)
        terms = step_term(x, denoised, v, s, t, objective.schedule) / 4
        snr_t, snr_s = (objective.schedule.logsnr(k[:1]).exp().item() for k in (t, s))
        expected = (snr_s - snr_t) * std**2 / (1 + std**2 * snr_t) / 2
        assert abs(terms.mean() - expected) < 4 * terms.std() / 4000**0.5
        torch.testing.assert_close(step_term(x, x, v, s, t, objective.schedule), torch.zeros(4000).double())


def test_v_lies_between_both_variances():
    t, s = Linear().level(torch.tensor(0.5).double()), Linear().level(torch.tensor(0.499).double())
    at = [log_variance_of(torch.tensor(v), s, t, Linear()).exp().item() for v in (-1.0, 1.0)]
    assert at == pytest.approx([posterior(t.t, t.t, s, t)[1].item(), transition(s, t)[1].item()])


def test_the_step_to_the_image_has_the_variance_of_the_one_before_it():
    """Its own posterior has none (Nichol & Dhariwal 2021, as published)."""
    table = Linear()
    zero, first, second = (table.level(torch.tensor(k / 1000).double()) for k in (0, 1, 2))
    found = log_variance_of(torch.tensor(-1.0), zero, first, table).exp()
    torch.testing.assert_close(found, posterior(first.t, first.t, first, second)[1])


def test_grey_levels_share_all_probability():
    x = to_float(torch.arange(256, dtype=torch.uint8)).double()
    for mean, log_std in ((0.1, -1.0), (-0.999, -4.0), (1.2, -3.0)):
        assert log_bin(x, torch.tensor(mean), torch.tensor(log_std)).exp().sum() == pytest.approx(1, abs=1e-6)


def test_the_whole_bound_of_a_gaussian_model_is_its_entropy():
    """-log2 of N(0, s^2) in grey levels: log2(s sqrt(2 pi e) 127.5) bits a dimension, 7.04 for s = 0.25."""
    torch.manual_seed(0)
    schedule = Flow()
    x = to_float(to_uint8(0.25 * torch.randn(40, 1, 8, 8)))
    total, levels = prior_term(x, schedule), [0.0, *torch.logspace(-2, 0, 1000).tolist()]  # fine where it counts
    for low, high in pairwise(levels):
        s, t = (torch.full((40,), level, dtype=torch.float64) for level in (low, high))
        alpha, sigma = schedule.pair(t, like=x.double())
        x_t = alpha * x + sigma * torch.randn_like(x)
        denoised = alpha * 0.25**2 / (alpha**2 * 0.25**2 + sigma**2) * x_t
        total = total + step_term(x, denoised, None, s, t, schedule)
    expected = math.log2(0.25 * (2 * math.pi * math.e) ** 0.5 * 127.5)
    assert bits(total, x).mean() == pytest.approx(expected, abs=0.1)


def test_hybrid_teaches_the_variance_alone_by_the_bound():
    torch.manual_seed(0)
    x, parameters = torch.randn(4, 1, 4, 4), [torch.zeros(1, 1, 4, 4, requires_grad=True) for _ in range(2)]

    def net(x_t, time, cond):
        return torch.cat([p.expand(4, 1, 4, 4) for p in parameters], dim=1)

    gradients = {}
    for loss in ("simple", "hybrid", "vlb"):
        torch.manual_seed(1)
        objective = Objective(Linear(), Epsilon(), Plain(), Uniform(), "vlb", learned_variance=True)
        objective.loss = loss
        found = torch.autograd.grad(objective(net, x).sum(), parameters, allow_unused=True)
        gradients[loss] = found
    assert not gradients["simple"][1].any()
    torch.testing.assert_close(gradients["hybrid"][0], gradients["simple"][0])
    torch.testing.assert_close(gradients["hybrid"][1], gradients["vlb"][1] / 1000)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"learned_variance": True}, "loss=hybrid does. Fix: model.objective.learned_variance=false"),
        ({"loss": "hybrid"}, "Fix: model.objective.loss=simple"),
        ({"loss": "vlb", "weighting": MinSNR()}, "Fix: weighting@model.objective.weighting=plain"),
        ({"target": Preconditioned(0.4), "schedule": EDM()}, "Fix: model.objective.target.sigma_data=0.5"),
        ({"loss": "vlb", "times": LogitNormal()}, "time_distribution@model.objective.time_distribution=uniform"),
    ],
)
def test_choices_that_contradict_are_refused(options, told):
    parts = {"schedule": Linear(), "target": Epsilon(), "weighting": Plain(), "times": Uniform()}
    given = [options.pop(name, part) for name, part in parts.items()]
    with pytest.raises(UserError) as caught:
        Objective(*given, **options)
    assert caught.value.at("model.objective").line().endswith(told)


@pytest.mark.parametrize("schedule", [Flow(), EDM(), Linear(), Linear(n_steps=4000)], ids=name)
def test_a_level_of_the_bound_is_met_and_the_one_below_is_the_one_before(schedule):
    levels = schedule.levels()
    assert torch.equal(below(schedule, levels), torch.cat([torch.zeros(1), levels[:-1]]).double())
    assert torch.equal(schedule.snap(levels), levels)
    t, s = snapped(schedule, torch.arange(1, len(levels) + 1) / len(levels) - 0.5 / len(levels))
    assert torch.equal(t, levels) and torch.equal(s, below(schedule, levels))


def test_training_by_the_bound_meets_the_step_to_the_image():
    """On a schedule whose levels are not evenly spaced from 0."""
    torch.manual_seed(0)
    objective = Objective(Flow(), VectorField(), Plain(), Uniform(), "vlb")
    t = objective.sample_times(20_000, CPU)
    assert (below(objective.schedule, t) == 0).sum() > 5
