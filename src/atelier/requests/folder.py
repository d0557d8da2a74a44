"""The folder in which the pictures of a request are written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atelier.checkpoints.store import write_text
from atelier.core.errors import UserError
from atelier.data.finding import CAPTIONS, GRID, REQUEST
from atelier.evaluation.gathering import show_progress
from atelier.images.pictures import REQUESTED, beside, framed, grid, save_gif, save_png, shrunk

COLUMNS = 8  # of the grid of a verb whose pictures have places there
WALK = "walk.gif"  # from each latent to the next
GIFS = (WALK, "forward.gif", "reverse.gif")
FRAMES, HELD = 24, 8  # of a way: so many at most, the last shown so many times as long
SHOWN = 64  # pictures in grid.png
GRID_SIDE = 256  # of a picture there that was made of a file, at most


class Made(NamedTuple):
    """Pictures in order, (n, C, H, W) uint8, what they were made of, and the names under which they are written.

    `files`: the file that each was made of. `frames`: (T, n or 2 n, C, H, W) uint8 of each GIF by the name of its file.
    `captions`: the text that each was made by. `asked`: what each was to show, by the names of the set.
    """

    images: Tensor
    sources: Tensor | None = None
    names: list[str] | None = None
    files: list[Path] | None = None
    frames: Mapping[str, Tensor] = {}
    captions: list[str] | None = None
    asked: list[str] | None = None


class Folder:
    """`000000.png ...`, `grid.png` of the first 64, `request.yaml`, and the GIFs of an interpolation or of paths.

    Where pictures were made by texts, `captions.tsv` has them, so that the folder is a set with captions
    (data=captioned). Each picture has its own request, which makes it alone, as a text within it (`sample.py
    like=PICTURE`), and what it was to show, where that has a name.

    Args:
        path: place, made if need be; the pictures of an earlier request there are replaced.
        request: options that were asked for; `do`, `n`, `first`, `source`, and `label` where there is one, among it.

    Raises:
        UserError: it cannot be written.
    """

    def __init__(self, path: str | Path, request: dict[str, Any]) -> None:
        self.path, self.request = Path(path), request
        self.number: int = request["first"]  # of the next picture
        self.first: list[Tensor] = []
        self.frames: dict[str, list[Tensor]] = {}
        self.captions: list[str] = []  # lines of the table
        self.asked: list[str] = []  # below the pictures of the grid
        self.before = _numbers(self.path / REQUEST)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / REQUEST).touch()
        except OSError as error:
            raise UserError("out", path, f"it cannot be written ({error.strerror})", "out=A_FOLDER_OF_YOURS") from error

    def add(self, made: Made) -> None:
        """Write the next pictures; the grid shows what they were made of beside them."""
        images, sources, names, files, frames, captions, asked = made
        for k, image in enumerate(images):
            path = self.path / (f"{self.number:06d}.png" if names is None else names[k])
            path.parent.mkdir(parents=True, exist_ok=True)
            file, shows = (None if each is None else each[k] for each in (files, asked))
            save_png(image, path, texts_of(self.request, self.number, file, shows))
            if captions is not None:
                self.captions.append(f"{path.name}\t{' '.join(captions[k].split())}\n")
            self.number += 1
        if sum(map(len, self.first)) < SHOWN:
            shown = images.cpu() if sources is None else beside([sources, images])
            self.first.append(shown if names is None else shrunk(shown, GRID_SIDE))
            self.kinds = 1 if sources is None else 2
            self.asked += [word for one in asked or [] for word in [""] * (self.kinds - 1) + [one]]
            for name, part in frames.items():
                self.frames.setdefault(name, []).append(part.cpu())
        show_progress("images", self._written, self.request["n"])

    @property
    def _written(self) -> int:
        return self.number - self.request["first"]

    def finish(self) -> None:
        """Write the grid and the request, and remove what an earlier, longer request left."""
        for k in set(self.before) - set(range(self.request["first"], self.number)):
            (self.path / f"{k:06d}.png").unlink(missing_ok=True)
        if self.captions:
            write_text(self.path / CAPTIONS, "".join(self.captions))
        elif self.before:
            (self.path / CAPTIONS).unlink(missing_ok=True)
        sizes = {images.shape[2:] for images in self.first}
        if len(sizes) > 1:  # of files
            self.first = [framed(images, max(map(max, sizes))) for images in self.first]
        shown = torch.cat(self.first)[:SHOWN]
        labels = self.request.get("label")
        group = self.kinds * (len(labels) if isinstance(labels, list) else 1)  # a column for each label
        square = group * math.ceil(math.sqrt(len(shown)) / group)
        columns = square if self.request["do"] == "sample" else COLUMNS
        save_png(grid(shown, columns, words=self.asked[:SHOWN]), self.path / GRID)
        for name in GIFS:
            (self.path / name).unlink(missing_ok=True)
        if self.request["do"] == "interpolate":
            save_gif(torch.stack([grid(picture[None]) for picture in shown]), self.path / WALK)
        for name, parts in self.frames.items():
            way = [grid(images, COLUMNS) for images in torch.cat(parts, dim=1)[:, :SHOWN]]
            save_gif(torch.stack(way + way[-1:] * HELD), self.path / name)
        write_text(self.path / REQUEST, "".join(f"{k}: {json.dumps(v)}\n" for k, v in self.request.items()))
        n, films = self._written, [WALK] * (self.request["do"] == "interpolate") + list(self.frames)
        print(f"{n} image{'s' * (n != 1)} and {', '.join([GRID, *films])} in {self.path}", flush=True)


def texts_of(
    request: dict[str, Any], number: int, file: Path | None = None, asked: str | None = None
) -> dict[str, str]:
    """What a picture says of itself: as `REQUESTED` all that makes it again, alone, as JSON.

    Args:
        request: options that were asked for, `run` and `seed` among them.
        number: number of the picture.
        file: file that it was made of, if any.
        asked: name of what it was to show, if any.
    """
    own = request | {"first": number, "n": 1} | ({} if file is None else {"source": str(file)})
    texts = {REQUESTED: json.dumps(own), "run": str(own["run"]), "seed": str(own["seed"])}
    return texts if asked is None else texts | {"asked": asked}


def _numbers(path: Path) -> range:
    """The numbers of the pictures that an earlier request.yaml asked for; none where there is none."""
    lines = path.read_text().splitlines() if path.is_file() else []
    if any(line.startswith("source: ") and line != "source: null" for line in lines):
        return range(0)
    first, n = (next((int(line[len(k) :]) for line in lines if line.startswith(k)), 0) for k in ("first: ", "n: "))
    return range(first, first + n)
