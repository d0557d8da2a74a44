"""The objective: what it draws, what the net sees, what it costs."""

import pytest
import torch

from atelier.core.errors import UserError
from atelier.diffusion.objective import Objective
from atelier.diffusion.schedules import Cosine, Flow, Linear, ScaledLinear
from atelier.diffusion.targets import target as aimed

CHOICES = [
    (schedule, target, weighting, density)
    for schedule in (Linear(), ScaledLinear(), Cosine(), Flow())
    for target in ("eps", "x0", "v", "flow")
    for weighting in ("plain", "min_snr")
    for density in ("uniform", "logit_normal")
    if not (isinstance(schedule, Flow) and target == "eps")
]


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
        return {"eps": eps, "x0": 0 * eps, "v": alpha * eps, "flow": eps}[self.objective.target]


@pytest.mark.parametrize(("schedule", "target", "weighting", "density"), CHOICES)
def test_a_perfect_net_costs_nothing(schedule, target, weighting, density):
    torch.manual_seed(0)
    objective = Objective(schedule, target, weighting, density)
    net, cond = Perfect(objective), torch.ones(64, 5)
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
    for schedule, target, expected in [(Linear(), "eps", 1.0), (Flow(), "flow", 2.0), (Linear(), "v", 1.0)]:
        loss = Objective(schedule, target)(lambda x_t, time, cond: torch.zeros_like(x_t), x)
        assert loss.mean() == pytest.approx(expected, rel=0.03)


def test_discrete_times_are_uniform_over_the_table():
    torch.manual_seed(0)
    t = Objective(Linear(n_steps=10), "eps").draw(20_000, torch.device("cpu"))
    counts = torch.bincount((t * 10).round().long(), minlength=11)
    assert counts[0] == 0
    assert (counts[1:] - 2000).abs().max() < 4 * 1800**0.5
    torch.testing.assert_close(t * 10, (t * 10).round(), rtol=1e-12, atol=0)


def test_the_ends_of_the_generator_s_range_are_harmless(monkeypatch):
    monkeypatch.setattr(torch, "rand", torch.zeros)  # 0 is drawn now and then, 1 never
    objective = Objective(Flow(), "x0", "min_snr")
    assert objective.draw(2, torch.device("cpu")).tolist() == [1, 1]
    assert objective(lambda x_t, time, cond: x_t, torch.zeros(2, 1, 4, 4)).isfinite().all()


def test_logit_normal_is_normal_in_logits():
    torch.manual_seed(0)
    logits = Objective(Flow(), "flow", density="logit_normal").draw(20_000, torch.device("cpu")).logit()
    assert abs(logits.mean()) < 4 / 20_000**0.5
    assert abs(logits.std() - 1) < 4 / 40_000**0.5


def test_logit_normal_with_a_mean_and_a_deviation():
    torch.manual_seed(0)
    objective = Objective(Flow(), "x0", density="logit_normal", mean=0.4, deviation=1.3)
    logits = objective.draw(20_000, torch.device("cpu")).logit()
    assert abs(logits.mean() - 0.4) < 4 * 1.3 / 20_000**0.5 and abs(logits.std() - 1.3) < 4 * 1.3 / 40_000**0.5


@pytest.mark.parametrize(("images_seen", "mean"), [(0, 0.9), (500, 0.35), (1000, -0.2), (5000, -0.2)])
def test_the_mean_moves_with_the_images_seen(images_seen, mean):
    torch.manual_seed(0)
    objective = Objective(Flow(), "x0", density="logit_normal", mean=0.9, mean_end=-0.2, mean_images=1000)
    assert abs(objective.draw(20_000, torch.device("cpu"), images_seen).logit().mean() - mean) < 4 / 20_000**0.5


@pytest.mark.parametrize("schedule", [Flow(), Cosine(), Linear()])
@pytest.mark.parametrize("space", ["x0", "v", "flow", "eps"])
@pytest.mark.parametrize("target", ["x0", "v", "flow"])
def test_the_space_of_the_error_is_not_the_target(schedule, target, space):
    """Two nets that say the same of the image, one in its own words: the loss in `space` is that of the net which
    answers `space` itself."""
    torch.manual_seed(0)
    x, x_hat, eps = torch.randn(3, 64, 1, 4, 4).double()
    t = schedule.snap(torch.linspace(0.05, 0.95, 64, dtype=torch.float64))
    alpha, sigma = schedule.pair(t, like=x)
    eps_hat = (alpha * x + sigma * eps - alpha * x_hat) / sigma
    right, given = (aimed(space, *pair, alpha, sigma) for pair in ((x, eps), (x_hat, eps_hat)))
    own = aimed(target, x_hat, eps_hat, alpha, sigma) - aimed(target, x, eps, alpha, sigma)
    told = Objective(schedule, target, space=space).weight(t, like=x) * own**2
    torch.testing.assert_close(told, (given - right) ** 2)


def test_times_below_the_floor_are_weighted_as_it_is():
    t = torch.tensor([0.01, 0.1, 0.2, 0.5], dtype=torch.float64)
    weights = Objective(Flow(), "x0", space="flow", floor=0.2).weight(t, like=torch.zeros(4, 1, 1, 1).double())
    torch.testing.assert_close(weights.flatten(), torch.tensor([25.0, 25.0, 25.0, 4.0], dtype=torch.float64))


def test_min_snr_names_its_own_space():
    with pytest.raises(UserError, match="model.objective.space=flow: .*Fix: model.objective.space=null"):
        Objective(Cosine(), "x0", "min_snr", space="flow")


@pytest.mark.parametrize(("schedule", "target", "weighting", "density"), CHOICES[::2])
def test_denoise_returns_the_image(schedule, target, weighting, density):
    torch.manual_seed(0)
    objective = Objective(schedule, target, weighting, density)
    t = schedule.snap(torch.tensor([0.02, 0.5, 0.98], dtype=torch.float64))
    _, sigma = schedule.pair(t, like=torch.zeros(3, 1, 1, 1))
    image = objective.denoise(Perfect(objective), sigma * torch.randn(3, 1, 4, 4), t)
    assert image.dtype == torch.float32
    assert image.abs().max() < 2e-4


@pytest.mark.parametrize("target", ["eps", "v"])
def test_noising_and_loss_stay_float32_around_a_bf16_net(target):
    conv = torch.nn.Conv2d(3, 3, 3, padding=1)
    seen = []

    def net(x_t, time, cond):
        output = conv(x_t)
        seen.append((x_t.dtype, output.dtype))
        return output

    with torch.autocast("cpu", torch.bfloat16):
        objective = Objective(Linear(), target)
        loss = objective(net, torch.zeros(2, 3, 4, 4))
        image = objective.denoise(net, torch.zeros(2, 3, 4, 4), torch.tensor([0.5, 1.0]))
    assert seen == [(torch.float32, torch.bfloat16)] * 2
    assert loss.dtype == image.dtype == torch.float32


def test_eps_from_pure_noise_is_refused():
    with pytest.raises(UserError, match="pure noise"):
        Objective(Flow(), "eps")
