"""Whether the diagnostics find what they are for: overfitting, copies of training images, conditions that say nothing.

Two runs on all and on few images, and a third whose training images have each other's conditions, judged six times each
(WORDS: model=flow data=fashion_mnist data.root=PATH budget.images=144_000 eval.every_images=24_000 metrics=classifier):

    python train.py WORDS run_dir=outputs/all
    python train.py WORDS data.limit=200 run_dir=outputs/few
    python studies/overfitting.py train WORDS run_dir=outputs/shuffled

and a picture of a column of their metrics.csv, with its 95 % interval where it has one:

    python studies/overfitting.py plot docs/gap.svg outputs/few outputs/all --column val/gap
    python studies/overfitting.py plot docs/condition_gain.svg outputs/all outputs/shuffled --column val/condition_gain
"""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from atelier.callbacks.table import read_rows
from atelier.core.batch import Batch
from atelier.core.rng import generator
from atelier.data.base import DataModule, Images
from atelier.images.charts import line_chart

SMOOTHED = 20  # rows that a point is the mean of
CONDITIONS = ("label", "attributes", "text")


class Shuffled:
    """Images under the conditions of other images, each image always under the same one's."""

    def __init__(self, images: Images) -> None:
        self.images, self.fingerprint, self.labels = images, images.fingerprint, images.labels
        self.other = torch.randperm(len(images), generator=generator(0)).tolist()

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: list[int], rngs: list[torch.Generator] | None) -> Batch:
        batch, others = self.images.read(indices, rngs), self.images.read([self.other[i] for i in indices], None)
        return batch | {name: others[name] for name in CONDITIONS if name in others}


def shuffle(data: DataModule) -> DataModule:
    """The same set, whose training images have each other's conditions."""
    images = data.images
    data.images = lambda split: Shuffled(images(split)) if split == "train" else images(split)
    return data


class Curve(NamedTuple):
    """A column over images seen, and half of the interval of each value; [] where it has none."""

    points: list[tuple[float, float]]
    half_widths: list[float]


def curve(run: Path, column: str) -> Curve:
    """A column of a run's metrics.csv; one without intervals as means of rows that follow one another."""
    rows = [row for row in read_rows(run / "metrics.csv") if column in row]
    if any(f"{column}_ci95" in row for row in rows):
        half_widths = [row.get(f"{column}_ci95", 0.0) for row in rows]
        return Curve([(row["images_seen"], row[column]) for row in rows], half_widths)
    parts = [rows[k : k + SMOOTHED] for k in range(0, len(rows), SMOOTHED)]
    return Curve([(part[-1]["images_seen"], sum(row[column] for row in part) / len(part)) for part in parts], [])


def plot(out: Path, runs: list[Path], column: str) -> None:
    """A picture of a column of all runs, each in a band as wide as its intervals."""
    curves = {run.name: curve(run, column) for run in runs}
    half_widths = {name: one.half_widths for name, one in curves.items() if one.half_widths}
    points = {name: one.points for name, one in curves.items()}
    out.write_text(line_chart(points, "images seen", column, half_widths=half_widths))


def main() -> None:
    if sys.argv[1:2] == ["train"]:
        from atelier.runs import build

        original = build.data
        build.data = lambda cfg: shuffle(original(cfg))
        del sys.argv[1]
        program = Path(__file__).parents[1] / "train.py"
        runpy.run_path(str(program), run_name="__main__")  # as a program, so that Hydra looks for conf/ beside it
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "plot"])
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--column", required=True)
    asked = parser.parse_args()
    plot(asked.out, asked.runs, asked.column)


if __name__ == "__main__":
    main()
