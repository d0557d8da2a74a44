"""What a request changes, what it does not, and what is told of it, on a net that answers with its condition."""

from __future__ import annotations

import pytest
import torch

from atelier.diffusion.drawing import Drawing
from atelier.diffusion.objective import Objective
from atelier.diffusion.samplers import Euler
from atelier.diffusion.schedules import Flow
from atelier.rng import ImageRngs


class Shades:
    """Told: a shade of 2 per image. Not told: 0."""

    def __init__(self, conditions: tuple[str, ...]) -> None:
        self.conditions = conditions

    def __call__(self, cond: dict[str, torch.Tensor], n: int) -> torch.Tensor:
        return torch.full((n, 1), 2.0) if self.conditions else self.null(n)

    def null(self, n: int) -> torch.Tensor:
        return torch.zeros(n, 1)


def shade(x_t: torch.Tensor, time: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
    sizes.append(len(x_t))
    return torch.ones_like(x_t) * cond.view(-1, 1, 1, 1)


sizes: list[int] = []


def drawing(conditions: tuple[str, ...] = ("label",), clip: bool = False) -> Drawing:
    return Drawing(Objective(Flow(), "x0"), shade, Shades(conditions), Euler(steps=3), 1.5, clip)


def drawn(made: Drawing, sampler: Euler | None = None, guidance: float | None = None) -> tuple[float, list[int]]:
    """The shade that all pixels have in the end, and how many images each call of the net held."""
    sizes.clear()
    rngs = ImageRngs(0, 0, 4)
    images = made({}, rngs.randn(3, 2, 2), rngs, sampler, guidance)
    assert images.shape == (4, 3, 2, 2) and images.dtype == torch.float32
    torch.testing.assert_close(images, images.mean().expand_as(images))
    return round(images.mean().item(), 5), sizes[:]


@pytest.mark.parametrize(
    ("sampler", "guidance", "shade", "calls"),
    [
        (None, None, 3.0, [8, 8, 8]),
        (None, 1.0, 2.0, [4, 4, 4]),
        (None, 0.0, 0.0, [8, 8, 8]),
        (Euler(steps=1), 2.0, 4.0, [8]),
    ],
)
def test_a_request_takes_the_place_of_the_models_own(
    sampler: Euler | None, guidance: float | None, shade: float, calls: list[int]
) -> None:
    assert drawn(drawing(), sampler, guidance) == (shade, calls)


def test_pixels_are_clipped() -> None:
    assert drawn(drawing(clip=True)) == (1.0, [8, 8, 8])


def test_without_conditions_guidance_is_off() -> None:
    made = drawing(conditions=())
    assert drawn(made, guidance=3.0) == (0.0, [4, 4, 4])
    assert (made.protocol()["guidance"], drawing().protocol()["guidance"]) == (1.0, 1.5)


def test_protocol_counts_the_calls() -> None:
    assert drawing().protocol() == {"sampler": str(Euler(steps=3)), "nfe": 3, "guidance": 1.5}
