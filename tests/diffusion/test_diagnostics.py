"""Errors by strength of noise, beside what is known in closed form of Gaussian images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from atelier.core.rng import ImageRngs
from atelier.diffusion import diagnostics, schedules
from atelier.diffusion.objective import Objective
from atelier.diffusion.targets import X0, Epsilon, Target, VectorField, Velocity
from atelier.diffusion.times import Uniform
from atelier.diffusion.weightings import Plain

SCHEDULES = [schedules.Linear(), schedules.Cosine(), schedules.Flow(), schedules.EDM()]
SPREAD = torch.tensor([0.3, 1.5]).view(2, 1, 1).expand(2, 3, 3)  # deviation of each pixel


def exact(objective: Objective, alone: bool = False) -> object:
    """The net that answers with E[target | x_t] of Gaussian images of these deviations; `alone`, of the mean, 0."""

    def net(x: Tensor, time: Tensor, cond: object) -> Tensor:
        t = net.t
        alpha, sigma = objective.schedule.pair(t, like=x)
        x = x / objective.schedule.input_scale(t).to(x.dtype).view(-1, 1, 1, 1)
        share = 0 if alone else alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
        denoised = share * x
        return objective.target(denoised, (x - alpha * denoised) / sigma, alpha, sigma)

    asked = objective.answer

    def answer(inner: object, x_t: Tensor, t: Tensor, cond: object) -> tuple[Tensor, Tensor | None]:
        net.t = t
        return asked(inner, x_t, t, cond)

    objective.answer = answer
    return net


def made(schedule: schedules.Schedule, target: Target) -> Objective:
    return Objective(schedule, target, Plain(), Uniform())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("target", [X0(), Velocity(), VectorField(), Epsilon()], ids=lambda t: type(t).__name__)
def test_of_gaussian_images_the_best_net_is_1_in_each_bin(schedule: schedules.Schedule, target: Target) -> None:
    n = 1000
    if isinstance(target, Epsilon) and isinstance(schedule, schedules.Flow):
        return  # refused: pure noise tells nothing
    if isinstance(target, Velocity) and isinstance(schedule, schedules.EDM):
        return  # v is of schedules that keep the variance
    objective = made(schedule, target)
    rngs = ImageRngs(0, 0, n)
    x = torch.randn(n, 2, 3, 3, generator=torch.Generator().manual_seed(0)) * SPREAD
    own, logsnr = diagnostics.errors(objective, exact(objective), x, None, rngs)
    relative = own / diagnostics.linear_error(SPREAD**2, logsnr)
    assert own.shape == logsnr.shape == (n, 5)
    error = 1.96 * relative.std(0) / n**0.5
    assert (error < 0.05).all() and ((relative.mean(0) - 1).abs() < 2 * error).all()


def test_a_net_that_knows_the_mean_alone_is_as_good_where_there_is_hardly_an_image() -> None:
    objective, n = made(schedules.Flow(), X0()), 500
    x = torch.randn(n, 2, 3, 3, generator=torch.Generator().manual_seed(0)) * SPREAD
    own, logsnr = diagnostics.errors(objective, exact(objective, alone=True), x, None, ImageRngs(0, 0, n))
    relative = (own / diagnostics.linear_error(SPREAD**2, logsnr)).mean(0)
    assert relative[-1].item() == pytest.approx(1, abs=0.05) and relative[0] > 100
    assert (relative[:-1] > relative[1:]).all()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_levels_lie_in_their_bins_and_are_spread_over_them(schedule: schedules.Schedule) -> None:
    objective = made(schedule, X0())
    x = torch.zeros(400, 1, 1, 1)
    _, logsnr = diagnostics.errors(objective, lambda x, t, c: x, x, None, ImageRngs(1, 0, 400))
    ranges = diagnostics.bins(schedule, x.device)
    assert list(ranges) == [8, 4, 0, -4, -8]
    for (centre, (low, high)), found in zip(ranges.items(), logsnr.T, strict=True):
        assert centre - 2 <= low < high <= centre + 2
        assert (found >= low - 0.2).all() and (found <= high + 1e-6).all()  # a table's step below
        assert found.mean().item() == pytest.approx((low + high) / 2, abs=4 * (high - low) / 12**0.5 / 20 + 0.1)


def test_bins_that_training_never_reaches_are_left_out() -> None:
    """The schedule of latent diffusion ends at a log-SNR of -5.36 and begins at 7.07."""
    ranges = diagnostics.bins(schedules.ScaledLinear(), torch.device("cpu"))
    assert list(ranges) == [8, 4, 0, -4]
    assert ranges[-4][0] == pytest.approx(-5.36, abs=0.01) and ranges[8] == (6, pytest.approx(7.07, abs=0.01))


def test_image_k_is_measured_alike_in_any_batch() -> None:
    objective = made(schedules.Cosine(), Epsilon())
    x = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    net = lambda x, t, c: x.roll(1, -1)  # noqa: E731
    whole = diagnostics.errors(objective, net, x, None, ImageRngs(3, 0, 6))
    parts = [diagnostics.errors(objective, net, x[k : k + 2], None, ImageRngs(3, k, 2)) for k in (0, 2, 4)]
    for column, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(column, torch.cat(pieces))


def test_a_learned_variance_is_no_part_of_the_image() -> None:
    objective = Objective(schedules.Cosine(), Epsilon(), Plain(), Uniform(), loss="hybrid", learned_variance=True)
    x = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    with_v = diagnostics.errors(objective, lambda x, t, c: torch.cat([x, x + 9], 1), x, None, ImageRngs(3, 0, 4))
    plain = made(schedules.Cosine(), Epsilon())
    without = diagnostics.errors(plain, lambda x, t, c: x, x, None, ImageRngs(3, 0, 4))
    assert torch.equal(with_v[0], without[0])


def test_the_linear_guess_by_hand() -> None:
    """Variances 1 and 4 at an SNR of 2: 1 / 3 and 4 / 9."""
    found = diagnostics.linear_error(torch.tensor([1.0, 4.0]).view(2, 1, 1), torch.full((3, 2), 2.0).log())
    torch.testing.assert_close(found, torch.full((3, 2), (1 / 3 + 4 / 9) / 2, dtype=torch.float64))
    assert (diagnostics.linear_error(torch.zeros(1, 2, 2), torch.zeros(1)) > 0).all()
