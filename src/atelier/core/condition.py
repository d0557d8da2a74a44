"""The condition of each image of a batch: a vector, tokens, planes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from atelier.core.batch import Cond

FIELDS = ("vector", "tokens", "planes")  # of a condition; its mask is the tokens'


@dataclass(frozen=True, eq=False)
class Condition:
    """The conditions of B images, each field optional; what is done to one is done to all.

    Args:
        vector: (B, D), added to the embedding of the time or concatenated to noise.
        tokens: (B, T, E), for cross-attention.
        mask: (B, T) bool, true where there is a token; where tokens are given without one, all are there.
        planes: (B, C, H, W), concatenated to the image.
    """

    vector: Tensor | None = None
    tokens: Tensor | None = None
    mask: Tensor | None = None
    planes: Tensor | None = None

    def __post_init__(self) -> None:
        if self.tokens is not None and self.mask is None:
            mask = torch.ones(self.tokens.shape[:2], dtype=torch.bool, device=self.tokens.device)
            object.__setattr__(self, "mask", mask)

    def __len__(self) -> int:
        """B."""
        return len(next(value for value in self._values() if value is not None))

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return next(value for value in self._values() if value is not None).device

    def null(self) -> Condition:
        """Zeros of the same shapes, with no token in sight: for what has no learned value that says nothing."""
        return self._each(torch.zeros_like)

    def drop(self, rows: Tensor, null: Condition, names: Collection[str] = FIELDS) -> Condition:
        """This condition, but `null`, one with the same fields, in the `rows` (B,) that are true.

        Args:
            rows: images whose condition is left out.
            null: condition in its place.
            names: fields that are left out, all others stay; the mask goes with the tokens.
        """

        def dropped(own: Tensor, nothing: Tensor) -> Tensor:
            return torch.where(rows.view(-1, *[1] * (own.ndim - 1)), nothing.to(own.dtype), own)

        made = self._each(dropped, null)
        changed = [*names, "mask"] if "tokens" in names else names
        return replace(self, **{name: getattr(made, name) for name in changed})

    def rows(self, index: Tensor | slice | list[int]) -> Condition:
        """The images of these numbers, in this order; a number that is there twice comes twice."""
        return self._each(lambda own: own[index])

    def cat(self, other: Condition) -> Condition:
        """These images, then those of another condition with the same fields."""
        return self._each(lambda *pair: torch.cat(pair), other)

    def sizes(self) -> dict[str, int]:
        """How many numbers each field that is there has at a place: D of a vector, E of tokens, C of planes."""
        axes = {"vector": 1, "tokens": 2, "planes": 1}
        given = {name: getattr(self, name) for name in axes}
        return {name: value.shape[axes[name]] for name, value in given.items() if value is not None}

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
    """What is asked of n images, by name, to the condition that their net takes.

    `conditions` are the names that it looks at.
    """

    conditions: tuple[str, ...]

    @property
    def cond_sizes(self) -> dict[str, int]:
        """What `Condition.sizes` is of what it gives."""
        ...

    def __call__(self, cond: Cond, n: int, drop: float | None = None) -> Condition:
        """The condition of n images; in training `null` takes its place, of each with probability `drop`.

        Which, the embedder draws (`dropped_rows`), so that one of several fields may leave out each by itself.
        """
        ...

    def null(self, n: int, cond: Cond | None = None) -> Condition:
        """The condition of n images of which nothing is known.

        Args:
            n: number of images.
            cond: conditions asked for, which give what is never left out, as the mask of a hole to fill, and
                what is asked for in place of nothing, as a negative prompt; None: nothing is.
        """
        ...


def dropped_rows(n: int, drop: float, device: torch.device) -> Tensor:
    """Images whose condition is left out, (n,) bool, each with probability `drop`, drawn by torch's generator."""
    return torch.rand(n, device=device) < drop
