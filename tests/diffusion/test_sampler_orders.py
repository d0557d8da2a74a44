"""What each sampler promises on three Gaussians: its order, the right distribution, DDIM first and D last, no NaN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from torch import Tensor

from atelier.core.errors import UserError
from atelier.core.rng import ImageRngs
from atelier.diffusion.multistep import DPMSolver2M, DPMSolver3M, UniPC
from atelier.diffusion.posterior import posterior
from atelier.diffusion.samplers import DDIM, Ancestral, Euler, Heun, Midpoint, Sampler, grid_times
from atelier.diffusion.schedules import EDM, Cosine, Flow, Linear, ScaledLinear, Schedule, ZeroTerminal
from tests.diffusion.mixture import COVARIANCE, MEAN, best, transported

CPU = torch.device("cpu")
DETERMINISTIC: dict[str, tuple[Callable[..., Sampler], int]] = {  # -> order
    "ddim": (DDIM, 1),
    "euler": (Euler, 1),
    "heun": (Heun, 2),
    "midpoint": (Midpoint, 2),
    "2m": (DPMSolver2M, 2),
    "3m-parity": (partial(DPMSolver3M, form="parity"), 2),
    "3m-exact": (DPMSolver3M, 3),
    **{f"uni-p-{order}-bh2": (partial(UniPC, order=order, corrector=False), order) for order in (1, 2, 3)},
    **{f"uni-pc-{order}-bh2": (partial(UniPC, order=order), order + 1) for order in (1, 2, 3)},
    "uni-p-2-bh1": (partial(UniPC, order=2, corrector=False, solver="bh1"), 2),
    "uni-pc-1-bh1": (partial(UniPC, order=1, solver="bh1"), 2),
    "uni-pc-2-bh1": (partial(UniPC, order=2, solver="bh1"), 3),
}
STOCHASTIC: dict[str, Callable[..., Sampler]] = {
    "ddpm": Ancestral,
    "ddpm-large": partial(Ancestral, variance="large"),
    "ddim-1": partial(DDIM, eta=1.0),
    "ddim-half": partial(DDIM, eta=0.5),
    "heun-churn": partial(Heun, churn=40.0),
    "2m-sde": partial(DPMSolver2M, stochastic=True),
    "3m-sde-exact": partial(DPMSolver3M, stochastic=True),
    "3m-sde-parity": partial(DPMSolver3M, stochastic=True, form="parity"),
}
EVERY = {name: kind for name, (kind, _) in DETERMINISTIC.items()} | STOCHASTIC
SCHEDULES = (Linear(), ScaledLinear(), Cosine(), Flow(), EDM(), ZeroTerminal(ScaledLinear()))


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# ---- order ---------------------------------------------------------------------------------------------------------


@cache
def exact(kind: type[Schedule]) -> Tensor:
    """From sigma / alpha = 80 to the last time above 0, where the grid of log-SNR ends with any number of steps."""
    schedule = kind()
    times = grid_times(schedule, 2, "logsnr", "trailing", CPU)
    t, s = (schedule.level(time) for time in times[:2])
    return transported(schedule, schedule.prior_std(times[0]) * noise(1, 2, 3, 3), t, s)


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("kind", [Flow, EDM])
def test_the_error_falls_with_the_order_that_is_claimed(name: str, kind: type[Schedule]) -> None:
    made, order = DETERMINISTIC[name]
    errors = []
    for steps in (40, 80):
        path = list(made(steps=steps, grid="logsnr").trajectory(best(kind()), noise(1, 2, 3, 3), kind(), None))
        errors.append((path[-2][0] - exact(kind)).square().mean().sqrt())
    assert torch.log2(errors[0] / errors[1]).item() == pytest.approx(order, abs=0.2)
    assert errors[1] < {1: 0.1, 2: 0.01, 3: 1e-3, 4: 1e-4}[order]


# ---- distribution --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*STOCHASTIC, "heun", "2m", "3m-exact", "uni-pc-2-bh2"])
def test_samples_have_the_mean_and_covariance_of_the_data(name: str) -> None:
    """Within 2 standard errors, in root mean square over the 5 numbers."""
    schedule, rngs = Flow(), ImageRngs(3, 0, 1)
    steps = 400 if name.startswith("dd") else 60  # a step of theirs has an error of order 1 in the variance
    sampler = EVERY[name](steps=steps, grid="logsnr")
    x = sampler(best(schedule), rngs.randn(2, 64, 64).double(), schedule, rngs)[0].flatten(1)  # (2, 4096)
    away = x - MEAN[:, None]
    products = torch.stack([away[0] ** 2, away[0] * away[1], away[1] ** 2])
    numbers = torch.cat([away, products - COVARIANCE[[0, 0, 1], [0, 1, 1], None]])
    errors = numbers.mean(1) / (numbers.std(1) / numbers.shape[1] ** 0.5)
    assert errors.square().mean().sqrt() < 2, errors


# ---- first and last step, one image, calls -------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(
    "name", ["euler", "2m", "3m-exact", "3m-parity", "uni-pc-3-bh2", "uni-p-3-bh2", "2m-sde", "3m-sde-exact"]
)
def test_the_first_step_has_no_past_and_is_that_of_ddim(name: str, schedule: Schedule) -> None:
    x = noise(2, 2, 3, 3)
    ddim = DDIM(steps=7, eta=1.0 if "sde" in name else 0.0)
    ours, theirs = (
        next(s.trajectory(best(schedule), x, schedule, ImageRngs(5, 0, 2))) for s in (EVERY[name](steps=7), ddim)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("grid", ["uniform", "quadratic", "logsnr", "karras"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("name", EVERY)
def test_on_any_schedule_and_grid_the_last_step_returns_what_was_denoised(
    name: str, schedule: Schedule, grid: str
) -> None:
    """The first of them starts from pure noise where the schedule does; one step, and two, of which one has a past."""
    for steps in (1, 2, 5):
        sampler = EVERY[name](steps=steps, grid=grid)
        path = list(sampler.trajectory(best(schedule), noise(1, 2, 3, 3), schedule, ImageRngs(5, 0, 1)))
        assert len(path) == steps and all(x.isfinite().all() and d.isfinite().all() for x, d in path)
        torch.testing.assert_close(path[-1][0], path[-1][1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", EVERY)
def test_one_image_alone_is_that_image_in_a_batch(name: str) -> None:
    start, sampler = noise(3, 2, 3, 3), EVERY[name](steps=8)
    together = sampler(best(Flow()), start, Flow(), ImageRngs(3, 0, 3))
    alone = sampler(best(Flow()), start[1:2], Flow(), ImageRngs(3, 1, 1))
    torch.testing.assert_close(alone, together[1:2], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", EVERY)
def test_nfe_counts_the_calls(name: str) -> None:
    calls, sampler = [], EVERY[name](steps=6)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        calls.append(t)
        return best(Flow())(x_t, t)

    sampler(denoise, noise(2, 2, 3, 3), Flow(), ImageRngs(3, 0, 2))
    assert len(calls) == sampler.nfe == (11 if isinstance(sampler, Heun | Midpoint) else 6)


def test_a_late_start_takes_no_steps_of_no_length() -> None:
    calls = []
    for name in EVERY:
        calls.clear()
        sampler = EVERY[name](steps=10)
        path = list(
            sampler.trajectory(
                lambda x, t: calls.append(float(t[0])) or best(ScaledLinear())(x, t),
                noise(1, 2, 3, 3), ScaledLinear(), ImageRngs(3, 0, 1), first=0.75,
            )
        )  # fmt: skip
        assert calls[0] == pytest.approx(0.75, abs=1e-3) or "churn" in name
        assert all(x.isfinite().all() for x, _ in path)
        assert len(path) < 10 or sampler.grid == "karras"


# ---- rules that say the same ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("grid", ["uniform", "karras"])
def test_unipc_of_order_2_without_correction_is_2m(schedule: Schedule, grid: str) -> None:
    ours, theirs = (
        sampler(best(schedule), noise(2, 2, 3, 3), schedule, None)
        for sampler in (UniPC(steps=9, corrector=False, grid=grid), DPMSolver2M(steps=9, grid=grid))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES[:5], ids=lambda s: type(s).__name__)
def test_ddim_with_eta_1_is_ddpm(schedule: Schedule) -> None:
    ours, theirs = (
        sampler(best(schedule), noise(2, 2, 3, 3), schedule, ImageRngs(3, 0, 2))
        for sampler in (DDIM(steps=9, eta=1.0), Ancestral(steps=9))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("schedule", [ScaledLinear(), EDM()], ids=lambda s: type(s).__name__)
def test_ddim_is_euler_ancestral(schedule: Schedule, eta: float) -> None:
    """In r = sigma / alpha and y = x / alpha: Euler's rule down to sqrt(r_s^2 - up^2), then noise of deviation up."""
    sampler, rngs = DDIM(steps=9, eta=eta, grid="karras"), ImageRngs(3, 0, 2)
    x = sampler(best(schedule), noise(2, 2, 3, 3), schedule, ImageRngs(3, 0, 2))
    times = sampler.times(schedule, CPU)
    alpha, r = schedule.alpha(times), schedule.sigma(times) / schedule.alpha(times)
    y = schedule.prior_std(times[0]) * noise(2, 2, 3, 3) / alpha[0]
    for i in range(9):
        slope = (y - best(schedule)(alpha[i] * y, times[i].expand(2))) / r[i]
        up = eta * (r[i + 1] ** 2 * (r[i] ** 2 - r[i + 1] ** 2) / r[i] ** 2).sqrt()
        y = y + ((r[i + 1] ** 2 - up**2).sqrt() - r[i]) * slope
        y = y + up * rngs.randn(2, 3, 3) if eta > 0 else y
    torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)  # the noise is float32


