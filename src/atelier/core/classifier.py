"""What a classifier of noisy images must be to guide a sampler."""

from __future__ import annotations

from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class GuidingClassifier(Protocol):
    """A module that says how probable a label is of a noisy image, so that its gradient shows the way there.

    `shape` is that of one image, (C, H, W); labels are 0 .. n_classes - 1; `schedule` gives alpha and sigma of its
    times.
    """

    shape: tuple[int, int, int]
    n_classes: int
    schedule: Any

    def log_probability(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """log p(label | x_t), (B,): x_t (B, C, H, W) on its schedule, t (B,) float64 in (0, 1], label (B,) int64."""
        ...

    def to(self, device: torch.device) -> Self: ...

    def eval(self) -> Self: ...

    def requires_grad_(self, requires_grad: bool) -> Self: ...
