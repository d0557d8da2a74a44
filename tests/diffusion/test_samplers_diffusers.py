"""Samplers against the schedulers of diffusers, step by step, for nets that answer with eps, v or the flow's velocity.

Ours                              Theirs                                 Compared on
DDIM(eta 0, 0.3, 1)               DDIM                                   trailing, leading (D: test_samplers.py)
Ancestral(small, large)           DDPM(fixed_small, fixed_large)         trailing, leading (D: test_samplers.py)
Euler                             EulerDiscrete                          trailing, leading, karras
DDIM(eta 1)                       EulerAncestralDiscrete                 trailing, leading
Heun                              HeunDiscrete                           trailing, leading, karras
DPMSolver2M, its SDE              DPMSolverMultistep(order 2, midpoint)  trailing, karras, logsnr, their others
DPMSolver3M(parity)               DPMSolverMultistep(order 3)            the same
UniPC(1, 2, bh1, bh2, corrector)  UniPCMultistep                         the same without logsnr
PLMS                              PNDM(skip_prk_steps)                   leading, eps (of v theirs takes means)
DDIM, PLMS, Euler, ancestral      the schedulers of Stable Diffusion     leading by one entry, its last level
Euler, Heun on Flow               FlowMatchEulerDiscrete, ...Heun...     their times
DPMSolver2M, 3M, UniPC on Flow    the two with use_flow_sigmas           their times

Midpoint has no counterpart there. Where the two mean different things, a test at the end says what: the SDE of 3M, the
last steps of UniPC, clipped DDIM, DDIM on strides that do not divide the table, the last level, leading, the times of
flows. Linear ends at sigma / alpha = 157: where ours starts at 80, ScaledLinear alone is compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from atelier.core.errors import UserError
from atelier.core.rng import ImageRngs
from atelier.diffusion.guidance import Denoise, clipped
from atelier.diffusion.multistep import PLMS, DPMSolver2M, DPMSolver3M, UniPC
from atelier.diffusion.samplers import DDIM, Ancestral, Euler, Heun, Sampler
from atelier.diffusion.schedules import Flow, Linear, ScaledLinear, Schedule

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # theirs

SHAPE, N = (2, 3, 4, 4), 20
SCHEDULES = {
    "linear": (Linear(), {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}),
    "scaled": (ScaledLinear(), {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}),
}
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction"}
NOISE = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
MIX = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def net(x: Tensor) -> Tensor:
    """An answer that does not know the time, which theirs may round, and is about the noise where there is much."""
    return x.double() - torch.tanh(torch.einsum("ij,njhw->nihw", MIX, x.double())) / 20


def denoiser(schedule: Schedule, prediction: str) -> Denoise:
    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = schedule.pair(t, like=x_t)
        match prediction:
            case "eps":
                return (x_t - sigma * net(x_t)) / alpha
            case "v":
                return alpha * x_t - sigma * net(x_t)
            case _:
                return x_t - sigma * net(x_t)

    return denoise


def draws(n: int = N) -> list[Tensor]:
    """The noise that ImageRngs(7, 0, ...) hands out."""
    rngs = ImageRngs(7, 0, SHAPE[0])
    return [rngs.randn(*SHAPE[1:]).double() for _ in range(n)]


def scheduler(kind: str, table: str, prediction: str, steps: int = N, **options: Any) -> Any:
    """Theirs with its own float32 betas multiplied up in float64."""
    made = getattr(diffusers, f"{kind}Scheduler")
    made = made(1000, prediction_type=PREDICTIONS[prediction], **SCHEDULES[table][1], **options)
    made.betas = made.betas.double()
    made.alphas = 1 - made.betas
    made.alphas_cumprod = torch.cumprod(made.alphas, 0)
    made.one = made.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    if not options.get("set_alpha_to_one", True):
        made.final_alpha_cumprod = made.alphas_cumprod[0]
    made.set_timesteps(steps)
    if hasattr(made, "sigmas"):
        made.sigmas = made.sigmas.double()
    return made


def their_way(made: Any, x: Tensor, noise: list[Tensor] | None = None, **options: Any) -> Iterator[Tensor]:
    for i in made.timesteps:
        extra = {"variance_noise": noise.pop(0)} if noise else {}
        x = made.step(net(made.scale_model_input(x, i)), i, x, **extra, **options).prev_sample
        yield x


def ends(sampler: Sampler, schedule: Schedule, prediction: str, theirs: Iterator[Tensor]) -> list[float]:
    """How far the two are apart after each step."""
    ours = sampler.trajectory(denoiser(schedule, prediction), NOISE, schedule, ImageRngs(7, 0, SHAPE[0]))
    return [float((x - wanted).abs().max()) for (x, _), wanted in zip(ours, theirs, strict=True)]


def assert_same(sampler: Sampler, schedule: Schedule, prediction: str, theirs: Iterator[Tensor]) -> None:
    apart = ends(sampler, schedule, prediction, theirs)
    assert len(apart) == sampler.steps and all(difference <= 1e-5 for difference in apart), apart


def with_times(schedule: Schedule, times: Tensor, monkeypatch: pytest.MonkeyPatch) -> Schedule:
    """The schedule with another's times above 0 as its uniform ones."""
    listed = torch.cat([times.double(), torch.zeros(1, dtype=torch.float64)])
    monkeypatch.setattr(schedule, "times", lambda *_: listed)
    return schedule


