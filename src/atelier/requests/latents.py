"""Ways through the space of latents and styles, and the search for the latent of an image."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from atelier.core.batch import each
from atelier.core.rng import ImageRngs
from atelier.losses.perceptual import Pyramid
from atelier.models.base import Cond, Latent, StyleBased

REACH = 3.0  # of a coordinate; deviations, where the prior is standard normal
TRUNCATED = 1.5  # psi at the end of a row
PROJECTION_STEPS, PROJECTION_LR = 300, 0.1  # of the search for a latent


def straight(start: Tensor, end: Tensor, part: Tensor) -> Tensor:
    """Latents (B, ...) at a share `part` (B,) in [0, 1] of the straight way."""
    part = _each(part, start)
    return (1 - part) * start + part * end


def great_circle(start: Tensor, end: Tensor, part: Tensor) -> Tensor:
    """Latents (B, ...) at a share `part` (B,) in [0, 1] of the way along a circle; the ends are taken as orthogonal."""
    part = _each(part, start)
    return torch.cos(part * torch.pi / 2) * start + torch.sin(part * torch.pi / 2) * end


class Between:
    """Stands in for ImageRngs: normal noise of n images, at a share `part` (n,) of the circle between those of two."""

    def __init__(self, start: ImageRngs, end: ImageRngs, part: Tensor) -> None:
        self.start, self.end, self.part = start, end, part

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, part: slice) -> Between:
        return Between(self.start[part], self.end[part], self.part[part])

    def again(self) -> Between:
        return Between(self.start.again(), self.end.again(), self.part)

    def randn(self, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        start, end = (rngs.randn(*shape, device=device) for rngs in (self.start, self.end))
        return great_circle(start, end, self.part)

    def randns(self, n: int, *shape: int, device: torch.device | str = "cpu") -> Iterator[Tensor]:
        """As so many calls of `randn`."""
        for start, end in zip(*(rngs.randns(n, *shape, device=device) for rngs in (self.start, self.end)), strict=True):
            yield great_circle(start, end, self.part)


def along(z: Tensor, coordinates: Tensor, part: Tensor) -> Tensor:
    """One latent (1, ...) n times, (n, ...), each with one coordinate at a share `part` (n,) of -REACH .. REACH.

    Coordinates (n,) count through the flat latent and begin anew at its end.
    """
    flat = z.flatten(1).repeat(len(part), 1)
    steps = (REACH * (2 * part - 1)).to(flat)
    where = (coordinates % flat.shape[1]).to(flat.device)
    return flat.scatter(1, where[:, None], steps[:, None]).unflatten(1, z.shape[1:])


def truncated(model: StyleBased, z: Tensor, cond: Cond, index: Tensor, part: Tensor) -> Tensor:
    """Styles (n, L, W) of the latents at `index` (n,), at a share `part` (n,) of psi 0 .. TRUNCATED."""
    index, psi = index.to(z.device), (TRUNCATED * part).to(z)[:, None, None]
    return torch.lerp(model.styles(z, cond, 0.0)[index], model.styles(z, cond, 1.0)[index], psi)


def mixed(styles: Tensor, coarse: Tensor, fine: Tensor) -> Tensor:
    """Styles (n, L, W): the coarse half of the layers of those at `coarse` (n,), the other of those at `fine`.

    Coarse are the layers up to half of the image's size.
    """
    coarse, fine = coarse.to(styles.device), fine.to(styles.device)
    cut = styles.shape[1] // 2
    return torch.cat([styles[coarse, :cut], styles[fine, cut:]], dim=1)


def projection(model: Latent, x: Tensor, cond: Cond, rngs: ImageRngs, options: dict[str, Any]) -> Tensor:
    """Images (B, C, H, W) of the latents that come nearest to images x, found by descent from draws of the prior.

    What is brought down is the mean difference of pixels and of a pyramid of edges; a latent is held to its size.
    """
    with torch.inference_mode(False), torch.enable_grad():
        distance = Pyramid(n_levels=3).to(x.device)
        x, cond = x.clone(), each(cond, Tensor.clone)
        start = model.sample_latents(rngs, cond).clone()
        z, noise = start.clone().requires_grad_(), rngs.again()
        optimizer = torch.optim.Adam([z], lr=PROJECTION_LR)
        size = start.flatten(1).norm(dim=1)
        best, least = start, torch.full((len(x),), torch.inf, device=x.device)
        for step in range(PROJECTION_STEPS):
            for group in optimizer.param_groups:
                group["lr"] = PROJECTION_LR * (1 - step / PROJECTION_STEPS)
            found = model.generate(z, cond, noise.again(), **options)
            far = (found - x).abs().flatten(1).mean(1) + distance(found, x)
            better = (far < least).detach()
            best = torch.where(_each(better, z), z.detach(), best)
            least = torch.where(better, far.detach(), least)
            held = (z.flatten(1).norm(dim=1) / size - 1).clamp(min=0).square()
            optimizer.zero_grad()
            (far + held).sum().backward()
            optimizer.step()
        return model.generate(best, cond, noise.again(), **options).detach()


def _each(values: Tensor, z: Tensor) -> Tensor:
    """(B,) as (B, 1, ...) beside latents (B, ...), on their device; numbers in their precision."""
    values = values.to(z.device) if values.dtype == torch.bool else values.to(z)
    return values.view(-1, *[1] * (z.ndim - 1))
