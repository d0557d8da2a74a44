"""How well a run fills holes in the shapes world, and how far it changes what lies around them.

    python studies/inpainting.py RUN --n 1000 --seed 77

Of n test scenes with their masks, those of the object's box and those of strokes told apart: the share of pasted
pictures that the judge finds valid, and of those that are what their caption says, beside the same pictures with the
hole left grey and with the hole in the colour of the ground. Then the object's box of each under another caption
(shape, colour and fill drawn anew, size and ground as they are): the share in which all of that is seen. Last, by the
distance of a pixel from the hole: the mean difference from the image, in grey levels, before it is pasted, beside that
of the first stage alone. Two tables in Markdown, the second also as a figure.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from atelier.core.batch import Batch, Cond
from atelier.core.rng import ImageRngs
from atelier.images.charts import line_chart
from atelier.images.pixels import to_float, to_uint8
from atelier.models.base import sampling_mode
from atelier.models.ldm import LDM
from atelier.runs import folders
from atelier.runs.trainer import device
from atelier.shapes import world
from atelier.shapes.judge import Verdict, judge

BATCH = 100
FURTHEST = 8  # pixels from the hole, from which on all count as one
ASKED = ("shape", "colour", "size", "fill", "ground")


def batches(run: folders.LoadedRun, n: int) -> Iterator[tuple[range, Batch]]:
    """Numbers and test scenes, with a line of progress."""
    for first in range(0, n, BATCH):
        numbers = range(first, min(n, first + BATCH))
        print(f"{first} of {n}", end="\r", file=sys.stderr, flush=True)
        yield numbers, run.data.test_batch(first, len(numbers))


def unpasted(model: LDM, cond: Cond, rngs: ImageRngs) -> Tensor:
    """What the model makes of a condition before the image is pasted around it, (B, C, H, W)."""
    return model.decode(model.diffusion_sampler(cond, model.noise(rngs), rngs))


def in_ground(batch: Batch) -> Tensor:
    """The images with their holes in the median colour of their borders."""
    x = batch["image"]
    border = torch.cat([x[..., 0, :], x[..., -1, :], x[..., :, 0], x[..., :, -1]], dim=2)  # (B, C, 4 S)
    return torch.where(batch["mask"] > 0.5, border.median(2).values[..., None, None], x)


def other_scenes(seen: Verdict, seed: int, numbers: range) -> world.Scenes:
    """The scenes with another shape, colour and fill."""
    scenes, u = seen.scenes, torch.Generator().manual_seed(seed * 1_000_003 + numbers.start)
    counts = dict(zip(ASKED, world.COUNTS, strict=True))
    drawn = {
        name: (getattr(scenes, name) + torch.randint(1, counts[name], (len(scenes),), generator=u)) % counts[name]
        for name in ("shape", "colour")
    }
    return replace(scenes, **drawn, fill=torch.randint(2, (len(scenes),), generator=u))


def right(seen: Verdict, asked: world.Scenes) -> Tensor:
    """Which are what was asked for, in all five attributes, (N,) bool."""
    return torch.stack([getattr(seen, name) == getattr(asked, name) for name in ASKED]).all(0)


def rings(mask: Tensor) -> Tensor:
    """Distance of each pixel from the hole, (B, 1, H, W): 0 in it, at most FURTHEST."""
    distance, grown = torch.zeros_like(mask), mask
    for _ in range(FURTHEST):
        distance += 1 - grown
        grown = F.max_pool2d(grown, 3, 1, 1)
    return distance


def measured(run: folders.LoadedRun, n: int, seed: int) -> tuple[dict[str, dict[str, float]], dict[str, list[float]]]:
    """Shares by kind of mask, and differences by distance."""
    model = run.model
    rows: dict[str, list[Tensor]] = {}
    changed = {name: torch.zeros(2, FURTHEST + 1, dtype=torch.float64) for name in ("model", "first stage alone")}
    for numbers, batch in batches(run, n):
        rngs = ImageRngs(seed, numbers.start, len(numbers))
        made = unpasted(model, model.condition(batch, ""), rngs).cpu()
        truth = judge(batch["image"])
        hole = batch["mask"] > 0.5
        pictures = {
            "filled": torch.where(hole, made, batch["image"]),
            "left grey": batch["image"].masked_fill(hole, 0),
            "in the ground's colour": in_ground(batch),
        }
        for name, x in pictures.items():
            seen = judge(to_float(to_uint8(x)))
            rows.setdefault(f"{name}: valid", []).append(seen.valid)
            rows.setdefault(f"{name}: as the caption says", []).append(seen.valid & right(seen, truth.scenes))
        asked = other_scenes(truth, seed, numbers)
        box = world.box_mask(truth.scenes, batch["image"].shape[-1])
        other = batch | {"mask": box, "text": world.captions(asked)}
        seen = judge(to_float(to_uint8(model.sample(model.condition(other, ""), rngs.again()).cpu())))
        rows.setdefault("the object replaced", []).append(right(seen, asked))
        rows.setdefault("kind", []).append(batch["mask_kind"])
        distance = rings(batch["mask"])
        alone = model.decode(model.encode(batch["image"].to(model.device))).cpu()
        for name, x in (("model", made), ("first stage alone", alone)):
            off = (x.clamp(-1, 1) - batch["image"]).abs().mean(1, keepdim=True) * 127.5
            for ring in range(FURTHEST + 1):
                here = distance == ring
                changed[name][:, ring] += torch.stack([off[here].sum().double(), here.sum().double()])
    all_rows = {name: torch.cat(parts) for name, parts in rows.items()}
    kinds = all_rows.pop("kind")
    shares = {
        kind: {name: hits[kinds == k].double().mean().item() for name, hits in all_rows.items()}
        for k, kind in enumerate(world.MASK_KINDS)
    }
    return shares, {name: (total / count).tolist() for name, (total, count) in changed.items()}


def figure(changed: dict[str, list[float]]) -> str:
    """An SVG of the differences outside the hole."""
    curves = {name: [(ring, value) for ring, value in enumerate(values) if ring] for name, values in changed.items()}
    return line_chart(curves, "pixels from the hole", "grey levels changed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a finished run of model=inpaint on data=shapes, or last")
    parser.add_argument("--n", type=int, default=1000, help="test scenes")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--figure", help="file of the second table as an SVG")
    asked = parser.parse_args()
    run = folders.load_generator(folders.find(asked.run), True, None)
    run.model.to(device())
    with sampling_mode(run.model, {}):
        shares, changed = measured(run, asked.n, asked.seed)
    kinds = list(shares)
    print("| | " + " | ".join(kinds) + " |\n" + "| --- " * (1 + len(kinds)) + "|")
    for name in shares[kinds[0]]:
        print(f"| {name} | " + " | ".join(f"{shares[kind][name]:.3f}" for kind in kinds) + " |")
    print("\n| grey levels changed, pixels from the hole | " + " | ".join(map(str, range(FURTHEST + 1))) + " |")
    print("| --- " * (FURTHEST + 2) + "|")
    for name, values in changed.items():
        print(f"| {name} | " + " | ".join(f"{value:.1f}" for value in values) + " |")
    if asked.figure:
        Path(asked.figure).write_text(figure(changed))


if __name__ == "__main__":
    main()
