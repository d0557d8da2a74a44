"""What a request changes, what it does not, and what is told of it, on a net that answers with its condition."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from atelier.core.batch import Cond
from atelier.core.condition import Condition
from atelier.core.errors import UserError
from atelier.core.rng import ImageRngs
from atelier.diffusion.diffusion_sampler import DiffusionSampler
from atelier.diffusion.guidance import Asked, ClassifierFree, ConditionalDenoise, Denoise, Guider
from atelier.diffusion.objective import Objective
from atelier.diffusion.samplers import DDIM, Ancestral, Euler, Heun
from atelier.diffusion.schedules import Cosine, Flow, Linear, ScaledLinear, Schedule
from atelier.diffusion.targets import X0, Epsilon, Target, VectorField, Velocity
from atelier.diffusion.times import Uniform
from atelier.diffusion.weightings import Plain


class Shades:
    """With a condition a shade of 2 per image, without 0."""

    def __init__(self, conditions: tuple[str, ...]) -> None:
        self.conditions = conditions

    def __call__(self, cond: dict[str, torch.Tensor], n: int) -> Condition:
        return Condition(torch.full((n, 1), 2.0)) if self.conditions else self.null(n)

    cond_sizes = {"vector": 1}

    def null(self, n: int, cond: Cond | None = None) -> Condition:
        return Condition(torch.zeros(n, 1))


def shade(x_t: torch.Tensor, time: torch.Tensor, cond: Condition) -> torch.Tensor:
    sizes.append(len(x_t))
    return torch.ones_like(x_t) * cond.vector.view(-1, 1, 1, 1)


sizes: list[int] = []


def objective(schedule: Schedule, target: Target) -> Objective:
    return Objective(schedule, target, Plain(), Uniform())


def made_sampler(conditions: tuple[str, ...] = ("label",), clip: bool = False) -> DiffusionSampler:
    return DiffusionSampler(
        objective(Flow(), X0()), shade, Shades(conditions), Euler(steps=3), ClassifierFree(guidance=1.5), clip
    )


def sampled(
    made: DiffusionSampler, sampler: Euler | None = None, guidance: float | None = None
) -> tuple[float, list[int]]:
    """The shade that all pixels have in the end, and how many images each call of the net held."""
    sizes.clear()
    rngs = ImageRngs(0, 0, 4)
    images = made.asked(sampler, guidance)({}, rngs.randn(3, 2, 2), rngs)
    assert images.shape == (4, 3, 2, 2) and images.dtype == torch.float32
    torch.testing.assert_close(images, images.mean().expand_as(images))
    return round(images.mean().item(), 5), sizes[:]


@pytest.mark.parametrize(
    ("sampler", "guidance", "shade", "calls"),
    [
        (None, None, 3.0, [8, 8, 8]),
        (None, 1.0, 2.0, [4, 4, 4]),
        (None, 0.0, 0.0, [4, 4, 4]),
        (Euler(steps=1), 2.0, 4.0, [8]),
    ],
)
def test_a_request_takes_the_place_of_the_models_own(
    sampler: Euler | None, guidance: float | None, shade: float, calls: list[int]
) -> None:
    assert sampled(made_sampler(), sampler, guidance) == (shade, calls)


def test_pixels_are_clipped() -> None:
    assert sampled(made_sampler(clip=True)) == (1.0, [8, 8, 8])


def test_without_conditions_guidance_is_off() -> None:
    made = made_sampler(conditions=())
    assert sampled(made, guidance=3.0) == (0.0, [4, 4, 4])
    assert (made.protocol()["guidance"], made_sampler().protocol()["guidance"]) == (1.0, 1.5)


def test_protocol_counts_the_calls() -> None:
    assert made_sampler().protocol() == {"sampler": str(Euler(steps=3)), "nfe": 3, "guidance": 1.5}


def test_a_sampler_that_the_schedule_cannot_serve_is_refused_before_anything_is_trained() -> None:
    aim, made = objective(Linear(n_steps=10), X0()), made_sampler()
    with pytest.raises(UserError) as caught:
        replace(made, objective=aim, sampler=DDIM(steps=11))
    assert caught.value.at("model").line().endswith("the schedule has 10 levels. Fix: model.sampler.steps=10")


@dataclass(frozen=True, kw_only=True)
class InAnInterval(Guider):
    """Guidance at times within (0.4, 0.8) alone   (Kynkäänniemi et al. 2024)."""

    def __call__(self, denoise: ConditionalDenoise, asked: Asked) -> Denoise:
        inner = ClassifierFree(guidance=self.guidance)(denoise, asked)
        return lambda x_t, t: inner(x_t, t) if 0.4 < t[0] < 0.8 else denoise(x_t, t, asked.known)


def test_another_guider_takes_its_place_and_hears_the_request() -> None:
    made = replace(made_sampler(), guider=InAnInterval(guidance=1.5))
    assert sampled(made)[1] == [4, 8, 4] and sampled(made, guidance=1.0)[1] == [4, 4, 4]


def test_a_protocol_names_a_guider_that_is_not_the_usual_one() -> None:
    """Once, without the guidance, which stands beside it and may be another of the request."""
    made = replace(made_sampler(), guider=InAnInterval(guidance=1.0))
    assert made.protocol() == {"sampler": str(Euler(steps=3)), "nfe": 3, "guidance": 1.0, "guider": "InAnInterval()"}
    assert "guider" not in replace(made, embedder=Shades(())).protocol()


# ---- a net with errors ---------------------------------------------------------------------------------------------

SCHEDULES = (Linear(), ScaledLinear(), Cosine(), Flow())
SAMPLERS = (
    *(kind(steps=10, spacing=spacing) for kind in (DDIM, Ancestral) for spacing in ("trailing", "leading", "linspace")),
    *(kind(steps=10, grid=grid) for kind in (Euler, Heun) for grid in ("uniform", "karras")),
    DDIM(steps=10, eta=1.0),
    Ancestral(steps=10, variance="large"),
    DDIM(steps=50),
    Euler(steps=3),
)
MEAN = 0.5  # of Gaussian latents of unit deviation


def best(objective: Objective, error: float) -> DiffusionSampler:
    """The net that is best for such latents, but for `error` in each of its answers."""

    def net(x_t: torch.Tensor, time: torch.Tensor, cond: Condition) -> torch.Tensor:
        t = time.double() / 1000 if isinstance(objective.schedule, Flow) else (time.double() + 1) / 1000
        alpha, sigma = (value.float() for value in objective.schedule.pair(t, like=x_t.double()))
        x = (alpha * x_t + sigma**2 * MEAN) / (alpha**2 + sigma**2)
        return objective.target(x, (x_t - alpha * x) / sigma, alpha, sigma) + error

    return DiffusionSampler(objective, net, Shades(()), DDIM(steps=10), ClassifierFree(guidance=1.0), clip=False)


@pytest.mark.parametrize("target", [Epsilon(), X0(), Velocity(), VectorField()], ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_small_errors_of_a_net_stay_small_in_latents(schedule: Schedule, target: Target) -> None:
    """0.4 % of a deviation in each answer; or the schedule is refused."""
    if isinstance(target, Epsilon) and isinstance(schedule, Flow):
        with pytest.raises(UserError, match="ends in pure noise"):
            objective(schedule, target)
        return
    aim = objective(schedule, target)
    for sampler in SAMPLERS:
        exact, off = (
            best(aim, error).asked(sampler)({}, ImageRngs(0, 0, 32).randn(1, 4, 4), ImageRngs(1, 0, 32))
            for error in (0.0, 0.004)
        )
        assert (off - exact).abs().max() < 0.3, sampler
        assert exact.mean().item() == pytest.approx(MEAN, abs=0.25), sampler


@pytest.mark.parametrize(
    ("target", "clip", "first"),
    [(Epsilon(), False, 0.992), (Epsilon(), True, 1.0), (Velocity(), False, 1.0), (Velocity(), True, 1.0)],
)
def test_only_eps_that_is_not_clipped_starts_later(target: Target, clip: bool, first: float) -> None:
    asked: list[float] = []
    made = replace(best(objective(Cosine(), target), 0.0), clip=clip)
    net = made.net
    made = replace(made, net=lambda x, time, cond: asked.append((time[0].item() + 1) / 1000) or net(x, time, cond))
    made({}, ImageRngs(0, 0, 2).randn(1, 2, 2), ImageRngs(1, 0, 2))
    assert asked[:2] == pytest.approx([first, 0.9])
