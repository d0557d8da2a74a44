"""How well a run edits the shapes world by instructions, beside doing nothing and beside the wrong instruction.

    python studies/editing.py RUN --n 1000 --seed 77

Of n test scenes with an instruction each: the share in which what had to change is what it should be, the share in
which every other attribute is as it was, and the share with both, which is what counts. The same of the source itself,
which keeps all and changes nothing, and of results under the instruction of another scene. By kind of edit: the share
with both. An edit counts where the judge reads the new value. A table in Markdown.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor

from atelier.core.rng import ImageRngs
from atelier.images.pixels import to_float, to_uint8
from atelier.models.base import sampling_mode
from atelier.runs import folders
from atelier.runs.trainer import device
from atelier.shapes.judge import Verdict, judge
from atelier.shapes.world import ATTRIBUTES

BATCH = 100


def judged(seen: Verdict, answer: Verdict, before: Verdict, image_size: int) -> dict[str, Tensor]:
    """What each of N results changed and kept, (N,) bool."""
    right = torch.stack([getattr(seen, name) == getattr(answer, name) for name in ATTRIBUTES])  # (5, N)
    changes = torch.stack([getattr(before, name) != getattr(answer, name) for name in ATTRIBUTES])
    near = torch.hypot(seen.cx - answer.cx, seen.cy - answer.cy) <= 2 / image_size
    found = {"changed": (right | ~changes).all(0), "kept": (right | changes).all(0)}
    found["both"] = found["changed"] & found["kept"]
    found["both, in its place"] = found["both"] & near
    for k, name in enumerate(ATTRIBUTES):
        found[f"of {name}"] = torch.where(changes[k], found["both"].float(), torch.nan)
    return found


def measured(run: folders.LoadedRun, n: int, seed: int) -> dict[str, dict[str, float]]:
    """Shares by what made the pictures."""
    rows: dict[str, dict[str, list[Tensor]]] = {}
    for first in range(0, n, BATCH):
        size = min(BATCH, n - first)
        print(f"{first} of {n}", end="\r", file=sys.stderr, flush=True)
        batch = run.data.test_batch(first, size)
        wrong = batch | {"instruction": batch["instruction"][1:] + batch["instruction"][:1]}
        pictures = {"the source itself": batch["source"]}
        for name, asked in (("edited", batch), ("by another's instruction", wrong)):
            pictures[name] = run.model.sample(run.model.condition(asked, ""), ImageRngs(seed, first, size)).cpu()
        answer, before = judge(batch["image"]), judge(batch["source"])
        for name, x in pictures.items():
            found = judged(judge(to_float(to_uint8(x))), answer, before, x.shape[-1])
            for figure, hits in found.items():
                rows.setdefault(name, {}).setdefault(figure, []).append(hits.float())
    return {
        name: {figure: torch.cat(parts).nanmean().item() for figure, parts in found.items()}
        for name, found in rows.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a finished run on data=shapes data.task=edit, or last")
    parser.add_argument("--n", type=int, default=1000, help="test scenes")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    asked = parser.parse_args()
    run = folders.load_generator(folders.find(asked.run), True, None)
    run.model.to(device())
    with sampling_mode(run.model, {}):
        rows = measured(run, asked.n, asked.seed)
    names = list(rows)
    print("| | " + " | ".join(names) + " |\n" + "| --- " * (1 + len(names)) + "|")
    for figure in rows[names[0]]:
        print(f"| {figure} | " + " | ".join(f"{rows[name][figure]:.3f}" for name in names) + " |")


if __name__ == "__main__":
    main()