# ---- Stable Diffusion ----------------------------------------------------------------------------------------------

SD = {"timestep_spacing": "leading", "steps_offset": 1}
FIRST_LEVEL = {"set_alpha_to_one": False}


def plms_way(made: Any, x: Tensor) -> Iterator[Tensor]:
    """Of their two calls for the first step the second has the result."""
    way = list(their_way(made, x))
    return iter(way[1:])


@pytest.mark.parametrize("steps", [2, 6, 20, 50])
@pytest.mark.parametrize(("offset", "to_image"), [(0, True), (1, False)])
def test_plms_is_pndm(steps: int, offset: int, to_image: bool) -> None:
    options = {"skip_prk_steps": True, "timestep_spacing": "leading"}
    made = scheduler("PNDM", "scaled", "eps", steps, **options, steps_offset=offset, set_alpha_to_one=to_image)
    sampler = PLMS(steps=steps, spacing="leading", offset=offset, to_image=to_image)
    assert_same(sampler, SCHEDULES["scaled"][0], "eps", plms_way(made, NOISE))
    assert sampler.nfe == len(made.timesteps) == steps + 1


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_of_stable_diffusion(prediction: str, eta: float) -> None:
    made = scheduler("DDIM", "scaled", prediction, **SD, **FIRST_LEVEL, clip_sample=False)
    noise = draws() if eta else None
    sampler = DDIM(steps=N, spacing="leading", offset=1, to_image=False, eta=eta)
    assert_same(sampler, SCHEDULES["scaled"][0], prediction, their_way(made, NOISE, noise, eta=eta))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_euler_of_stable_diffusion(prediction: str) -> None:
    made = scheduler("EulerDiscrete", "scaled", prediction, **SD)
    start = NOISE * float((made.sigmas[0] ** 2 + 1).sqrt())
    way = (x / (s**2 + 1).sqrt() for x, s in zip(their_way(made, start), made.sigmas[1:], strict=True))
    sampler = Euler(steps=N, spacing="leading", offset=1)
    assert_same(sampler, SCHEDULES["scaled"][0], prediction, way)


def test_an_offset_elsewhere_is_refused() -> None:
    for options in ({"spacing": "trailing"}, {"grid": "karras"}):
        with pytest.raises(UserError, match="a leading spacing alone has one"):
            DDIM(steps=N, offset=1, **options).times(SCHEDULES["scaled"][0], torch.device("cpu"))
    with pytest.raises(UserError, match="leave the 1000 levels"):
        DDIM(steps=1000, offset=1, spacing="leading").times(SCHEDULES["scaled"][0], torch.device("cpu"))


# ---- one-step rules ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("table", SCHEDULES)
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim(eta: float, spacing: str, table: str, prediction: str) -> None:
    made = scheduler("DDIM", table, prediction, clip_sample=False, timestep_spacing=spacing)
    way = their_way(made, NOISE, draws() if eta else None, eta=eta)
    assert_same(DDIM(steps=N, eta=eta, spacing=spacing), SCHEDULES[table][0], prediction, way)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("table", SCHEDULES)
@pytest.mark.parametrize(("spacing", "variance"), [("trailing", "small"), ("leading", "small"), ("leading", "large")])
def test_ddpm(variance: str, spacing: str, table: str, prediction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"clip_sample": False, "timestep_spacing": spacing, "variance_type": f"fixed_{variance}"}
    noise = draws()
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **k: noise.pop(0))
    way = their_way(scheduler("DDPM", table, prediction, **options), NOISE)
    sampler = Ancestral(steps=N, variance=variance, spacing=spacing)
    assert_same(sampler, SCHEDULES[table][0], prediction, way)


