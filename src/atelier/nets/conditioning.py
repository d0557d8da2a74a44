"""Labels and attributes as one vector per image, with a learned vector for an image without them."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from atelier.core.batch import Cond
from atelier.core.condition import Condition, dropped_rows
from atelier.core.errors import UserError
from atelier.core.ranges import NonNegInt, PositiveInt


class NoCondition(nn.Module):
    """Where there is no condition: a vector of no numbers."""

    conditions: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("place", torch.zeros(()), persistent=False)

    def forward(self, cond: Cond, n: int) -> Condition:
        return Condition(vector=self.place.expand(n, 0))                   # (n, 0)

    def vector(self, cond: Cond, n: int) -> Tensor:
        """Of no numbers, (n, 0)."""
        return self(cond, n).vector


class ConditionEmbedder(nn.Module):
    """The sum of an embedding of the label and one of each attribute that is 1.

    Where that is a sum of nothing, as without conditions, or of attributes that are all 0, an image gets the null
    embedding. Nets divide vectors by their length (`nets/cgan.py`, `nets/stylegan2.py`), so there it starts at 1.

    Args:
        dim: size D of the vector.
        conditions: names of what is embedded.
        n_classes: number of labels.
        label_factors: numbers of each thing where a label numbers the combinations of several, the last
            counting fastest; each thing gets a table of its own, which is learned many times sooner. []: one table.
        n_attributes: number A of attributes.

    Raises:
        UserError: a condition that the set does not have.
    """

    def __init__(
        self,
        *,
        dim: PositiveInt,
        conditions: list[Literal["label", "attributes"]],
        n_classes: NonNegInt,
        label_factors: list[PositiveInt],
        n_attributes: NonNegInt,
    ) -> None:
        super().__init__()
        for name, n in (("label", n_classes), ("attributes", n_attributes)):
            if name in conditions and n == 0:
                raise UserError("data.conditions", conditions, f"this set has no {name}", "data.conditions=[]")
        self.conditions = tuple(conditions)
        self.factors = factors_of(n_classes, label_factors)
        tables = [nn.Embedding(n, dim) for n in self.factors] if "label" in conditions else []
        self.label = nn.ModuleList(tables)
        self.attributes = nn.Parameter(torch.randn(n_attributes, dim)) if "attributes" in conditions else None
        self.null_embedding = nn.Parameter(torch.full((dim,), 0.0 if self.label else 1.0))

    def forward(self, cond: Cond, n: int, drop: float | None = None) -> Condition:
        """A vector (n, D) of `label` (n,) int64 and `attributes` (n, A) 0/1.

        Each gets the null embedding with probability `drop` (Ho & Salimans 2022, algorithm 1).
        """
        dropped = None if drop is None else dropped_rows(n, drop, self.null_embedding.device)
        parts, rest = [], cond.get("label")
        for table in reversed(self.label):
            parts.append(table(rest % table.num_embeddings))               # (n, D)
            rest = rest // table.num_embeddings                            # (n,)
        if self.attributes is not None:
            parts.append(cond["attributes"] @ self.attributes)             # (n, D)
        if not parts:
            return self.null(n)
        if not self.label:
            none = cond["attributes"].sum(1) == 0                          # (n,)
            dropped = none if dropped is None else dropped | none
        known = Condition(vector=torch.stack(parts).sum(0))                # (n, D)
        return known if dropped is None else known.drop(dropped, self.null(n))

    def vector(self, cond: Cond, n: int) -> Tensor:
        """The vector (n, D) alone, for nets that take nothing else."""
        return self(cond, n).vector

    @property
    def cond_sizes(self) -> dict[str, int]:
        """Of a vector, D."""
        return {"vector": len(self.null_embedding)}

    def null(self, n: int, cond: Cond | None = None) -> Condition:
        """The condition of n images of which nothing is known, a vector (n, D)."""
        return Condition(vector=self.null_embedding.expand(n, -1))


def factors_of(n_classes: int, label_factors: list[int]) -> tuple[int, ...]:
    """Numbers of each thing that a label numbers the combinations of; of one thing where none are given.

    Raises:
        UserError: their product is not the number of labels.
    """
    factors = tuple(label_factors or [n_classes])
    if math.prod(factors) != n_classes:
        problem = f"their product is not the {n_classes} classes"
        raise UserError("data.label_factors", label_factors, problem, "data.label_factors=[]")
    return factors
