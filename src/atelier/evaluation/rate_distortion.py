"""The bound of a diffusion model by its terms, and what an image costs beside how near it has come, level by level."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from atelier.core.rng import ImageRngs
from atelier.data.base import DataModule
from atelier.evaluation.gathering import Parts, Progress, read
from atelier.images.charts import line_chart
from atelier.models.base import Bounded


@dataclass(frozen=True)
class Curve:
    """Means over test images; levels from the faintest noise to the strongest.

    (Ho et al. 2020, DDPM, section 4.3 and figure 5.) Whoever knows x_t has paid L_T and the terms of all levels above
    t, and takes the denoised image for the picture.

    Args:
        values: figures by name: `nll` in nats an image, `bpd` in bits a dimension with its standard error over images
            `bpd_error`, and its parts `bpd_prior` L_T, `bpd_steps` the sum of L_t, `bpd_image` L_0.
        time: mean of t in each part of the levels, (K + 1,) rising; the first is that of L_0 alone.
        term: bits a dimension of the part, (K + 1,).
        rate: bits a dimension paid when x_t is known, (K + 1,) falling.
        rmse: root of the mean squared error of the denoised image, grey levels, (K + 1,).
    """

    values: dict[str, float]
    time: Tensor
    term: Tensor
    rate: Tensor
    rmse: Tensor

    def rows(self) -> list[tuple[float, ...]]:
        """(t, bits of the part, rate, RMSE) of each part."""
        return list(zip(*(column.tolist() for column in (self.time, self.term, self.rate, self.rmse)), strict=True))

    def csv(self) -> str:
        """The rows as a file."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["t", "term_bits_per_dim", "rate_bits_per_dim", "rmse_grey_levels"])
        writer.writerows([f"{number:.6g}" for number in row] for row in self.rows())
        return file.getvalue()

    def write(self, folder: Path) -> None:
        """rate_distortion.csv and rate_distortion.svg."""
        points = [(rate, rmse) for _, _, rate, rmse in self.rows()]
        chart = line_chart({"": points}, "rate, bits/dim", "distortion, RMSE in grey levels")
        (folder / "rate_distortion.csv").write_text(self.csv())
        (folder / "rate_distortion.svg").write_text(chart)

    def table(self, n_rows: int = 12) -> str:
        """The sum of the bound and at most so many rows, as text."""
        v = self.values
        total = f"bits/dim {v['bpd']:.4f} +- {v['bpd_error']:.4f} (standard error)"
        parts = f"L_T {v['bpd_prior']:.2g}, L_t {v['bpd_steps']:.4f}, L_0 {v['bpd_image']:.4f}"
        rows, step = self.rows(), max(1, -(-len(self.time) // n_rows))
        shown = [f"{t:8.4f} {term:12.5f} {rate:12.4f} {rmse:10.2f}" for t, term, rate, rmse in rows[::step]]
        return "\n".join([f"{total}: {parts}", "       t         term         rate       RMSE", *shown])


def rate_distortion(
    model: Bounded,
    data: DataModule,
    rngs: Callable[[int, int], ImageRngs],
    n: int,
    n_levels: int,
    batch_size: int,
    context: Callable[[], AbstractContextManager],
    progress: Progress,
) -> Curve:
    """The bound of the n chosen test images, under their own conditions and without guidance.

    Args:
        rngs: first number and how many -> random numbers of these images.
        n_levels: noise levels that are drawn for each image.
        context: precision that the net runs under.
    """
    parts = Parts()
    for numbers, batch in read(data, "test", n, batch_size, "likelihood", progress):
        x = batch["image"].to(model.device)
        with context():
            cond = model.condition(batch, "")
            parts.add(numbers, model.bound_terms(x, cond, rngs(numbers.start, len(numbers)), n_levels))
    return curve(parts.gathered(), x[0].numel())


def curve(terms: dict[str, Tensor], n_numbers: int) -> Curve:
    """Of the terms of all images (`Bounded.bound_terms`), each of so many numbers."""
    unit = n_numbers * math.log(2)
    nats = terms["prior"] + terms["steps"].sum(1) + terms["image"]  # (N,)
    mean = {name: value.double().mean(0) for name, value in terms.items()}
    error = nats.std() / len(nats) ** 0.5 if len(nats) > 1 else torch.tensor(math.nan)
    values = {
        "nll": nats.mean(),
        "bpd": nats.mean() / unit,
        "bpd_error": error / unit,
        "bpd_prior": mean["prior"] / unit,
        "bpd_steps": mean["steps"].sum() / unit,
        "bpd_image": mean["image"] / unit,
    }
    from_above = mean["prior"] + mean["steps"].flip(0).cumsum(0).flip(0)  # (K,) with each part's own
    rate = torch.cat([from_above[:1], from_above - mean["steps"] + mean["above"]])
    return Curve(
        {name: value.item() for name, value in values.items()},
        mean["time"],
        torch.cat([mean["image"][None], mean["steps"]]) / unit,
        rate / unit,
        mean["error"].sqrt(),
    )