def test_churn_is_algorithm_2_of_edm() -> None:
    """Written down again from the paper, for alpha = 1: noise where S_min <= t <= S_max, by at most sqrt(2) - 1."""
    churn, s_min, s_max, s_noise = 3.0, 0.1, 30.0, 1.1
    sampler = Heun(steps=10, churn=churn, s_min=s_min, s_max=s_max, s_noise=s_noise)
    x = sampler(best(EDM()), noise(2, 2, 3, 3), EDM(), ImageRngs(3, 0, 2))
    rngs, denoise = ImageRngs(3, 0, 2), lambda x, s: best(EDM())(x, ((s / 80) ** (1 / 7)).expand(2))
    sigmas = EDM().sigma(sampler.times(EDM(), CPU))
    y = 80 * noise(2, 2, 3, 3)
    raised = 0
    for here, there in zip(sigmas[:-1], sigmas[1:], strict=True):
        up = here
        if s_min <= here <= s_max:
            up, raised = here * (1 + min(churn / 10, 2**0.5 - 1)), raised + 1
            y = y + (up**2 - here**2).sqrt() * s_noise * rngs.randn(2, 3, 3)
        d = (y - denoise(y, up)) / up
        following = y + (there - up) * d
        if there > 0:
            following = y + (there - up) * (d + (following - denoise(following, there)) / there) / 2
        y = following
    torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
    assert 2 < raised < 10