def rescaled(made: Any, way: Iterator[Tensor], calls: int = 1) -> Iterator[Tensor]:
    """Theirs are x / alpha: x, after each of our steps. Their list names each level of Heun's but the ends twice."""
    sigmas = made.sigmas[::calls] if calls == 1 else torch.cat([made.sigmas[:1], made.sigmas[1::2]])
    states = list(way)
    for i in range(len(sigmas) - 1):
        last = min(calls * (i + 1), len(states)) - 1
        yield states[last] / (sigmas[i + 1] ** 2 + 1).sqrt()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    ("ours", "theirs", "calls", "table", "grid"),
    [
        *((Euler, "EulerDiscrete", 1, "linear", grid) for grid in ("trailing", "leading")),
        *((Euler, "EulerDiscrete", 1, "scaled", grid) for grid in ("trailing", "leading", "karras")),
        *((Heun, "HeunDiscrete", 2, "scaled", grid) for grid in ("trailing", "leading", "karras")),
    ],
)
def test_euler_and_heun(
    ours: Callable[..., Sampler], theirs: str, calls: int, table: str, grid: str, prediction: str
) -> None:
    """Both start from x: theirs from noise times sqrt(sigma_max^2 + 1)."""
    places = {"use_karras_sigmas": True, "timestep_spacing": "linspace"}
    made = scheduler(theirs, table, prediction, **(places if grid == "karras" else {"timestep_spacing": grid}))
    way = their_way(made, NOISE * (made.sigmas[0] ** 2 + 1).sqrt())
    words = {"grid": "karras"} if grid == "karras" else {"grid": "uniform", "spacing": grid}
    assert_same(ours(steps=N, **words), SCHEDULES[table][0], prediction, rescaled(made, way, calls))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("table", SCHEDULES)
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_euler_ancestral_is_our_ddim(
    spacing: str, table: str, prediction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise, place = draws(), "diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor"
    monkeypatch.setattr(place, lambda *a, **k: noise.pop(0))
    made = scheduler("EulerAncestralDiscrete", table, prediction, timestep_spacing=spacing)
    way = rescaled(made, their_way(made, NOISE * (made.sigmas[0] ** 2 + 1).sqrt()))
    assert_same(DDIM(steps=N, eta=1.0, spacing=spacing), SCHEDULES[table][0], prediction, way)


# ---- multistep rules -----------------------------------------------------------------------------------------------

GRIDS: dict[
    str, tuple[dict[str, Any], dict[str, Any] | None]
] = {  # -> their options, ours; None: their times are given
    "trailing": ({"timestep_spacing": "trailing"}, {}),
    "their linspace": ({"timestep_spacing": "linspace"}, None),
    "their leading": ({"timestep_spacing": "leading"}, None),
    "karras": ({"use_karras_sigmas": True}, {"grid": "karras"}),
    "logsnr": ({"use_lu_lambdas": True}, {"grid": "logsnr"}),
}
PLACES = [(grid, table) for grid, (_, ours) in GRIDS.items() for table in (SCHEDULES if not ours else ["scaled"])]
DPM: dict[str, tuple[Callable[..., Sampler], dict[str, Any]]] = {
    "2m": (DPMSolver2M, {"solver_order": 2}),
    "2m-sde": (partial(DPMSolver2M, stochastic=True), {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"}),
    "3m": (partial(DPMSolver3M, form="parity"), {"solver_order": 3}),
}
UNIPC = [(order, solver, corrector) for order in (1, 2) for solver in ("bh1", "bh2") for corrector in (False, True)]


def assert_same_on(
    grid: str, ours: Callable[..., Sampler], kind: str, table: str, prediction: str, noise: list[Tensor] | None,
    monkeypatch: pytest.MonkeyPatch, **options: Any,
) -> None:  # fmt: skip
    their_grid, our_grid = GRIDS[grid]
    made, schedule = scheduler(kind, table, prediction, **options, **their_grid), SCHEDULES[table][0]
    if our_grid is None:
        schedule = with_times(schedule, (made.timesteps + 1) / 1000, monkeypatch)
    apart = ends(ours(steps=N, **(our_grid or {})), schedule, prediction, their_way(made, NOISE, noise))
    if options.get("solver_type") == "bh1":  # to sigma = 0 theirs multiplies h = infinity by 0
        assert math.isnan(apart.pop())
    assert len(apart) >= N - 1 and all(difference <= 1e-5 for difference in apart), apart


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("grid", "table"), PLACES)
@pytest.mark.parametrize("name", DPM)
def test_dpm_solver(name: str, grid: str, table: str, prediction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, options = DPM[name]
    noise = draws() if "sde" in name else None
    assert_same_on(grid, ours, "DPMSolverMultistep", table, prediction, noise, monkeypatch, **options)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("grid", "table"), [place for place in PLACES if "logsnr" not in place])  # theirs has none
@pytest.mark.parametrize(("order", "solver", "corrector"), UNIPC)
def test_unipc(
    order: int, solver: str, corrector: bool, grid: str, table: str, prediction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = partial(UniPC, order=order, solver=solver, corrector=corrector)
    options = {"solver_order": order, "solver_type": solver, "disable_corrector": [] if corrector else range(N)}
    assert_same_on(grid, ours, "UniPCMultistep", table, prediction, None, monkeypatch, **options)


# ---- the straight path ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ours", "theirs", "calls"), [(Euler, "FlowMatchEuler", 1), (Heun, "FlowMatchHeun", 2)])
def test_flow_euler_and_heun(
    ours: Callable[..., Sampler], theirs: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = getattr(diffusers, f"{theirs}DiscreteScheduler")()
    made.set_timesteps(N)
    sigmas = made.sigmas if calls == 1 else torch.cat([made.sigmas[:1], made.sigmas[1::2]])
    x, states = NOISE, []
    for i in made.timesteps:
        x = made.step(net(x), i, x).prev_sample.double()
        states.append(x)
    wanted = [states[min(calls * (i + 1), len(states)) - 1] for i in range(N)]
    schedule = with_times(Flow(), sigmas[:-1], monkeypatch)
    assert_same(ours(steps=N, grid="uniform"), schedule, "flow", iter(wanted))


@pytest.mark.parametrize(
    ("ours", "kind", "options"),
    [
        (DPMSolver2M, "DPMSolverMultistep", {"solver_order": 2}),
        (partial(DPMSolver3M, form="parity"), "DPMSolverMultistep", {"solver_order": 3}),
        (UniPC, "UniPCMultistep", {"solver_order": 2}),
    ],
)
def test_flow_multistep(
    ours: Callable[..., Sampler], kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = getattr(diffusers, f"{kind}Scheduler")(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, **options
    )
    made.set_timesteps(N)
    made.sigmas = made.sigmas.double()
    schedule = with_times(Flow(), made.sigmas[:-1], monkeypatch)
    start = NOISE * made.sigmas[0]
    assert_same(ours(steps=N), schedule, "flow", their_way(made, start))


# ---- known differences ---------------------------------------------------------------------------------------------


def test_their_sde_of_third_order_has_a_wrong_sign() -> None:
    """After three steps, the first that uses D2, they are apart by alpha_s D2: a weight of w - 1/2 for w + 1/2.

    w = (1 - e^-2h - 2h) / (2h)^2, which is -1/2 + O(h), so that theirs does not vanish with the step.
    """
    made = scheduler(
        "DPMSolverMultistep", "scaled", "eps",
        solver_order=3, algorithm_type="sde-dpmsolver++", timestep_spacing="trailing",
    )  # fmt: skip
    schedule = ScaledLinear()
    sampler = DPMSolver3M(steps=N, form="parity", stochastic=True)
    ours = list(sampler.trajectory(denoiser(schedule, "eps"), NOISE, schedule, ImageRngs(7, 0, SHAPE[0])))
    theirs = list(their_way(made, NOISE, draws()))
    for (x, _), wanted in zip(ours[:2], theirs[:2], strict=True):
        assert (x - wanted).abs().max() <= 1e-5
    times = schedule.times(N)[:4]
    alpha, half = schedule.alpha(times), schedule.logsnr(times) / 2
    h_1, h_0, h = half.diff()
    m_2, m_1, m_0 = (denoised for _, denoised in ours[:3])
    bend = ((m_0 - m_1) / h_0 - (m_1 - m_2) / h_1) / (h_0 + h_1) * h**2  # D2
    assert (alpha[3] * bend).abs().max() > 1e-2
    assert (ours[2][0] - theirs[2] - alpha[3] * bend).abs().max() <= 1e-5


def test_unipc_of_third_order_is_theirs_but_for_the_last_steps() -> None:
    """Theirs lowers the order with the steps that are left; ours, the last step alone."""
    made = scheduler("UniPCMultistep", "scaled", "v", solver_order=3, timestep_spacing="trailing")
    apart = ends(UniPC(steps=N, order=3), ScaledLinear(), "v", their_way(made, NOISE))
    assert max(apart[: N - 2]) <= 1e-5 < apart[N - 2]


def test_their_multistep_lowers_the_order_of_short_ways_unless_told() -> None:
    for lower in (False, True):
        made = scheduler(
            "DPMSolverMultistep", "scaled", "v", steps=10,
            solver_order=3, timestep_spacing="trailing", lower_order_final=lower,
        )  # fmt: skip
        apart = ends(DPMSolver3M(steps=10, form="parity"), ScaledLinear(), "v", their_way(made, NOISE))
        assert max(apart[:8]) <= 1e-5 and (apart[8] > 1e-5) == lower


def test_their_clipped_ddim_keeps_the_eps_of_before() -> None:
    """Ours is theirs with use_clipped_model_output: eps is what lies between x and the clipped D."""
    for renewed in (True, False):
        made = scheduler("DDIM", "scaled", "eps", timestep_spacing="leading")  # clip_sample is on
        theirs = list(their_way(made, NOISE, use_clipped_model_output=renewed))
        ours = DDIM(steps=N, spacing="leading").trajectory(
            clipped(denoiser(ScaledLinear(), "eps")), NOISE, ScaledLinear(), None
        )
        apart = max(float((x - wanted).abs().max()) for (x, _), wanted in zip(ours, theirs, strict=True))
        assert (apart <= 1e-5) == renewed


def test_their_ddim_takes_strides_of_one_length() -> None:
    """It goes to t - T // N, whatever the next time of its own list: for 30 trailing steps that is another one."""
    made = scheduler("DDIM", "scaled", "eps", steps=30, clip_sample=False, timestep_spacing="trailing")
    apart = ends(DDIM(steps=30), ScaledLinear(), "eps", their_way(made, NOISE))
    assert max(apart) > 1e-3


def test_their_ddim_may_leave_the_noise_of_the_first_entry() -> None:
    """set_alpha_to_one=False, as in the folders of Stable Diffusion: the last step goes to the first entry."""
    made = scheduler("DDIM", "scaled", "eps", clip_sample=False, timestep_spacing="leading", set_alpha_to_one=False)
    made.final_alpha_cumprod = made.alphas_cumprod[0]
    apart = ends(DDIM(steps=N, spacing="leading"), ScaledLinear(), "eps", their_way(made, NOISE))
    assert max(apart[:-1]) <= 1e-5 < apart[-1]


def test_their_leading_of_multistep_rules_takes_shorter_strides() -> None:
    """T // (N + 1), where DDIM and ours take T // N."""
    theirs = scheduler("DPMSolverMultistep", "scaled", "eps", timestep_spacing="leading").timesteps
    ours = (ScaledLinear().times(N, "leading")[:-1] * 1000 - 1).round()
    assert theirs.tolist() == [47 * i for i in range(N, 0, -1)]
    assert ours.tolist() == [50 * i for i in range(N - 1, -1, -1)]


def test_their_flow_ends_a_thousandth_above_the_image() -> None:
    """Ours is uniform down to 0: with N steps, the last time above 0 is 1 / N."""
    made = diffusers.FlowMatchEulerDiscreteScheduler()
    made.set_timesteps(N)
    torch.testing.assert_close(made.sigmas[:-1], torch.linspace(1, 0.001, N))
    assert Flow().times(N)[-2] == pytest.approx(1 / N)


def test_their_start_of_euler_is_a_little_fainter() -> None:
    """Noise times sigma_max, where x / alpha needs sqrt(sigma_max^2 + 1): .9977 of ours for ScaledLinear."""
    made = scheduler("EulerDiscrete", "scaled", "eps", timestep_spacing="trailing")
    ours = ScaledLinear().prior_std(torch.ones(())) / ScaledLinear().alpha(torch.ones(()))
    assert float(made.init_noise_sigma / ours) == pytest.approx(0.9977, abs=1e-4)
