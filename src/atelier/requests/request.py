"""What a trained model is asked for: one object, checked, with a method for each verb of sample.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from atelier.core.batch import Batch, rows_of
from atelier.core.errors import UserError
from atelier.core.rng import ImageRngs
from atelier.data.base import DataModule
from atelier.data.reading import pixels, square
from atelier.evaluation.evaluator import sample
from atelier.images.pictures import beside
from atelier.images.pixels import to_float, to_uint8
from atelier.models.base import (
    Autoencoder,
    Cond,
    Generator,
    SeesAttributes,
)
from atelier.models.diffusion_model import UNGUIDED, UNKNOWN, DiffusionModel
from atelier.requests import attention, checks, files, latents, masks
from atelier.requests.folder import COLUMNS, FRAMES, Made

STRENGTH = 0.5
OFFERED = 256  # test images with a label, which say what they have alike


@dataclass
class Request:
    """Pictures wanted of a trained model; picture k is the same however many are made at once.

    Methods named after verbs make pictures first .. first + n - 1. They run inside `models.base.sampling_mode`.

    Args:
        model: model in eval mode, on its device.
        data: set whose test images give conditions, sources and what is reconstructed.
        options: keyword arguments of the model's method (`checks.verbs`), beside its defaults.
        seed: seed of image k's noise, with k.
        items: test images whose condition the pictures take in turn; None: all of them in order.
        case: direction of a translator, one of `model.cases`.
        given: Batch fields that stand in place of the test images', one row or several that come in turn.
        signs: 1, -1 or 0 for each attribute: whether images get it, lose it, or keep it as it is (`SetNames.signs`);
            None: attributes are as `data` says.
        strength: time in (0, 1] that `edit` noises its source to.
        mask: place that `inpaint` fills: a word of `masks.WORDS`, a file or a folder.
        resamplings: number of times that `inpaint` takes each step.
        unknown: whether nothing is known of the sources, so that neither they nor the results have a condition.
        unread: files of the sources that could not be read, so far.
    """

    model: Generator
    data: DataModule
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    items: list[int] | None = None
    case: str = ""
    given: Batch = field(default_factory=dict)
    signs: list[int] | None = None
    strength: float = STRENGTH
    mask: str = "center"
    resamplings: int = 1
    unknown: bool = False
    unread: list[Path] = field(default_factory=list)

    @classmethod
    def of(cls, model: Generator, data: DataModule, options: dict[str, Any], words: Mapping[str, Any]) -> Request:
        """The request that the keys of conf/sample.yaml describe, `do` being a verb of this model.

        Raises:
            UserError: the model or the set has not what is asked for.
        """
        items = checks.items(words["do"], model, data, words["label"], words["source"] is not None)
        case = checks.case(words["direction"], model)
        checks.refuse_scale(words["scale_factor"], model)
        texts = checks.texts(words, model)
        signs = checks.signs(words["do"], model, data, words["attributes"], words["source"] is not None)
        checks.refuse_words(words, model)
        if words["mask"] == masks.OBJECT and (words["source"] is not None or "mask" not in data.provides):
            problem = "files have no mask of their own" if words["source"] is not None else "the set has no masks"
            raise UserError("mask", masks.OBJECT, problem, f"mask=FILE_OR_FOLDER, or {', '.join(masks.WORDS)}")
        known = items is not None or signs is not None or bool(texts.keys() - {"negative"}) or bool(model.source_fields)
        unknown = words["source"] is not None and isinstance(model, DiffusionModel) and not known
        for name in ("guidance", "guider"):
            if unknown and name in options:
                fixes = {"text": "prompt=TEXT", "label": "label=0", "attributes": "attributes=NAMES"}
                fix = next((fixes[one] for one in fixes if one in model.needs), "label=0")
                problem = "guidance needs something to lead to"
                raise UserError(fix.partition("=")[0], None, problem, f"{fix}, or leave {name} out")
        own = {name: words[name] for name in ("strength", "mask", "resamplings") if words[name] is not None}
        return replace(cls(model, data, options, words["seed"], items, case, texts, signs), **own, unknown=unknown)

    def pictures(self, verb: str, first: int, n: int, batch_size: int) -> Iterator[Made]:
        """The pictures first .. first + n - 1 of a verb, so many at a time."""
        for start in range(first, first + n, batch_size):
            yield getattr(self, verb)(start, min(batch_size, first + n - start))

    def conditions(self, first: int, n: int) -> Cond:
        """Picture k takes the condition of test image k, or of the k-th of `items`, which come round again."""
        return self.model.condition(self._asked(first, n), self.case)

    def _asked(self, first: int, n: int, own: Batch | None = None) -> Batch:
        """The test images that pictures first .. first + n - 1 are asked by, with what was given in place of theirs.

        `own`: test images that the pictures are made of; a label that is asked for changes what it says alone.
        """
        if self.items is None:
            batch = self.data.test_batch(first, n) if own is None else own
        else:
            numbers = [self.items[k % len(self.items)] for k in range(first, first + n)]
            batch = self.data.split("test").read(numbers, None)
            if own is not None and {"label", "attributes"} <= self.model.needs:
                batch["attributes"] = self._changed_by_label(batch["label"], own["attributes"])
        return batch | self._given(first, n) | self._with_attributes(batch.get("attributes"))

    def _changed_by_label(self, labels: Tensor, own: Tensor) -> Tensor:
        """Attributes `own` (n, A) with those in place that all test images with the label asked for have alike."""
        changed = own.clone()
        for k, label in enumerate(labels.tolist()):
            alike, values = self._said_by_labels[label]
            changed[k, alike] = values
        return changed

    @cached_property
    def _said_by_labels(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Of each label asked for: which attributes its first `OFFERED` test images have alike, (A,), and these."""
        split, items, found = self.data.split("test"), torch.tensor(self.items), {}
        labels = split.labels[items]
        for label in labels.unique().tolist():
            rows = split.read(items[labels == label][:OFFERED].tolist(), None)["attributes"]
            alike = (rows == rows[0]).all(0)
            found[label] = alike, rows[0, alike]
        return found

    def _words(self, asked: Batch) -> list[str] | None:
        """What each of these pictures is to show, by name."""
        return self.data.names.asked(asked, self.model.needs, self.signs)

    def _with_attributes(self, own: Tensor | None) -> Batch:
        """The attributes asked for, of images that have their `own` (B, A), under the name that the model knows."""
        if self.signs is None or own is None:
            return {}
        signs = torch.tensor(self.signs).to(own)
        name = "target" if "target" in self.model.needs else "attributes"
        return {name: torch.where(signs == 0, own, (signs > 0).to(own))}

    def _given(self, first: int, n: int) -> Batch:
        """What pictures first .. first + n - 1 take of what was given, whose rows come round again."""
        numbers = torch.arange(first, first + n)
        return {name: rows_of({name: rows}, numbers % len(rows))[name] for name, rows in self.given.items()}

    # ---- verbs

    def sample(self, first: int, n: int) -> Made:
        """Images of the model; a translator's beside their sources."""
        asked = self._asked(first, n)
        cond = self.model.condition(asked, self.case)
        sources = to_uint8(cond[self.model.source_fields[self.case]]) if self.model.source_fields else None
        made = to_uint8(sample(self.model, cond, self._rngs(first, n), self.options))
        return Made(made, sources, captions=cond.get("text"), asked=self._words(asked))

    def reconstruct(self, first: int, n: int) -> Made:
        """What the model makes of test images, beside them."""
        return self._reconstructed(first, n, drawn=False)

    def resample(self, first: int, n: int) -> Made:
        """What the model makes of draws of the posteriors of test images, beside them."""
        return self._reconstructed(first, n, drawn=True)

    def interpolate(self, first: int, n: int) -> Made:
        """Row r goes from latent r to latent r + 1, under the condition of image r.

        An autoencoder's latents are those of the test images, and the way is straight; else they are draws of the
        prior, and the way is the great circle, since independent normal latents are nearly orthogonal. A diffusion
        model's latent is all noise of a sample, that on the way too, so that any sampler will do.
        """
        rows, columns = _cells(first, n)
        base, count = int(rows[0]), int(rows[-1] - rows[0]) + 2
        asked = self._asked(base, count)
        cond, part = self.model.condition(asked, self.case), columns / (COLUMNS - 1)
        words = self._words(rows_of(asked, rows - base))
        if isinstance(self.model, DiffusionModel):
            start, end = (ImageRngs.of(self.seed, (rows + k).tolist()) for k in (0, 1))
            noise = latents.Between(start, end, part)
            made = to_uint8(sample(self.model, rows_of(cond, rows - base), noise, self.options))
            return Made(made, asked=words)
        ends = self._latents(base, count, cond)
        place = (rows - base).to(ends.device)
        way = latents.straight if isinstance(self.model, Autoencoder) else latents.great_circle
        made = self._rendered(way(ends[place], ends[place + 1], part), rows_of(cond, place), first)
        return made._replace(asked=words)

    def traverse(self, first: int, n: int) -> Made:
        """Row r is latent 0 with its coordinate r set to -REACH .. REACH, all other coordinates as they are."""
        rows, columns = _cells(first, n)
        cond = self.conditions(0, 1)
        start = self._latents(0, 1, cond)
        z = latents.along(start, rows, columns / (COLUMNS - 1))
        return self._rendered(z, rows_of(cond, torch.zeros_like(rows)), first)

    def truncate(self, first: int, n: int) -> Made:
        """Row r is image r, its style moved from the mean of all styles through its own to TRUNCATED times as far."""
        rows, columns = _cells(first, n)
        base, count = int(rows[0]), int(rows[-1] - rows[0]) + 1
        cond = self.conditions(base, count)
        z = self.model.sample_latents(self._rngs(base, count), cond)
        styles = latents.truncated(self.model, z, cond, rows - base, columns / (COLUMNS - 1))
        return Made(to_uint8(self.model.synthesize(styles, ImageRngs.of(self.seed, rows.tolist()))))

    def mix(self, first: int, n: int) -> Made:
        """Mixes styles: row r, column c has the coarse styles of the left picture and the fine ones of the top picture.

        Karras et al. 2019, StyleGAN, figure 3.
        """
        rows, columns = _cells(first, n)
        left = torch.where(rows > 0, COLUMNS - 1 + rows, columns)
        top = torch.where(columns > 0, columns, left)
        last = int(max(left.max(), top.max())) + 1
        cond = self.conditions(0, last)
        styles = self.model.styles(self.model.sample_latents(self._rngs(0, last), cond), cond, **self.options)
        return Made(to_uint8(self.model.synthesize(latents.mixed(styles, left, top), self._rngs(first, n))))

    def project(self, first: int, n: int) -> Made:
        """The nearest to test images that latents were found for, beside them."""
        return self._changed("project", first, n)

    def edit(self, first: int, n: int) -> Made:
        """What becomes of test images once they were noised to time `strength`, beside them: SDEdit."""
        return self._changed("edit", first, n)

    def inpaint(self, first: int, n: int) -> Made:
        """Test images with what the model puts below the mask; beside them what it has seen of them."""
        return self._changed("inpaint", first, n)

    def invert(self, first: int, n: int) -> Made:
        """What comes back from the noise that DDIM inverts test images to, beside them.

        They are inverted under their own conditions, and come back under the label or the attributes asked for.
        """
        return self._changed("invert", first, n)

    def paths(self, first: int, n: int) -> Made:
        """Samples; and as GIFs test images on their way to noise, and samples on their way from it.

        Beside each sample on its way stands the denoised image that its next step aims at.
        """
        x = self.data.test_batch(first, n)["image"].to(self.model.device)
        forward = self.model.noising(x, self._rngs(first, n), FRAMES)
        noised = torch.stack([to_uint8(frame) for frame in forward])
        denoised = list(self.denoising(first, n))
        pairs = torch.stack([beside(list(pair)) for pair in denoised])
        return Made(denoised[-1][0], frames={"forward.gif": noised, "reverse.gif": pairs})

    def denoising(self, first: int, n: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Samples on their way from noise, as it happens: x_t, and the denoised image that the next step aims at.

        At most `FRAMES` of them, (n, C, H, W) uint8 each; the last x_t are the samples.
        """
        cond = self.conditions(first, n)
        for x_t, aimed in self.model.denoising(cond, self._rngs(first, n), FRAMES, **self.options):
            yield to_uint8(x_t), to_uint8(aimed)

    def attention(self, first: int, n: int) -> Made:
        """Where the net looks for each word of a caption, step by step."""
        made = attention.sheets(self.model, self.conditions(first, n), self._rngs(first, n), COLUMNS, self.options)
        height = max(sheet.shape[1] for sheet in made)
        return Made(torch.stack([F.pad(sheet, (0, 0, 0, height - sheet.shape[1])) for sheet in made]))

    # ---- of files

    def of_files(self, verb: str, sources: list[files.Source], first: int = 0) -> Iterator[Made]:
        """What becomes of each file, (1, C, H, W), beside it: of all of it, or for `OF_IMAGES` of its central square.

        Args:
            verb: verb that each is put to.
            sources: names and files.
            first: number of the first file, which its noise comes from.

        Raises:
            UserError: attributes are needed and none were given, or a file cannot be read.
        """
        if verb not in checks.OF_IMAGES:
            yield from self.translate(sources, first)
            return
        for k, (name, path) in enumerate(sources, first):
            if (image := self._opened(path, len(sources))) is None:
                continue
            x = to_float(pixels(square(image, self.data.image_size))[None]).to(self.model.device)
            mask = self._mask(k, 1, name, image.size) if verb == "inpaint" else None
            yield self._change(verb, x, None, k, mask)._replace(names=[name], files=[path])

    def _opened(self, path: Path, n: int) -> Image.Image | None:
        """A file, or None where it is one of many and cannot be read, which is said at once and kept in `unread`."""
        try:
            return files.opened(path, self.data)
        except UserError as error:
            if n == 1:
                raise
            print(error.line(), file=sys.stderr, flush=True)
            self.unread.append(path)
            return None

    def translate(self, sources: list[files.Source], first: int = 0) -> Iterator[Made]:
        """What a translator makes of each file, (1, C, H, W), beside it; `first` as in `of_files`.

        Raises:
            UserError: attributes are needed and none were given, or a file cannot be read.
        """
        if "target" in self.model.needs and self.signs is None:
            fix = f"attributes=+{self.data.names.attributes[0]}"
            raise UserError("attributes", None, "what are the images to get?", fix)
        for name, fix in (("instruction", "instruction='make it blue'"), ("text", "prompt=TEXT")):
            if name in self.model.needs and name not in self.given:
                raise UserError(fix.partition("=")[0], None, "what are the images to become?", fix)
        for k, (name, path) in enumerate(sources, first):
            if (image := self._opened(path, len(sources))) is None:
                continue
            fixed = isinstance(self.model, DiffusionModel)  # its net is for images of one size
            source, own = pixels(square(image, self.data.image_size) if fixed else image)[None], self._of_file(image)
            made = to_uint8(self.translated(to_float(source), k, own))
            asked = self.data.names.asked(own, self.model.needs)
            yield Made(made, source, [name], [path], asked=asked)

    def _of_file(self, image: Image.Image) -> Batch:
        """The attributes that the model sees in a file, and those that it is to get; none where none were asked for."""
        if self.signs is None:
            return {}
        if not isinstance(self.model, SeesAttributes):  # and they are all asked for
            return self._with_attributes(torch.zeros(1, len(self.signs)))
        own = self.model.attributes_of(to_float(pixels(square(image, self.data.image_size))[None])).cpu()
        return {"attributes": own} | self._with_attributes(own)

    def translated(self, x: Tensor, k: int, own: Batch | None = None) -> Tensor:
        """What becomes of image k, (1, C, H, W) in [-1, 1] of any size; in parts if large and the net is local.

        `own`: Batch fields of it, beside what was given.
        """
        model, given = self.model, self._given(k, 1) | (own or {})
        return files.tiled(
            lambda part: self._translated_whole(part, k, given),
            x,
            model.receptive_radius,
            model.size_divisor,
            model.scale_factor,
        )

    # ---- pieces

    def _rngs(self, first: int, n: int) -> ImageRngs:
        return ImageRngs(self.seed, first, n)

    def _latents(self, first: int, n: int, cond: Cond) -> Tensor:
        """Latents of test images where the model encodes, else draws of its prior."""
        if isinstance(self.model, Autoencoder):
            return self.model.encode(self.data.test_batch(first, n)["image"].to(self.model.device))
        return self.model.sample_latents(self._rngs(first, n), cond)

    def _changed(self, verb: str, first: int, n: int) -> Made:
        """Test images and what becomes of each."""
        batch = self.data.test_batch(first, n)
        x = batch["image"].to(self.model.device)
        mask = self._mask(first, n, "a test image", (x.shape[3], x.shape[2])) if verb == "inpaint" else None
        return self._change(verb, x, batch, first, mask)

    def _change(self, verb: str, x: Tensor, own: Batch | None, first: int, mask: Tensor | None) -> Made:
        """What becomes of images x (B, C, H, W), beside them.

        Args:
            own: test images that x are, with all that is known of them; None: nothing is.
            first: number of the first image.
            mask: mask of inpainting, (B, 1, H, W) bool.
        """
        model, rngs, asked = self.model, self._rngs(first, len(x)), self._asked(first, len(x), own)
        seen = {"image": x} if mask is None else {"image": x, "mask": mask.float()}  # where the model looks at it
        cond = model.condition(asked | seen, self.case)
        options = self.options | (UNKNOWN if self.unknown else {})
        if verb == "edit":
            made = model.edit(x, cond, rngs, self.strength, **options)
        elif mask is not None:
            x, made = x.masked_fill(mask, 0), model.inpaint(x, mask, cond, rngs, self.resamplings, **options)
        elif verb == "invert":
            known = None if own is None else model.condition(own, self.case)
            changed = self.items is not None or self.signs is not None or self.given
            made = model.invert(x, known, cond, **({} if changed else UNGUIDED) | options)
        else:
            made = latents.projection(model, x, cond, rngs, self.options)
        return Made(to_uint8(made), to_uint8(x), asked=None if self.unknown else self._words(asked))

    def _mask(self, first: int, n: int, name: str, sides: tuple[int, int]) -> Tensor:
        """Of n images with these sides, (n, 1, H, W) bool."""
        size = self.data.image_size
        if self.mask == masks.OBJECT:
            return self.data.test_batch(first, n)["mask"].to(self.model.device) > 0.5
        if self.mask in masks.WORDS:
            return masks.drawn(self.mask, size, self._rngs(first, n)).to(self.model.device)
        return masks.read(self.mask, name, sides, size).expand(n, -1, -1, -1).to(self.model.device)

    def _rendered(self, z: Tensor, cond: Cond, first: int) -> Made:
        return Made(to_uint8(self.model.generate(z, cond, self._rngs(first, len(z)), **self.options)))

    def _reconstructed(self, first: int, n: int, drawn: bool) -> Made:
        """Of the mode of the posterior, or of a draw."""
        x = self.data.test_batch(first, n)["image"].to(self.model.device)
        z = self.model.encode(x, self._rngs(first, n) if drawn else None)
        return Made(to_uint8(self.model.decode(z, **self.options)), to_uint8(x))

    def _translated_whole(self, x: Tensor, k: int, given: Batch) -> Tensor:
        """Sides are continued to what the net takes, which is cut off the result."""
        height, width = x.shape[2:]
        field, factor = self.model.source_fields[self.case], self.model.scale_factor
        source = {field: files.continued(x, self.model.size_divisor)}
        cond = self.model.condition(given | source, self.case)
        image = sample(self.model, cond, self._rngs(k, 1), self.options)
        return image[:, :, : factor * height, : factor * width]


def _cells(first: int, n: int) -> tuple[Tensor, Tensor]:
    """Row and column of pictures first .. first + n - 1 of a grid, (n,) each."""
    numbers = torch.arange(first, first + n)
    return numbers // COLUMNS, numbers % COLUMNS