@pytest.mark.parametrize("schedule", [ScaledLinear(), Flow()], ids=lambda s: type(s).__name__)
def test_churn_does_not_leave_the_schedule(schedule: Schedule) -> None:
    """Its greatest step up is by sqrt(2); above t = 1 there is no level, and without s_noise = 1 no right deviation."""
    highest = []
    sampler = Heun(steps=4, churn=100.0, s_max=1e9)
    sampler(lambda x, t: highest.append(float(t[0])) or x / 2, noise(1, 2, 3, 3), schedule, ImageRngs(3, 0, 1))
    assert max(highest) <= 1 and highest[2] > float(sampler.times(schedule, CPU)[1])


def test_midpoint_on_the_straight_path_is_the_rule_in_t() -> None:
    """x_s = x_t + (s - t) v(x_m, m), v = (x - D) / t, with a last step of Euler."""
    denoise, x = best(Flow()), noise(2, 2, 3, 3)
    for i in range(8, 0, -1):
        t, s = torch.tensor(i / 8).double(), torch.tensor((i - 1) / 8).double()
        v = (x - denoise(x, t.expand(2))) / t
        if s > 0:
            m = (t + s) / 2
            x_m = x + (m - t) * v
            v = (x_m - denoise(x_m, m.expand(2))) / m
        x = x + (s - t) * v
    torch.testing.assert_close(
        Midpoint(steps=8)(best(Flow()), noise(2, 2, 3, 3), Flow(), None), x, rtol=1e-9, atol=1e-9
    )


def test_posterior_from_pure_noise_forgets_it() -> None:
    s, t = (ZeroTerminal(ScaledLinear()).level(torch.tensor(time).double()) for time in (0.5, 1.0))
    mean, variance = posterior(torch.tensor(9.0), torch.tensor(0.3).double(), s, t)
    torch.testing.assert_close((mean, variance), (0.3 * s.alpha, s.sigma**2))


# ---- grids ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_grids_are_even_in_what_they_are_named_after(schedule: Schedule) -> None:
    low = float(schedule.snap(torch.tensor(1e-9, dtype=torch.float64)))
    quadratic = grid_times(schedule, 9, "quadratic", "trailing", CPU)
    even = ((quadratic[:-1] - low) / (1 - low)).sqrt()
    torch.testing.assert_close(even, torch.arange(9, 0, -1).double() / 9, rtol=1e-9, atol=1e-9)
    logsnr = grid_times(schedule, 9, "logsnr", "trailing", CPU)
    strides = schedule.logsnr(logsnr[:-1]).diff()
    torch.testing.assert_close(strides, strides.mean().expand(8), rtol=1e-5, atol=0)
    assert quadratic[-1] == logsnr[-1] == 0


def test_a_spacing_that_a_grid_does_not_have_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        replace(Euler(steps=5), grid="karras", spacing="leading").times(Linear(), CPU)
    assert caught.value.at("model").line() == (
        "error: model.sampler.spacing=leading: a karras grid has none. Fix: model.sampler.grid=uniform"
    )
