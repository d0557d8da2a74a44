"""What adapters teach a text-to-image model of the shapes world, and what it forgets: images to teach by, and a judge.

    python studies/adapters.py write FOLDER --shapes star --n 200
    python studies/adapters.py prompts FILE --shapes circle square triangle ring cross --n 1000
    python studies/adapters.py judge RUN --adapters LORA_RUN --n 1000 --seed 77

`write`: training scenes of these shapes with their captions, as data=captioned reads them. `prompts`: captions of
training scenes, a line each, as sample.py reads them, of which the model makes a prior (data.prior). `judge`: of n test
scenes of the shapes that the run was trained on, and of n of all other shapes, the share of samples that are what their
caption says and the share that are valid, of the model as it is and with the adapters, from the same noise. A table in
Markdown.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from atelier.core.rng import ImageRngs
from atelier.data.finding import CAPTIONS
from atelier.data.shapes import Shapes
from atelier.images.pictures import save_png
from atelier.images.pixels import to_float, to_uint8
from atelier.models.base import Generator, sampling_mode
from atelier.runs import adapted, folders
from atelier.runs.trainer import device
from atelier.shapes import world
from atelier.shapes.judge import judge

BATCH = 250


def taught(shapes: list[str], n: int, image_size: int) -> Shapes:
    """The first n training scenes of these shapes."""
    sizes = {"image_size": image_size, "image_channels": 3, "n_classes": 36, "n_attributes": 14}
    idle = {"batch_size": 1, "seed": 0, "limit": None, "num_workers": 0, "flip": False, "conditions": ["text"]}
    return Shapes(**sizes, **idle, n_train_scenes=n, shapes=shapes)


def write(folder: Path, shapes: list[str], n: int, image_size: int) -> None:
    """PNG files and captions.tsv."""
    batch = taught(shapes, n, image_size).split("train").read(list(range(n)), None)
    folder.mkdir(parents=True)
    for k, image in enumerate(to_uint8(batch["image"])):
        save_png(image, folder / f"{k:06d}.png")
    (folder / CAPTIONS).write_text("".join(f"{k:06d}.png\t{text}\n" for k, text in enumerate(batch["text"])))


def prompts(file: Path, shapes: list[str], n: int) -> None:
    """Captions, a line each."""
    batch = taught(shapes, n, 16).split("train").beside(list(range(n)), None)[0]
    file.write_text("".join(f"{text}\n" for text in batch["text"]))


def shares(model: Generator, data: Shapes, n: int, seed: int) -> tuple[float, float]:
    """Of n samples by captions of test scenes: the shares as asked, and valid."""
    hits, valid = [], []
    for first in range(0, n, BATCH):
        size = min(BATCH, n - first)
        print(f"{first} of {n}", end="\r", file=sys.stderr, flush=True)
        images = data.split("test")
        batch = images.read(list(range(first, first + size)), None)
        x = model.sample(model.condition(batch, ""), ImageRngs(seed, first, size)).cpu()
        seen, scenes = judge(to_float(to_uint8(x))), images.scenes[batch["index"]]
        hits.append(torch.stack([getattr(seen, name) == getattr(scenes, name) for name in world.ATTRIBUTES]).all(0))
        valid.append(seen.valid)
    return tuple(torch.cat(found).double().mean().item() for found in (hits, valid))


def judged(place: str, places: list[str], n: int, seed: int) -> None:
    """The table of `judge`."""
    run = folders.load_generator(folders.find(place), True, None)
    own = run.data.shapes or list(world.SHAPES)
    sets = {"trained on": run.data, "taught": replace(run.data, shapes=[s for s in world.SHAPES if s not in own])}
    run.model.to(device())
    print("| | trained on: as asked | valid | taught: as asked | valid |\n| --- | --- | --- | --- | --- |")
    for name in ("as it is", "with adapters"):
        if name == "with adapters":
            adapted.put_on(run.model, places, None)
        with sampling_mode(run.model, {}):
            found = [share for data in sets.values() for share in shares(run.model, data, n, seed)]
        print(f"| {name} | " + " | ".join(f"{share:.3f}" for share in found) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=("write", "prompts", "judge"))
    parser.add_argument("place", help="folder or file to write, or a finished run of text_to_image on data=shapes")
    parser.add_argument("--shapes", nargs="+", choices=world.SHAPES, default=["star"])
    parser.add_argument("--adapters", nargs="+", default=[], help="runs of lora=..., or files")
    parser.add_argument("--n", type=int, default=200, help="scenes, of `judge` of either kind")
    parser.add_argument("--size", type=int, default=32, help="of what is written, in pixels")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    asked = parser.parse_args()
    match asked.do:
        case "write":
            write(Path(asked.place), asked.shapes, asked.n, asked.size)
        case "prompts":
            prompts(Path(asked.place), asked.shapes, asked.n)
        case "judge":
            judged(asked.place, asked.adapters, asked.n, asked.seed)


if __name__ == "__main__":
    main()
