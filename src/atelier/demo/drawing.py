"""A request of the page at work: pictures as they come, their requests within, and a line about it."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from atelier.cli.messages import user_error
from atelier.core.errors import UserError
from atelier.data.reading import BadImage, decode, unwarned
from atelier.demo import controls
from atelier.images.pictures import beside, grid, save_png
from atelier.requests.files import MAX_PIXELS
from atelier.requests.folder import COLUMNS, Made, texts_of
from atelier.runs import asking, build, folders
from atelier.runs.asking import ReadyRequest, ReadyRun

KEPT = 2  # runs in memory
LARGEST = 32 * 2**20  # bytes of an upload
EVERY = 0.2  # seconds between two words about the progress
Tell = Callable[[int, int, str], None]  # called with pictures that are done, how many there will be, and a word


class Stopped(Exception):
    """Somebody has pressed Stop."""


@dataclass
class Shown:
    """What the page shows now.

    Args:
        n: number of pictures, sources aside.
        line: one line: what was made, or the mistake.
        pictures: file and caption of each picture, by run.
        way: images on their way from noise, (H, W, 3) uint8; None: none are.
    """

    n: int = 0
    line: str = ""
    pictures: list[list[tuple[str, str]]] = field(default_factory=lambda: [[], []])
    way: np.ndarray | None = None


class Runs:
    """The run folders that the page may open; the `KEPT` used last stay in memory."""

    def __init__(self, first: str) -> None:
        self.first = str(folders.shorter(folders.find(first)))
        found = [str(folder) for folder in reversed(folders.all_runs()) if folders.has_checkpoint(folder)]
        self.names = list(dict.fromkeys([self.first, *found]))
        self._open: dict[str, ReadyRun] = {}

    def __getitem__(self, name: str) -> ReadyRun:
        """A run, loaded where it is not yet.

        Raises:
            UserError: it is none of those that were found, or cannot be loaded.
        """
        if name not in self.names:
            raise UserError("run", name, "it is none of the runs that were found", f"run={self.first}")
        run = self._open.pop(name, None) or ReadyRun(build.plain(asking.config({"run": name})))
        self._open[name] = run
        while len(self._open) > KEPT:
            del self._open[next(iter(self._open))]
        return run


def uploaded(content: bytes) -> Image.Image:
    """The image in an uploaded file, upright, RGB.

    Raises:
        UserError: it is no image, or too large.
    """
    if len(content) > LARGEST:
        problem = f"{len(content) / 2**20:.0f} MB, the most is {LARGEST / 2**20:.0f}"
        raise UserError("source", "upload", problem, "a smaller file")
    try:
        with unwarned():
            return decode(BytesIO(content), 3, "white", MAX_PIXELS)
    except BadImage as error:
        raise UserError("source", "upload", str(error), "another file") from error


def painted(layer: np.ndarray | None, sides: tuple[int, int]) -> Image.Image:
    """What was painted, (H, W, 4) uint8, as a mask of these sides: white where it is not transparent.

    Raises:
        UserError: nothing was.
    """
    if layer is None or not layer[..., 3].any():
        raise UserError("mask", controls.DRAWN, "nothing is painted", "paint what is to be filled, or mask=center")
    return Image.fromarray(255 * (layer[..., 3] > 0).astype(np.uint8)).resize(sides, Image.Resampling.NEAREST)


def line_of(error: Exception) -> str:
    """The line of a mistake; what is none is raised again."""
    known = user_error(error)
    if known is None:
        raise error
    return known.line()


@dataclass
class Asking:
    """One press of the button.

    Args:
        names: one run, or two that are asked for what the controls of the first say.
        runs: all runs.
        do: verb.
        values: value by the key of a control.
        source: uploaded image; None: test images.
        layer: painting over it, (H, W, 4) uint8.
        tell: told of the progress.
        stopped: whether somebody has pressed Stop.
    """

    names: list[str]
    runs: Runs
    do: str
    values: dict[str, Any]
    source: Image.Image | None
    layer: np.ndarray | None
    tell: Tell
    stopped: Callable[[], bool]

    def drawn(self) -> Iterator[Shown]:
        """What is to be seen, again and again; a mistake, and the end that Stop makes, are a line of it."""
        shown, begun = Shown(), time.monotonic()
        with tempfile.TemporaryDirectory(prefix="request-") as place:
            try:
                for k, name in enumerate(self.names):
                    yield from self._of_run(self.runs[name], shown, k, Path(place) / str(k))
                shown.line = f"{shown.n} picture{'s' * (shown.n != 1)} in {time.monotonic() - begun:.1f} s"
            except Stopped:
                shown.line = f"stopped after {time.monotonic() - begun:.1f} s"
            except Exception as error:
                shown.line = line_of(error)
            yield shown

    def _of_run(self, run: ReadyRun, shown: Shown, k: int, place: Path) -> Iterator[Shown]:
        place.mkdir()
        asked = self._asked(run, place)
        n, first = asked.words["n"], asked.words["first"]
        begun, said, before = time.monotonic(), 0.0, shown.n

        def called(*_: Any) -> None:
            nonlocal said
            if self.stopped():
                raise Stopped
            if (now := time.monotonic()) > said + EVERY:
                said, done = now, shown.n - before
                left = f"about {(now - begun) / done * (n - done):.0f} s left" if done else "the first ones"
                self.tell(done, n, left)

        with watched(run.model, called):
            if self.do == "paths":
                yield from self._on_their_way(asked, shown, k, place)
            for made in [] if self.do == "paths" else asked.pictures():
                shown.pictures[k] += saved(made, asked, first + shown.n - before, place)
                shown.n += len(made.images)
                yield shown

    def _asked(self, run: ReadyRun, place: Path) -> ReadyRequest:
        seen, takes = (
            {control.key for control in controls.controls(one) if self.do in control.verbs}
            for one in (self.runs[self.names[0]], run)
        )  # a control that is hidden has a value too, which nobody has set
        given = controls.request(run, self.do, {key: value for key, value in self.values.items() if key in seen})
        sides = (run.loaded.data.image_size,) * 2
        if self.source is not None and "source" in seen & takes:
            given["source"], sides = place / "upload.png", self.source.size
            self.source.save(given["source"])
        if given.get("mask") == controls.DRAWN:
            given["mask"] = place / "mask.png"
            painted(self.layer, sides).save(given["mask"])
        return run.asked(asking.config(given | {"run": run.loaded.folder}))

    def _on_their_way(self, asked: ReadyRequest, shown: Shown, k: int, place: Path) -> Iterator[Shown]:
        """The frames of do=paths while they are made, a batch after another."""
        words = asked.words
        for first in range(words["first"], words["first"] + words["n"], words["batch_size"]):
            n = min(words["batch_size"], words["first"] + words["n"] - first)
            for pair in asked.working(asked.request.denoising(first, n)):
                shown.way = grid(beside(list(pair)), COLUMNS).permute(1, 2, 0).numpy()
                yield shown
            shown.pictures[k] += saved(Made(pair[0]), asked, first, place)
            shown.n += n
            yield shown


@contextlib.contextmanager
def watched(net: nn.Module, called: Callable[..., None]) -> Iterator[None]:
    """Inside, each call of a layer calls this first, which may raise to end the work."""
    handles = [layer.register_forward_pre_hook(called) for layer in net.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def saved(made: Made, asked: ReadyRequest, first: int, place: Path) -> list[tuple[str, str]]:
    """File and caption of each picture, which has its request within; before it the source, where it has one.

    An upload and a painted mask are named there, not kept: `sample.py like=PICTURE` needs source=FILE and mask=FILE.
    """
    found = []
    for k, image in enumerate(made.images):
        path = place / f"{first + k:06d}.png"
        file = None if made.files is None else Path(made.files[k].name)
        words = asked.words | ({} if asked.words["mask"] is None else {"mask": Path(asked.words["mask"]).name})
        shows = None if made.asked is None else made.asked[k]
        save_png(image, path, texts_of(words, first + k, file, shows))
        if made.sources is not None:
            beside_it = place / f"{first + k:06d}_source.png"
            save_png(made.sources[k], beside_it)
            found.append((str(beside_it), "source"))
        found.append((str(path), f"{first + k}" if shows is None else shows))
    return found
