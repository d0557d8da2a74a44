"""The estimate of the whole bound: which levels are drawn, and that no number of them changes its mean."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from atelier.core.rng import ImageRngs
from atelier.diffusion.bound import bound_terms, prior_term, step_term, strata
from atelier.diffusion.schedules import EDM, Cosine, Flow, Linear, Schedule, ZeroTerminal
from atelier.images.pixels import to_float, to_uint8

STD = 0.25


def denoised(schedule: Schedule, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """E[x | x_t] of images N(0, STD^2)."""
    alpha, sigma = schedule.pair(t, like=x_t)
    return alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * x_t


def images(n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return to_float(to_uint8(STD * torch.randn(n, 1, 4, 4, generator=generator)))


def total(terms: dict[str, torch.Tensor]) -> torch.Tensor:
    return terms["prior"] + terms["steps"].sum(1) + terms["image"]


@pytest.mark.parametrize(("n_levels", "draws"), [(1000, 20), (1000, 999), (1000, 5000), (50, 7), (3, 20), (2, 1)])
def test_the_parts_hold_each_level_once_and_grow(n_levels: int, draws: int) -> None:
    ends = strata(n_levels, draws)
    widths = ends.diff()
    assert (ends[0], ends[-1], len(widths)) == (1, n_levels, min(draws, n_levels - 1))
    assert widths.min() >= 1 and (widths.diff() >= -1).all()  # rounded
    if draws == 20 and n_levels == 1000:
        assert widths[0] < 10 and widths[-1] > 90


@pytest.mark.parametrize("schedule", [Linear(60), Cosine(60), ZeroTerminal(Linear(60))])
def test_all_levels_are_the_bound_itself(schedule: Schedule) -> None:
    """As many parts as levels: the sum of every term, with the noise that each has been given."""
    x, rngs = images(6), ImageRngs(5, 0, 6)
    found = bound_terms(partial(denoised, schedule), x, schedule, rngs.again(), 59)
    rngs.rand(59)
    expected = prior_term(x, schedule)
    for place in range(1, 61):
        t, s = (torch.full((6,), k / 60, dtype=torch.float64) for k in (place, place - 1))
        alpha, sigma = schedule.pair(t, like=x.double())
        x_t = alpha * x + sigma * rngs.randn(1, 4, 4)
        guess = denoised(schedule, x_t.float(), t).clamp(-1, 1)
        term = step_term(x, guess, None, s, t, schedule)
        torch.testing.assert_close(found["image"] if place == 1 else found["steps"][:, place - 2], term)
        expected = expected + term
        error = ((guess - x) * 127.5).double().square().flatten(1).mean(1)
        torch.testing.assert_close(found["error"][:, place - 1], error, rtol=1e-5, atol=1e-6)
        assert (found["time"][:, place - 1] * 60).round().tolist() == [place] * 6
    torch.testing.assert_close(total(found), expected)
    assert not found["above"].any()


@pytest.mark.parametrize("schedule", [Linear(200), Flow(), EDM()])
def test_a_few_levels_have_the_mean_of_all(schedule: Schedule) -> None:
    """Within 3 standard errors of the difference, image by image."""
    x = images(400)
    some = total(bound_terms(partial(denoised, schedule), x, schedule, ImageRngs(0, 0, 400), 10))
    every = total(bound_terms(partial(denoised, schedule), x, schedule, ImageRngs(1, 0, 400), 150))
    apart = some - every
    assert apart.mean().abs() < 3 * apart.std() / 400**0.5
    assert apart.std() < 0.5 * every.mean()  # so that the line above says something


def test_what_is_denoised_is_cut_to_the_range_of_pixels() -> None:
    schedule, x = Linear(20), images(2)
    far, cut = (
        bound_terms(lambda x_t, t, c=c: torch.full_like(x_t, c), x, schedule, ImageRngs(0, 0, 2), 5) for c in (9.0, 1.0)
    )
    torch.testing.assert_close(total(far), total(cut))


def test_a_learned_variance_enters_the_terms() -> None:
    """v at its least is the posterior's variance, in every step but the last."""
    schedule, x = Linear(20), images(3)

    def learned(x_t: torch.Tensor, t: torch.Tensor, v: float) -> torch.Tensor:
        guess = denoised(schedule, x_t, t)
        return torch.cat([guess, torch.full_like(guess, v)], dim=1)

    fixed = bound_terms(partial(denoised, schedule), x, schedule, ImageRngs(0, 0, 3), 19)
    least, largest = (bound_terms(partial(learned, v=v), x, schedule, ImageRngs(0, 0, 3), 19) for v in (-1.0, 1.0))
    torch.testing.assert_close(least["steps"], fixed["steps"])
    assert (largest["steps"] - fixed["steps"]).abs().max() > 0.01
