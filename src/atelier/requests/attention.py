"""Where a net looks while it draws each word of a caption, as pictures."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atelier.core.batch import Cond
from atelier.core.rng import ImageRngs
from atelier.images.pictures import labelled
from atelier.images.pixels import to_uint8
from atelier.models.diffusion_model import DiffusionModel

CELL = 64  # pixels a side of a map in a picture


def sheets(model: DiffusionModel, cond: Cond, rngs: ImageRngs, n_frames: int, options: dict[str, Any]) -> list[Tensor]:
    """For each image a picture (3, H, W) uint8: the denoised image over the steps, and below it where each word is.

    Bright is where a place looks most at that word, over all steps.

    Args:
        model: model that reads words.
        cond: condition of B images.
        rngs: noise of them.
        n_frames: columns, at most as many as there are steps.
        options: arguments of `attending`.
    """
    steps = list(model.attending(cond, rngs, n_frames, **options))
    made = []
    for k, words in enumerate(model.words(cond)):
        rows = [("", large(torch.stack([to_uint8(denoised[k]) for denoised, _ in steps])))]
        for word, span in words:
            heat = torch.stack([maps[k, span.start : span.stop].mean(0) for _, maps in steps])  # (frames, h, w)
            grey = (255 * heat / heat.max().clamp(min=1e-12)).round().to(torch.uint8)
            rows.append((word, large(grey[:, None])))
        made.append(labelled(rows))
    return made


def large(images: Tensor) -> Tensor:
    """Images (N, 1 or 3, H, W) uint8 as (N, 3, CELL, CELL)."""
    return F.interpolate(images.cpu().expand(-1, 3, -1, -1), size=(CELL, CELL), mode="nearest")
