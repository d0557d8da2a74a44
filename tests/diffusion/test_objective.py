"""The objective: what it draws, what the net sees, what it costs."""

import pytest
import torch

from atelier.core.condition import Condition
from atelier.core.errors import UserError
from atelier.diffusion.objective import Objective
from atelier.diffusion.schedules import Cosine, Flow, Linear, ScaledLinear
from atelier.diffusion.targets import X0, Epsilon, VectorField, Velocity
from atelier.diffusion.times import LogitNormal, Uniform
from atelier.diffusion.weightings import ErrorOf, MinSNR, Plain

CHOICES = [
    (schedule, target, weighting, times)
    for schedule in (Linear(), ScaledLinear(), Cosine(), Flow())
    for target in (Epsilon(), X0(), Velocity(), VectorField())
    for weighting in (Plain(), MinSNR())
    for times in (Uniform(), LogitNormal())
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
