"""SDEdit, inpainting and DDIM inversion of Gaussian images, for which the best denoiser and the ODE are known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from atelier.core.batch import Cond
from atelier.core.condition import Condition
from atelier.core.rng import ImageRngs
from atelier.diffusion.diffusion_sampler import DiffusionSampler, noised
from atelier.diffusion.guidance import ClassifierFree
from atelier.diffusion.inpainting import knowing, resampled
from atelier.diffusion.objective import Objective
from atelier.diffusion.samplers import DDIM, Ancestral, Euler, Heun, Sampler, cut
from atelier.diffusion.schedules import EDM, Cosine, Flow, Linear, Schedule
from atelier.diffusion.targets import X0
from atelier.diffusion.times import Uniform
from atelier.diffusion.weightings import Plain

MU, STD, CORRELATION = 0.3, 0.5, 0.8
EVERY = [Linear(), Cosine(), Flow(), EDM()]
asked: list[float] = []  # times at which a net was called


class Nothing:
    """No conditions."""

    conditions = ()

    def __call__(self, cond: dict[str, Tensor], n: int) -> Condition:
        return self.null(n)

    cond_sizes = {"vector": 1}

    def null(self, n: int, cond: Cond | None = None) -> Condition:
        return Condition(torch.zeros(n, 1))


class Exact(Objective):
    """Denoises by a function of x_t, alpha and sigma."""

    def __init__(self, schedule: Schedule, best: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__(schedule, X0(), Plain(), Uniform())
        self.best = best

    def denoise(self, net: None, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        asked.append(t[0].item())
        return self.best(x_t, *self.schedule.pair(t, like=x_t.double())).to(x_t.dtype)


def independent(x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """E[x | x_t] of pixels N(MU, STD^2)."""
    return MU + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x_t - alpha * MU)


def pairs(x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """E[x | x_t] of two pixels side by side, each N(0, 1), correlated."""
    alpha, sigma = alpha.flatten()[0], sigma.flatten()[0]
    both = torch.tensor([[1, CORRELATION], [CORRELATION, 1]], dtype=torch.float64)
    gain = alpha * both @ torch.linalg.inv(alpha**2 * both + sigma**2 * torch.eye(2))
    return x_t.double() @ gain.T


def made(schedule: Schedule, best: Callable = independent, sampler: Sampler | None = None) -> DiffusionSampler:
    guider = ClassifierFree(guidance=1.0)
    return DiffusionSampler(Exact(schedule, best), None, Nothing(), sampler or DDIM(steps=100), guider, clip=False)


def images(n: int = 3, side: int = 4) -> Tensor:
    return MU + STD * ImageRngs(5, 0, n).randn(1, side, side)


def spread(schedule: Schedule, t: Tensor) -> Tensor:
    return (schedule.alpha(t) ** 2 * STD**2 + schedule.sigma(t) ** 2).sqrt()


@pytest.mark.parametrize("schedule", EVERY, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(
    "sampler", [DDIM(steps=200), Heun(steps=40), Euler(steps=200, grid="karras")], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("strength", [0.2, 0.6])
def test_an_edit_follows_the_ode_from_the_noised_source(schedule: Schedule, sampler: Sampler, strength: float) -> None:
    """As many deviations from the mean at time 0 as at `strength`, wherever in the grid that lies."""
    x, t = images(), torch.tensor(strength, dtype=torch.float64)
    edited = made(schedule).asked(sampler).edit({}, x, ImageRngs(0, 0, 3), strength)
    x_t = schedule.alpha(t) * x + schedule.sigma(t) * ImageRngs(0, 0, 3).randn(1, 4, 4)
    expected = MU + (x_t - schedule.alpha(t) * MU) * STD / spread(schedule, t)
    torch.testing.assert_close(edited, expected.float(), atol=0.03, rtol=0)


@pytest.mark.parametrize("schedule", [Linear(), Flow()], ids=lambda s: type(s).__name__)
def test_a_stochastic_edit_keeps_the_share_of_the_source_that_bayes_gives(schedule: Schedule) -> None:
    x, t = images(4, 100), torch.tensor(0.4, dtype=torch.float64)
    edited = made(schedule).asked(Ancestral(steps=400)).edit({}, x, ImageRngs(0, 0, 4), 0.4)
    kept = ((edited - MU) * (x - MU)).mean() / STD**2
    signal = schedule.alpha(t) ** 2 * STD**2
    assert kept.item() == pytest.approx((signal / (signal + schedule.sigma(t) ** 2)).item(), abs=0.02)
    assert edited.std().item() == pytest.approx(STD, abs=0.02)


@pytest.mark.parametrize("sampler", [DDIM(steps=10), Ancestral(steps=10), Heun(steps=10)], ids=lambda s: str(s)[:5])
def test_strength_goes_from_the_source_to_a_sample(sampler: Sampler) -> None:
    x, model, rngs = images(), made(Flow(), sampler=sampler), ImageRngs(0, 0, 3)
    sampled = model({}, rngs.randn(1, 4, 4), rngs)
    torch.testing.assert_close(model.edit({}, x, ImageRngs(0, 0, 3), 1.0), sampled, atol=0.02, rtol=0)
    torch.testing.assert_close(model.edit({}, x, ImageRngs(0, 0, 3), 0.002), x, atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("schedule", "strength", "times"),
    [
        (Flow(), 0.35, [0.35, 0.3, 0.2, 0.1]),
        (Flow(), 0.3, [0.3, 0.2, 0.1]),
        (Linear(), 0.3501, [0.351, 0.3, 0.2, 0.1]),  # a level of the table
        (Flow(), 0.01, [0.01]),
    ],
)
def test_an_edit_asks_at_the_times_that_are_left(schedule: Schedule, strength: float, times: list[float]) -> None:
    asked.clear()
    made(schedule).asked(DDIM(steps=10)).edit({}, images(), ImageRngs(0, 0, 3), strength)
    assert asked == pytest.approx(times)


def test_what_is_cut_gives_its_place_to_the_first() -> None:
    times = torch.tensor([0.9, 0.6, 0.3, 0.0], dtype=torch.float64)
    assert cut(times, 0.7).tolist() == [0.7, 0.6, 0.3, 0.0]
    assert cut(times, 0.6).tolist() == [0.6, 0.3, 0.0]
    assert torch.equal(cut(times, 0.95), times) and torch.equal(cut(times.repeat_interleave(2), 0.95), times)


# ---- inversion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", EVERY, ids=lambda s: type(s).__name__)
def test_an_inverted_image_lies_where_the_ode_takes_it(schedule: Schedule) -> None:
    """As many deviations from the mean as the image does; and DDIM leads back."""
    x, model = images(), made(schedule, sampler=DDIM(steps=250))
    x_t, times = model.invert({}, x)
    expected = schedule.alpha(times[0]) * MU + (x - MU).double() * spread(schedule, times[0]) / STD
    assert times[0] > 0.9
    torch.testing.assert_close(x_t, expected, atol=0, rtol=0.06)
    back = model.revert({}, x_t, times)
    torch.testing.assert_close(back, x, atol=1e-3, rtol=0)


def test_few_steps_lead_back_too() -> None:
    x, model = images(), made(Flow(), sampler=Euler(steps=10))
    assert (model.revert({}, *model.invert({}, x)) - x).abs().max() < 2e-3


# ---- inpainting -----------------------------------------------------------------------------------------------------

SEEN = 1.0  # the left pixel of each pair; the right one is then N(CORRELATION SEEN, 1 - CORRELATION^2) = N(0.8, 0.36)


def filled(sampler: Sampler, resamplings: int, schedule: Schedule) -> Tensor:
    n = 40
    x = torch.full((n, 1, 100, 2), SEEN)
    x[..., 1] = 9.0  # below the mask
    mask = torch.zeros(n, 1, 100, 2, dtype=torch.bool)
    mask[..., 1] = True
    return made(schedule, pairs).asked(sampler).inpaint({}, x, mask, ImageRngs(0, 0, n), resamplings)


@pytest.mark.parametrize("schedule", [Linear(), Flow()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("sampler", [Ancestral(steps=100), DDIM(steps=50), Heun(steps=18)], ids=lambda s: str(s)[:5])
def test_what_is_filled_comes_to_fit_what_is_known(sampler: Sampler, schedule: Schedule) -> None:
    """With resamplings nearly as Bayes has it; without them what is filled knows too little of the rest."""
    known, rest = filled(sampler, 10, schedule).unbind(3)
    assert torch.equal(known, torch.full_like(known, SEEN))
    assert rest.mean().item() == pytest.approx(0.8, abs=0.12)
    assert rest.var().item() == pytest.approx(0.36, abs=0.1)
    once = filled(sampler, 1, schedule)[..., 1]
    assert 0.2 < once.mean() < rest.mean() - 0.15


@pytest.mark.parametrize("sampler", [Ancestral(steps=10), Heun(steps=10)], ids=lambda s: str(s)[:5])
def test_with_nothing_known_inpainting_is_sampling_and_with_everything_the_source(sampler: Sampler) -> None:
    x, model, rngs = images(), made(Linear(), sampler=sampler), ImageRngs(0, 0, 3)
    mask = torch.ones(3, 1, 4, 4, dtype=torch.bool)
    assert torch.equal(model.inpaint({}, x, mask, ImageRngs(0, 0, 3)), model({}, rngs.randn(1, 4, 4), rngs))
    assert torch.equal(model.inpaint({}, x, ~mask, ImageRngs(0, 0, 3)), x)


def test_a_learned_variance_stays_behind_what_is_known() -> None:
    x, mask = torch.zeros(2, 3, 1, 2), torch.tensor([True, False]).expand(2, 1, 1, 2)
    rest = knowing(lambda x_t, t: torch.arange(12.0).view(1, 6, 1, 2).expand(2, -1, -1, -1), x, mask)(x, torch.ones(2))
    assert rest[0].flatten().tolist() == [0, 0, 2, 0, 4, 0, 6, 7, 8, 9, 10, 11]


def test_each_stride_but_the_last_is_repeated() -> None:
    times = torch.tensor([3.0, 2.0, 1.0, 0.0])
    assert resampled(times, 1).tolist() == [3, 2, 1, 0]
    assert resampled(times, 3).tolist() == [3, 2, 3, 2, 3, 2, 1, 2, 1, 2, 1, 0]
    assert resampled(times[-2:], 3).tolist() == [1, 0]


@pytest.mark.parametrize("schedule", EVERY, ids=lambda s: type(s).__name__)
def test_a_time_that_rises_adds_the_noise_between(schedule: Schedule) -> None:
    """From an image noised to one time to the statistics of the other, whose x is then alpha x0 + sigma eps."""
    low, high = torch.tensor([0.3], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    x = noised(torch.ones(2, 1, 100, 100), ImageRngs(0, 0, 2).randn(1, 100, 100), low, schedule)
    seen: list[Tensor] = []

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        return seen.append(x_t) or x_t

    times = torch.cat([low, high, torch.zeros(1)])
    list(DDIM(steps=2).along(times, denoise, x, schedule, ImageRngs(1, 0, 2)))
    assert seen[0].mean().item() == pytest.approx(schedule.alpha(high).item(), abs=0.03)
    assert seen[0].std().item() == pytest.approx(schedule.sigma(high).item(), rel=0.03)
