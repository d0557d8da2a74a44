"""Images of files: what a translator makes of them, any size that its net allows; what a latent comes nearest to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from atelier.core.batch import Batch
from atelier.core.errors import UserError, nearest
from atelier.core.rng import ImageRngs
from atelier.data.base import DataModule
from atelier.data.finding import image_files
from atelier.data.reading import SUFFIXES, BadImage, decode, pixels, square
from atelier.evaluation.evaluator import sample
from atelier.images.pixels import to_float, to_uint8
from atelier.models.base import Generator, Latent, Translator
from atelier.requests.studio import GRID, conditions, projection

TILE = 256  # pixels of the source a side; what is larger is made in parts where the net allows it
MAX_PIXELS = 64_000_000
LEAST = 8  # pixels a side: nets that halve twice keep more than one place, which their norms need


def case(asked: str | None, model: Generator) -> str:
    """The direction asked for, or the model's first.

    Raises:
        UserError: it has no such direction.
    """
    if asked is None or asked in model.cases:
        return model.cases[0] if asked is None else asked
    named = [name for name in model.cases if name]
    fix = f"direction={nearest(asked, named) or named[0]}" if named else "leave direction out"
    problem = (
        f"{type(model).__name__} goes {', '.join(named)}" if named else f"{type(model).__name__} has no directions"
    )
    raise UserError("direction", asked, problem, fix)


def wanted(names: list[str] | str | None, scale: int | None, model: Generator, data: DataModule) -> Batch:
    """What of a batch a request puts in place: the attributes to give, (1, A), all others are 0.

    Raises:
        UserError: no such attribute, nothing here takes attributes, or another scale than the model's.
    """
    enlarges = model.enlarges if isinstance(model, Translator) else 1
    if scale is not None and scale != enlarges:
        problem = f"{type(model).__name__} of this run makes images {enlarges} times as wide"
        raise UserError("scale", scale, problem, f"scale={enlarges}, or another run")
    if names is None:
        return {}
    if "target" not in model.needs:
        raise UserError("attributes", names, f"{type(model).__name__} takes none", "leave attributes out")
    known, chosen = data.attribute_names, [names] if isinstance(names, str) else names
    unknown = [name for name in chosen if name not in known]
    if unknown:
        fix = f"attributes={nearest(unknown[0], known) or known[0]}"
        raise UserError("attributes", unknown[0], f"the set has {', '.join(known)[:90]}", fix)
    return {"target": torch.tensor([[float(name in chosen) for name in known]])}


def files(source: str, model: Generator, verb: str, out: Path) -> list[tuple[str, Path]]:
    """Names under which results are written, and the image files: one, or all in a folder.

    Raises:
        UserError: there is none, the model makes images of nothing, or results would come among the sources.
    """
    if not isinstance(model, Translator) and verb != "project":
        fix = "do=project, or leave source out" if isinstance(model, Latent) else "leave source out"
        raise UserError("source", source, f"{type(model).__name__} makes images of nothing", fix)
    path = Path(source).expanduser()
    inside = out.resolve().is_relative_to(path.resolve()) if path.is_dir() else out.resolve() == path.parent.resolve()
    if path.exists() and inside:
        raise UserError("out", out, "results would come among the sources", "out=ANOTHER_FOLDER")
    found = [(name, path / name) for name in image_files(path)] if path.is_dir() else []
    if path.is_file():
        found = [(path.name, path)]
    if not found:
        problem = (
            f"no image file ({' '.join(SUFFIXES)}) is there" if path.exists() else "there is no such file or folder"
        )
        raise UserError("source", source, problem, "source=FILE_OR_FOLDER")
    stems = [str(Path(name).with_suffix("")) for name, _ in found]
    times = Counter([*stems, GRID.removesuffix(".png")])  # which is no name for a result
    return [
        (f"{stem if times[stem] == 1 else name}.png", path) for stem, (name, path) in zip(stems, found, strict=True)
    ]


def _opened(path: Path, data: DataModule) -> Image.Image:
    """An image file as the set's own are read, of its own size."""
    try:
        return decode(path, data.channels, getattr(data, "background", "white"), MAX_PIXELS)
    except BadImage as error:
        raise UserError("source", path, str(error), "another file, or a folder without it") from error


def projections(
    model: Latent,
    data: DataModule,
    options: dict[str, Any],
    seed: int,
    items: list[int] | None,
    found: list[tuple[str, Path]],
) -> Iterator[tuple[Tensor, Tensor]]:
    """The central square of each file, and the nearest to it that a latent was found for, (1, C, S, S) uint8."""
    for k, (_, path) in enumerate(found):
        source = pixels(square(_opened(path, data), data.image_size))[None]
        cond = conditions(model, data, k, 1, items)
        near = projection(model, to_float(source).to(model.device), cond, ImageRngs(seed, k, 1), options)
        yield source, to_uint8(near)


@dataclass
class Job:
    """One request.

    Args:
        model, data: of the run.
        case: the direction.
        given: what `wanted` gave.
        options: of `model.sample`.
        seed: of image k's noise, with k.
    """

    model: Translator
    data: DataModule
    case: str
    given: Batch
    options: dict[str, Any]
    seed: int

    def __post_init__(self) -> None:
        self.field = self.model.source_fields[self.case]
        if "target" in self.model.needs and "target" not in self.given:
            fix = f"attributes={self.data.attribute_names[0]}"
            raise UserError("attributes", None, "what are the images to get?", fix)

    def results(self, found: list[tuple[str, Path]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Source and result of each file, (1, C, H, W) uint8."""
        for k, (_, path) in enumerate(found):
            source = pixels(_opened(path, self.data))[None]
            yield source, to_uint8(self.result(to_float(source), k))

    def result(self, x: Tensor, k: int) -> Tensor:
        """What becomes of image k, (1, C, H, W) in [-1, 1] of any size; in parts if large and the net is local.

        Parts reach as far over their edges as the net sees, so they are those of the whole image.
        """
        reach, m, f = self.model.reach, self.model.multiple, self.model.enlarges
        height, width = x.shape[2:]
        if reach is None or max(height, width) <= TILE:
            return self._whole(x, k)
        step, edge = -(-TILE // m) * m, -(-reach // m) * m
        rows = []
        for top in range(0, height, step):
            row = []
            for left in range(0, width, step):
                y, x0 = max(0, top - edge), max(0, left - edge)
                part = self._whole(x[:, :, y : top + step + edge, x0 : left + step + edge], k)
                part = part[:, :, f * (top - y) :, f * (left - x0) :]
                row.append(part[:, :, : f * min(step, height - top), : f * min(step, width - left)])
            rows.append(torch.cat(row, dim=3))
        return torch.cat(rows, dim=2)

    def _whole(self, x: Tensor, k: int) -> Tensor:
        """Sides that do not divide, or are too short, are continued by their last pixels, and cut off the result."""
        height, width = x.shape[2:]
        m, f = self.model.multiple, self.model.enlarges
        right, below = (-(-max(side, LEAST) // m) * m - side for side in (width, height))
        padded = F.pad(x, (0, right, 0, below), mode="replicate")
        cond = self.model.condition(self.given | {self.field: padded}, self.case)
        image = sample(self.model, cond, ImageRngs(self.seed, k, 1), self.options)
        return image[:, :, : f * height, : f * width]
