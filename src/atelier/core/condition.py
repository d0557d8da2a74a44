"""The condition of each image of a batch: a vector, tokens, planes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """The conditions of B images, each field optional; what is done to one is done to all.

    Args:
        vector: (B, D), added to the embedding of the time or concatenated to noise.
        tokens: (B, T, E), for cross-attention.
        mask: (B, T) bool, true where there is a token; None: everywhere.
        planes: (B, C, H, W), concatenated to the image.
    """

    vector: Tensor | None = None
    tokens: Tensor | None = None
    mask: Tensor | None = None
    planes: Tensor | None = None

    def __len__(self) -> int:
        """B."""
        return len(next(value for value in self._values() if value is not None))

    def null(self) -> Condition:
        """Zeros of the same shapes, with no token in sight: for what has no learned value that says nothing."""
        return self._each(torch.zeros_like)

    def drop(self, rows: Tensor, null: Condition) -> Condition:
        """This condition, but `null`, one with the same fields, in the `rows` (B,) that are true."""

        def dropped(own: Tensor, nothing: Tensor) -> Tensor:
            return torch.where(rows.view(-1, *[1] * (own.ndim - 1)), nothing.to(own.dtype), own)

        return self._each(dropped, null)

    def rows(self, index: Tensor | slice | list[int]) -> Condition:
        """The images of these numbers, in this order; a number that is there twice comes twice."""
        return self._each(lambda own: own[index])

    def cat(self, other: Condition) -> Condition:
        """These images, then those of another condition with the same fields."""
        return self._each(lambda *pair: torch.cat(pair), other)

    def to(self, device: torch.device | str) -> Condition:
        """The same on another device."""
        return self._each(lambda own: own.to(device))

    def _values(self) -> list[Tensor | None]:
        return [getattr(self, field.name) for field in fields(self)]

    def _each(self, change: Callable[..., Tensor], *others: Condition) -> Condition:
        columns = zip(self._values(), *(other._values() for other in others), strict=True)
        return Condition(*(None if column[0] is None else change(*column) for column in columns))


@runtime_checkable
class Embedder(Protocol):
    """What is asked of n images, by name, to the condition that their net takes."""

    conditions: tuple[str, ...]

    def __call__(self, cond: dict[str, Tensor], n: int, drop: Tensor | None = None) -> Condition:
        """The condition of n images; where `drop` (n,) bool is true, that of `null`."""
        ...

    def null(self, n: int) -> Condition:
        """The condition of n images of which nothing is known."""
        ...
