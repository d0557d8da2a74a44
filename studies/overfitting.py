"""Whether the diagnostics find what they are for: overfitting, copies of training images, conditions that say nothing.

Two runs on all and on few images, and a third whose training images have each other's conditions, judged ten times each
(WORDS: model=ddpm data=fashion_mnist data.root=PATH budget.images=200_000 eval.every_images=20_000 metrics=classifier):

    python train.py WORDS run_dir=outputs/all
    python train.py WORDS data.limit=200 run_dir=outputs/few
    python studies/overfitting.py train WORDS run_dir=outputs/shuffled

and two pictures of them, a panel for each column of metrics.csv, with its 95 % interval where it has one:

    python studies/overfitting.py plot docs/overfitting.png outputs/few outputs/all \\
        --columns val/gap val/memorisation train/loss
    python studies/overfitting.py plot docs/condition_gain.png outputs/all outputs/shuffled --columns val/condition_gain
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont

from atelier.callbacks.table import read_rows
from atelier.core.batch import Batch
from atelier.core.rng import generator
from atelier.data.base import DataModule, Images

WIDTH, HEIGHT, MARGIN = 420, 260, 56  # pixels of a panel
SMOOTHED = 20  # rows that a point is the mean of
COLOURS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189))
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


class Point(NamedTuple):
    """A value, its place on the clock and half of its interval."""

    images_seen: float
    value: float
    half_width: float


def curve(run: Path, column: str) -> list[Point]:
    """A column of a run's metrics.csv; one without intervals as means of rows that follow one another."""
    rows = [row for row in read_rows(run / "metrics.csv") if column in row]
    if any(f"{column}_ci95" in row for row in rows):
        return [Point(row["images_seen"], row[column], row.get(f"{column}_ci95", 0.0)) for row in rows]
    parts = [rows[k : k + SMOOTHED] for k in range(0, len(rows), SMOOTHED)]
    return [Point(part[-1]["images_seen"], sum(row[column] for row in part) / len(part), 0.0) for part in parts]


def panel(title: str, curves: dict[str, list[Point]]) -> Image.Image:
    """One picture of some curves over images seen, each in a band as wide as its intervals."""
    points = [point for one in curves.values() for point in one]
    high = max(point.value + point.half_width for point in points)
    low = min(min(point.value - point.half_width for point in points), 0.5 if "memorisation" in title else 0)
    right, high = max(point.images_seen for point in points), max(high, low + 1e-9)

    def place(x: float, y: float) -> tuple[float, float]:
        along, down = x / right, (high - y) / (high - low)
        return MARGIN + along * (WIDTH - 1.5 * MARGIN), MARGIN + down * (HEIGHT - 1.75 * MARGIN)

    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(image, "RGBA"), ImageFont.load_default(12)
    for x, y, words in marks(low, high, right):
        at = place(x, y)
        draw.line([place(0, y), place(right, y)] if x == 0 else [place(x, low), place(x, high)], fill=(225, 225, 225))
        draw.text((4, at[1] - 7) if x == 0 else (at[0] - 14, HEIGHT - 0.6 * MARGIN), words, "black", font)
    for number, (name, one) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        upper = [place(p.images_seen, p.value + p.half_width) for p in one]
        lower = [place(p.images_seen, p.value - p.half_width) for p in one]
        draw.polygon([*upper, *reversed(lower)], fill=(*colour, 50))
        draw.line([place(p.images_seen, p.value) for p in one], fill=colour, width=2)
        draw.text((MARGIN + 110 * number, 22), name, colour, font)
    draw.text((MARGIN, 4), f"{title} over images seen", "black", font)
    return image


def marks(low: float, high: float, right: float) -> Iterator[tuple[float, float, str]]:
    """Places and words of the lines of a panel: five across, and two along that end at x = right."""
    for k in range(5):
        y = low + k * (high - low) / 4
        yield 0, y, f"{y:.3g}"
    for x in (right / 2, right):
        yield x, low, f"{x:,.0f}"


def plot(out: Path, runs: list[Path], columns: list[str]) -> None:
    """Panels beside each other, one for each column."""
    panels = [panel(column, {run.name: curve(run, column) for run in runs}) for column in columns]
    image = Image.new("RGB", (WIDTH * len(panels), HEIGHT))
    for k, one in enumerate(panels):
        image.paste(one, (k * WIDTH, 0))
    image.save(out)


def main() -> None:
    if sys.argv[1:2] == ["train"]:
        sys.path.insert(0, str(Path(__file__).parents[1]))
        import train
        from atelier.runs import build

        original = build.data
        build.data = lambda cfg: shuffle(original(cfg))
        del sys.argv[1]
        return train.main()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "plot"])
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--columns", nargs="+", required=True)
    asked = parser.parse_args()
    return plot(asked.out, asked.runs, asked.columns)


if __name__ == "__main__":
    main()
