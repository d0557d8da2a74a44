"""What a trained model can be asked for, and how the pictures are written."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atelier.callbacks.checkpoint import write_text
from atelier.callbacks.judging import sample
from atelier.data.base import DataModule
from atelier.errors import UserError, nearest
from atelier.metrics.pictures import grid, save_png, to_uint8
from atelier.models.base import Autoencoder, Cond, Generator, Latent
from atelier.rng import ImageRngs

INTERPOLATED = 8  # pictures from one latent to the next
SEARCHED = 4096  # test images looked through for a label


def verb(asked: str | None, model: Generator) -> str:
    """What to do: as asked, or `reconstruct` for autoencoders that draw no latents of their own and else `sample`.

    Raises:
        UserError: the model cannot do that.
    """
    able = ["sample"] if isinstance(model, Generator) else []
    able += ["interpolate"] if isinstance(model, Latent) else []
    able += ["reconstruct"] if isinstance(model, Autoencoder) else []
    if asked is None:
        return "reconstruct" if isinstance(model, Autoencoder) else "sample"
    if asked not in able:
        fix = f"do={nearest(asked, able) or able[0]}"
        raise UserError("do", asked, f"{type(model).__name__} can {', '.join(able)}", fix)
    return asked


def pictures(
    verb: str,
    model: Generator,
    data: DataModule,
    options: dict[str, Any],
    seed: int,
    first: int,
    n: int,
    label: int | None,
) -> Tensor:
    """Pictures first .. first + n - 1 of a request, (n, C, H, W) uint8."""
    rngs = ImageRngs(seed, first, n)
    if verb == "reconstruct":
        x = data.test_batch(first // 2, (n + 1) // 2)["image"].to(model.device)
        return to_uint8(torch.stack([x, model.decode(model.encode(x))], dim=1).flatten(0, 1)[:n])
    cond = conditions(model, data, first, n, label)
    if verb == "interpolate":
        return to_uint8(_between(model, cond, seed, first, n))
    return to_uint8(sample(model, cond, rngs, options))


def _between(model: Latent, cond: Cond, seed: int, first: int, n: int) -> Tensor:
    """Rows of INTERPOLATED pictures on the great circle between two latents; the condition is that of the row's first."""
    rows = [k // INTERPOLATED for k in range(first, first + n)]
    part = torch.tensor([k % INTERPOLATED / (INTERPOLATED - 1) for k in range(first, first + n)])
    base, count = rows[0], rows[-1] - rows[0] + 2
    ends = model.draw(ImageRngs(seed, base, count), cond)
    place = torch.tensor(rows, device=ends.device) - base
    a, b = ends[place], ends[place + 1]
    part = part.to(ends).view(-1, *[1] * (ends.ndim - 1))
    angle = part * torch.pi / 2  # independent normal latents are nearly orthogonal
    z = torch.cos(angle) * a + torch.sin(angle) * b
    starts = torch.tensor([max(r * INTERPOLATED - first, 0) for r in rows])
    return model.render(z, {name: value[starts.to(value.device)] for name, value in cond.items()}, ImageRngs(seed, first, n))


def conditions(model: Generator, data: DataModule, first: int, n: int, label: int | None) -> Cond:
    """Image k takes the condition of test image k, or of the k-th test image with this label.

    Raises:
        UserError: the model takes no label, or no test image has it.
    """
    if label is None:
        return model.condition(data.test_batch(first, n), model.cases[0])
    if "label" not in model.needs:
        raise UserError("label", label, f"{type(model).__name__} was trained without labels", "leave label out")
    size = min(SEARCHED, len(data.split("test")))
    labels = data.split("test").read(list(range(size)), None)["label"]
    having = (labels == label).nonzero().flatten().tolist()
    if not having:
        seen = labels.unique()
        problem = f"labels are {int(seen.min())} to {int(seen.max())}"
        raise UserError("label", label, problem, f"label={int(seen.min())}")
    chosen = [having[k % len(having)] for k in range(first, first + n)]
    return model.condition(data.split("test").read(chosen, None), model.cases[0])


class Folder:
    """`000000.png ...`, `grid.png` of the first 64, and `request.yaml`.

    Args:
        path: made if need be.
        request: what was asked for.

    Raises:
        UserError: it cannot be written.
    """

    def __init__(self, path: str | Path, request: dict[str, Any]) -> None:
        self.path, self.request, self.n = Path(path), request, 0
        self.first: list[Tensor] = []
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError("out", path, f"it cannot be written ({error.strerror})", "out=A_FOLDER_OF_YOURS") from error

    def add(self, images: Tensor, total: int) -> None:
        """Write the next pictures, (n, C, H, W) uint8."""
        for image in images:
            save_png(image, self.path / f"{self.n:06d}.png")
            self.n += 1
        if self.n <= 64 or not self.first:
            self.first.append(images.cpu())
        told("images", self.n, total)

    def finish(self) -> None:
        save_png(grid(torch.cat(self.first)[:64]), self.path / "grid.png")
        write_text(self.path / "request.yaml", "".join(f"{k}: {json.dumps(v)}\n" for k, v in self.request.items()))
        print(f"{self.n} images and grid.png in {self.path}", flush=True)


def told(what: str, done: int, n: int) -> None:
    """Progress on one line of a terminal."""
    if sys.stderr.isatty():
        print(f"\r{what}: {done:,} of {n:,}", end="\n" if done >= n else "", file=sys.stderr, flush=True)
