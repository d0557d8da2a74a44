"""The names of the figures that an evaluation will give, before anything is trained."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from atelier.core.errors import UserError, nearest
from atelier.core.ranks import many
from atelier.core.rng import ImageRngs
from atelier.data.base import DataModule
from atelier.evaluation.evaluator import Evaluator
from atelier.metrics.suite import Suite
from atelier.models.base import Cond, Examined, Generator, Model


def names(evaluator: Evaluator, model: Model, data: DataModule) -> list[str]:
    """What `evaluator` will name its values: it judges two test images, which a stand-in gives back unseen.

    Neither the model, which may take its scale from the first batch it sees, nor a net of the suite is called, and the
    distances, which want more images, are named alone; what makes no images has none, unless it is examined. All ranks
    call this together.
    """
    if isinstance(model, Examined):
        return list(model.figures)
    if not isinstance(model, Generator):
        return []
    few = dist.get_world_size() if many() else 2
    images = data.test_batch(0, few)[model.real_fields[model.cases[0]]]
    diagnosed = 0 if evaluator.n_diagnosed == 0 else few
    dry = replace(
        evaluator, n_samples=few, n_real=few, batch_size=few, suite=_named(evaluator.suite), n_diagnosed=diagnosed
    )
    values, _ = dry(_giving_back(model, images), data, {}, nullcontext, lambda *_: None)
    return list(values)


def check(key: str, metric: str | None, known: list[str]) -> None:
    """Refuse a metric that no evaluation of this run will have.

    Raises:
        UserError: no evaluation will give the metric that the option `key` asks for.
    """
    if metric is not None and metric not in known:
        close = nearest(metric, known) or next(iter(known), None)
        raise UserError(key, metric, "no such metric of this run", f"{key}={'null' if close is None else close}")


def of_raw(values: dict[str, float]) -> dict[str, float]:
    """Figures of the raw weights by the names that they have beside those of the averaged ones.

    What is between real images has nothing to do with weights and is left out.
    """
    return {f"raw/{name}": value for name, value in values.items() if not name.startswith("real/")}


def _giving_back(model: Generator, images: Tensor) -> Generator:
    """A stand-in of the model's class that returns fixed images."""

    class GivingBack(type(model)):
        def sample(self, cond: Cond, rngs: ImageRngs) -> Tensor:
            return images[: len(rngs)]

        def encode(self, x: Tensor, rngs: ImageRngs | None = None) -> Tensor:
            return x

        def decode(self, z: Tensor) -> Tensor:
            return z

        def codes(self, x: Tensor) -> Tensor:
            return x.new_zeros(len(x), 1, 1, dtype=torch.int64)

        def nll(self, x: Tensor, cond: Cond, rngs: ImageRngs) -> Tensor:
            return x.new_zeros(len(x))

        def denoising_errors(self, z: Tensor, cond: Cond, rngs: ImageRngs) -> tuple[Tensor, Tensor]:
            return (z.new_zeros(len(z), len(self.noise_bins())),) * 2

        def bound_terms(self, x: Tensor, cond: Cond, rngs: ImageRngs, n_levels: int) -> dict[str, Tensor]:
            some, each, one = x.new_zeros(len(x), n_levels + 1), x.new_zeros(len(x), n_levels), x.new_zeros(len(x))
            return {"prior": one, "image": one, "steps": each, "above": each, "time": some, "error": some}

    stand_in = copy.copy(model)
    stand_in.__class__ = GivingBack
    return stand_in


def _named(suite: Suite) -> Suite:
    """The same suite, whose distances have names and no values."""

    class Named(type(suite)):
        def features(self, images: Tensor) -> Tensor:
            return torch.zeros(len(images), 1)

        def real(self, fingerprint: str, compute: object, agree: object = bool) -> dict[str, Tensor]:
            return compute()

        def recognised(self, features: Tensor, labels: Tensor) -> float:
            return math.nan

        def compare(self, real: Tensor, fake: Tensor) -> dict[str, float]:
            return {self.named(name): math.nan for name in self.names}

    stand_in = copy.copy(suite)
    stand_in.__class__ = Named
    return stand_in
