"""What a trained model can be asked for, and how the pictures are written."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atelier.checkpoints.store import write_text
from atelier.core.batch import Batch
from atelier.core.errors import UserError, nearest
from atelier.core.rng import ImageRngs
from atelier.data.base import DataModule
from atelier.evaluation.evaluator import sample
from atelier.images.pictures import beside, framed, grid, save_gif, save_png, shrunk
from atelier.images.pixels import to_uint8
from atelier.losses.perceptual import Pyramid
from atelier.models.base import Autoencoder, Cond, Generator, Latent, Styled, Translator

INTERPOLATED = 8  # pictures from one latent to the next, and along one coordinate
REACH = 3.0  # of a coordinate; deviations, where the prior is standard normal
REQUEST = "request.yaml"
GRID = "grid.png"
WALK = "walk.gif"  # from each latent to the next
SHOWN = 64  # pictures in grid.png
GRID_SIDE = 256  # of a picture there that was made of a file, at most
TRUNCATED = 1.5  # psi at the end of a row
PROJECTION_STEPS, PROJECTION_LR = 300, 0.1  # of the search for a latent


def verb(asked: str | None, model: Generator) -> str:
    """What to do: as asked, or `reconstruct` for autoencoders and else `sample`.

    Raises:
        UserError: the model cannot do that.
    """
    able = list(_makers(model))
    if asked is None:
        return "reconstruct" if "reconstruct" in able else "sample"
    if asked not in able:
        fix = f"do={nearest(asked, able) or able[0]}"
        raise UserError("do", asked, f"{type(model).__name__} can {', '.join(able)}", fix)
    return asked


def maker(verb: str, model: Generator) -> Callable:
    """The method whose signature says which options a verb takes."""
    return _makers(model)[verb]


def _makers(model: Generator) -> dict[str, Callable]:
    makers: dict[str, Callable] = {"sample": model.sample}
    if isinstance(model, Latent):
        makers |= {"interpolate": model.render, "traverse": model.render, "project": model.render}
    if isinstance(model, Styled):
        makers |= {"mix": model.render, "truncate": model.paint}
    if isinstance(model, Autoencoder):
        makers |= {"reconstruct": model.decode, "resample": model.decode}
    return makers


def items(verb: str, model: Generator, data: DataModule, label: int | None, files: bool) -> list[int] | None:
    """The test images whose condition the pictures take in turn: those with this label, or None for all in order.

    Args:
        files: the request is about image files, whose class only the user knows.

    Raises:
        UserError: nothing here follows a label, no test image has it, or it is not told and must be.
    """
    if label is None:
        if verb == "project" and files and "label" in model.needs:
            raise UserError("label", None, "of which class are the images?", "label=0")
        return None
    if verb in ("reconstruct", "resample") or (verb == "project" and not files):
        raise UserError("label", label, f"do={verb} is of the test images in order", "do=sample")
    if "label" not in model.needs:
        raise UserError("label", label, f"{type(model).__name__} was trained without labels", "leave label out")
    if label >= data.n_classes:
        problem = f"the {data.n_classes} labels are 0 to {data.n_classes - 1}"
        raise UserError("label", label, problem, f"label={data.n_classes - 1}")
    order = torch.tensor(data.order("test"))
    labels = data.split("test").labels[order]
    if label not in labels:
        raise UserError("label", label, f"none of {len(order)} test images has it", f"label={int(labels[0])}")
    return order[labels == label].tolist()


def pictures(
    verb: str,
    model: Generator,
    data: DataModule,
    options: dict[str, Any],
    seed: int,
    first: int,
    n: int,
    items: list[int] | None,
    case: str,
    given: Batch,
) -> tuple[Tensor, Tensor | None]:
    """Pictures first .. first + n - 1 of a request, (n, C, H, W) uint8, the same whatever n; a translator's sources.

    `given` takes the place of what the test images say.
    """
    if verb in ("reconstruct", "resample"):
        return to_uint8(_beside(model, data, options, seed if verb == "resample" else None, first, n)), None
    if verb == "project":
        return to_uint8(_projected(model, data, options, seed, first, n)), None
    makers = {"interpolate": _between, "traverse": _along, "mix": _mixed, "truncate": _drawn_in}
    if verb in makers:
        return to_uint8(makers[verb](model, data, options, seed, first, n, items)), None
    cond = conditions(model, data, first, n, items, case, given)
    source = to_uint8(cond[model.source_fields[case]]) if isinstance(model, Translator) else None
    return to_uint8(sample(model, cond, ImageRngs(seed, first, n), options)), source


def _beside(
    model: Autoencoder, data: DataModule, options: dict[str, Any], seed: int | None, first: int, n: int
) -> Tensor:
    """Test images, each followed by what the model makes of it: of the mode, or with a seed of a posterior draw."""
    base, skipped = divmod(first, 2)
    count = (skipped + n + 1) // 2
    x = data.test_batch(base, count)["image"].to(model.device)
    z = model.encode(x, None if seed is None else ImageRngs(seed, base, count))
    return torch.stack([x, model.decode(z, **options)], dim=1).flatten(0, 1)[skipped:][:n]


def _between(
    model: Latent, data: DataModule, options: dict[str, Any], seed: int, first: int, n: int, items: list[int] | None
) -> Tensor:
    """Row r goes from latent r to latent r + 1, all told of image r.

    An autoencoder's latents are those of the test images, and the way is straight; else they are draws of the prior,
    and the way is the great circle, since independent normal latents are nearly orthogonal.
    """
    numbers = torch.arange(first, first + n)
    rows = numbers // INTERPOLATED
    base, count = int(rows[0]), int(rows[-1] - rows[0]) + 2
    cond = conditions(model, data, base, count, items)
    ends = _latents(model, data, seed, base, count, cond)
    place = (rows - base).to(ends.device)
    part = (numbers % INTERPOLATED / (INTERPOLATED - 1)).to(ends).view(-1, *[1] * (ends.ndim - 1))
    if isinstance(model, Autoencoder):
        z = (1 - part) * ends[place] + part * ends[place + 1]
    else:
        z = torch.cos(part * torch.pi / 2) * ends[place] + torch.sin(part * torch.pi / 2) * ends[place + 1]
    return model.render(z, {k: v[place] for k, v in cond.items()}, ImageRngs(seed, first, n), **options)


def _along(
    model: Latent, data: DataModule, options: dict[str, Any], seed: int, first: int, n: int, items: list[int] | None
) -> Tensor:
    """Row r is latent 0 with its coordinate r set to -REACH .. REACH, all other coordinates as they are."""
    numbers = torch.arange(first, first + n)
    cond = conditions(model, data, 0, 1, items)
    start = _latents(model, data, seed, 0, 1, cond)
    z = start.flatten(1).repeat(n, 1)
    steps = torch.linspace(-REACH, REACH, INTERPOLATED)[numbers % INTERPOLATED].to(z)
    coordinates = (numbers // INTERPOLATED % z.shape[1]).to(z.device)
    z = z.scatter(1, coordinates[:, None], steps[:, None]).unflatten(1, start.shape[1:])
    cond = {name: value.expand(n, *value.shape[1:]) for name, value in cond.items()}
    return model.render(z, cond, ImageRngs(seed, first, n), **options)


def _drawn_in(
    model: Styled, data: DataModule, options: dict[str, Any], seed: int, first: int, n: int, items: list[int] | None
) -> Tensor:
    """Row r is image r, its style moved from the mean of all styles through its own to TRUNCATED times as far."""
    numbers = torch.arange(first, first + n)
    rows = numbers // INTERPOLATED
    base, count = int(rows[0]), int(rows[-1] - rows[0]) + 1
    cond = conditions(model, data, base, count, items)
    z = model.draw(ImageRngs(seed, base, count), cond)
    place = (rows - base).to(z.device)
    psi = (TRUNCATED * (numbers % INTERPOLATED) / (INTERPOLATED - 1)).to(z)[:, None, None]
    styles = torch.lerp(model.styles(z, cond, 0.0)[place], model.styles(z, cond, 1.0)[place], psi)  # (n, L, W)
    return model.paint(styles, ImageRngs.of(seed, rows.tolist()))


def _mixed(
    model: Styled, data: DataModule, options: dict[str, Any], seed: int, first: int, n: int, items: list[int] | None
) -> Tensor:
    """The picture in row r > 0 and column c > 0 has the coarse styles of the one at its left, the fine ones of the one

    on top of its column (Karras et al. 2019, StyleGAN, figure 3). Coarse are the layers up to half of the image's size.
    """
    numbers = torch.arange(first, first + n)
    rows, columns = numbers // INTERPOLATED, numbers % INTERPOLATED
    left = torch.where(rows > 0, INTERPOLATED - 1 + rows, columns)
    top = torch.where(columns > 0, columns, left)
    last = int(max(left.max(), top.max())) + 1
    cond = conditions(model, data, 0, last, items)
    styles = model.styles(model.draw(ImageRngs(seed, 0, last), cond), cond, **options)
    left, top = left.to(styles.device), top.to(styles.device)
    cut = styles.shape[1] // 2
    mixed = torch.cat([styles[left, :cut], styles[top, cut:]], dim=1)  # (n, L, W)
    return model.paint(mixed, ImageRngs(seed, first, n))


def _projected(model: Latent, data: DataModule, options: dict[str, Any], seed: int, first: int, n: int) -> Tensor:
    """Test images, each followed by the nearest that a latent was found for."""
    base, skipped = divmod(first, 2)
    count = (skipped + n + 1) // 2
    batch = data.test_batch(base, count)
    x, cond = batch["image"].to(model.device), model.condition(batch, model.cases[0])
    found = projection(model, x, cond, ImageRngs(seed, base, count), options)
    return torch.stack([x, found], dim=1).flatten(0, 1)[skipped:][:n]


def projection(model: Latent, x: Tensor, cond: Cond, rngs: ImageRngs, options: dict[str, Any]) -> Tensor:
    """Images (B, C, H, W) of the latents that come nearest to images x, found by descent from draws of the prior.

    What is brought down is the mean difference of pixels and of a pyramid of edges; a latent is held to its size.
    """
    with torch.inference_mode(False), torch.enable_grad():
        distance = Pyramid(levels=3).to(x.device)
        x, cond = x.clone(), {name: value.clone() for name, value in cond.items()}
        start = model.draw(rngs, cond).clone()
        z, noise = start.clone().requires_grad_(), rngs.again()
        optimizer = torch.optim.Adam([z], lr=PROJECTION_LR)
        size = start.flatten(1).norm(dim=1)
        best, least = start, torch.full((len(x),), torch.inf, device=x.device)
        for step in range(PROJECTION_STEPS):
            for group in optimizer.param_groups:
                group["lr"] = PROJECTION_LR * (1 - step / PROJECTION_STEPS)
            found = model.render(z, cond, noise.again(), **options)
            far = (found - x).abs().flatten(1).mean(1) + distance(found, x)
            better = (far < least).detach()
            best = torch.where(better.view(-1, *[1] * (z.ndim - 1)), z.detach(), best)
            least = torch.where(better, far.detach(), least)
            held = (z.flatten(1).norm(dim=1) / size - 1).clamp(min=0).square()
            optimizer.zero_grad()
            (far + held).sum().backward()
            optimizer.step()
        return model.render(best, cond, noise.again(), **options).detach()


def _latents(model: Latent, data: DataModule, seed: int, first: int, n: int, cond: Cond) -> Tensor:
    """Latents of test images where the model encodes, else draws of its prior."""
    if isinstance(model, Autoencoder):
        return model.encode(data.test_batch(first, n)["image"].to(model.device))
    return model.draw(ImageRngs(seed, first, n), cond)


def conditions(
    model: Generator,
    data: DataModule,
    first: int,
    n: int,
    items: list[int] | None,
    case: str | None = None,
    given: Batch | None = None,
) -> Cond:
    """Picture k takes the condition of test image k, or of the k-th of `items`, which come round again.

    Fields `given` (1, ...) stand in place of the test images'.
    """
    if items is None:
        batch = data.test_batch(first, n)
    else:
        batch = data.split("test").read([items[k % len(items)] for k in range(first, first + n)], None)
    batch |= {name: value.expand(n, -1) for name, value in (given or {}).items()}
    return model.condition(batch, model.cases[0] if case is None else case)


class Folder:
    """`000000.png ...`, `grid.png` of the first 64, `request.yaml`, and for an interpolation `walk.gif`.

    Args:
        path: made if need be; the pictures of an earlier request there are replaced.
        request: what was asked for.

    Raises:
        UserError: it cannot be written.
    """

    def __init__(self, path: str | Path, request: dict[str, Any]) -> None:
        self.path, self.request, self.n = Path(path), request, 0
        self.first: list[Tensor] = []
        self.before = _length(self.path / REQUEST)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / REQUEST).touch()
        except OSError as error:
            raise UserError("out", path, f"it cannot be written ({error.strerror})", "out=A_FOLDER_OF_YOURS") from error

    def add(self, images: Tensor, total: int, sources: Tensor | None = None, names: list[str] | None = None) -> None:
        """Write the next pictures, (n, C, H, W) uint8; the grid shows what they were made of beside them."""
        for k, image in enumerate(images):
            path = self.path / (f"{self.n:06d}.png" if names is None else names[k])
            path.parent.mkdir(parents=True, exist_ok=True)
            save_png(image, path)
            self.n += 1
        if sum(map(len, self.first)) < SHOWN:
            shown = images.cpu() if sources is None else beside([sources, images])
            self.first.append(shown if names is None else shrunk(shown, GRID_SIDE))
            self.kinds = 1 if sources is None else 2
        told("images", self.n, total)

    def finish(self) -> None:
        for k in range(self.n, self.before):  # of an earlier, longer request
            (self.path / f"{k:06d}.png").unlink(missing_ok=True)
        sizes = {images.shape[2:] for images in self.first}
        if len(sizes) > 1:  # of files
            self.first = [framed(images, max(map(max, sizes))) for images in self.first]
        shown = torch.cat(self.first)[:SHOWN]
        square = self.kinds * math.ceil(math.sqrt(len(shown)) / self.kinds)
        save_png(grid(shown, square if self.request["do"] == "sample" else INTERPOLATED), self.path / GRID)
        (self.path / WALK).unlink(missing_ok=True)
        if self.request["do"] == "interpolate":
            save_gif(torch.stack([grid(picture[None]) for picture in shown]), self.path / WALK)
        write_text(self.path / REQUEST, "".join(f"{k}: {json.dumps(v)}\n" for k, v in self.request.items()))
        print(f"{self.n} images and grid.png in {self.path}", flush=True)


def _length(path: Path) -> int:
    """How many numbered pictures an earlier request.yaml asked for; 0 where there is none."""
    lines = path.read_text().splitlines() if path.is_file() else []
    if any(line.startswith("source: ") and line != "source: null" for line in lines):
        return 0
    return next((int(line[3:]) for line in lines if line.startswith("n: ")), 0)


def told(what: str, done: int, n: int) -> None:
    """Progress on one line of a terminal."""
    if sys.stderr.isatty():
        print(f"\r{what}: {done:,} of {n:,}", end="\n" if done >= n else "", file=sys.stderr, flush=True)
