"""Images read from files, batch by batch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from atelier.core.batch import Batch
from atelier.core.errors import UserError
from atelier.core.rng import generator
from atelier.data.base import mirrored, tossed, turned, with_floats
from atelier.data.finding import printable
from atelier.data.reading import BadImage
from atelier.images.masks import lama_mask
from atelier.images.pixels import to_float

Masks = Literal["none", "alpha", "lama"]
MASK_SEED = 0  # of the masks of images that are not trained on, the same in every run
LEAST_OPAQUE = 13  # of 255: a twentieth; what is fainter shows nothing of an object, and is what lossy files leave


class FileImages:
    """Images read from files.

    Args:
        paths: one file for each image.
        read_file: path to (C, S, S) uint8, with masks of alpha (C + 1, S, S), the alpha last; raises BadImage.
        fields: further Batch fields, (N, ...) tensors, or the texts of each image, of which one is drawn where
            generators are given, else the first taken.
        flip: mirroring of half of the images, when generators are given.
        keep: whether each image stays in memory as uint8 once it has been read.
        fingerprint: text that tells this set from another.
        masks: kind of `mask`: "alpha", where the image is not transparent; "lama", drawn anew whenever generators are
            given, else by the number of the image (`lama_mask`); "none", there is none.

    A file that has become unreadable since it was checked is a UserError with its path.
    """

    def __init__(
        self,
        paths: list[Path],
        read_file: Callable[[Path], Tensor],
        fields: dict[str, Tensor | list[list[str]]],
        flip: bool,
        keep: bool,
        fingerprint: str,
        masks: Masks = "none",
    ) -> None:
        self.paths, self.read_file, self.fields, self.masks = paths, read_file, fields, masks
        self.flip, self.keep, self.fingerprint = flip, keep, fingerprint
        self.labels = fields.get("label")
        self._kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def followed_by(self, more: FileImages) -> FileImages:
        """These and behind them others that are read in the same way, with texts likewise."""
        fields = {name: [*texts, *more.fields[name]] for name, texts in self.fields.items()}
        both = hashlib.sha256(f"{self.fingerprint} {more.fingerprint}".encode()).hexdigest()[:16]
        return FileImages([*self.paths, *more.paths], self.read_file, fields, self.flip, self.keep, both, self.masks)

    def beside(self, indices: list[int], rngs: list[torch.Generator] | None) -> tuple[Batch, Tensor]:
        chosen = turned(self.flip, indices, rngs)
        where = torch.tensor(indices)
        batch: Batch = {"index": where}
        for name, values in self.fields.items():
            batch[name] = values[where] if isinstance(values, Tensor) else one_of_each(values, indices, rngs)
        return batch, chosen

    def read(self, indices: list[int], rngs: list[torch.Generator] | None) -> Batch:
        return with_floats(self.levels(indices, rngs), to_float)

    def levels(self, indices: list[int], rngs: list[torch.Generator] | None) -> Batch:
        batch, chosen = self.beside(indices, rngs)
        pixels = mirrored(self._pixels(indices), chosen)
        if self.masks == "alpha":
            pixels, alpha = pixels.tensor_split([-1], dim=1)
            batch["mask"] = (alpha >= LEAST_OPAQUE).float()
        batch["image"] = pixels
        if self.masks == "lama":
            rngs = rngs or [generator(MASK_SEED, index) for index in indices]
            batch["mask"] = torch.stack([lama_mask(pixels.shape[-1], rng) for rng in rngs])
        return batch

    def _pixels(self, indices: list[int]) -> Tensor:
        pixels = {index: self._kept[index] for index in indices if index in self._kept}
        missing = [index for index in indices if index not in pixels]
        if missing:
            with ThreadPoolExecutor(threads()) as pool:
                pixels.update(zip(missing, pool.map(self._decoded, missing), strict=True))
        if self.keep:
            self._kept.update(pixels)
        return torch.stack([pixels[index] for index in indices])

    def _decoded(self, index: int) -> Tensor:
        return decoded(self.paths[index], self.read_file)


class Sourced:
    """A split of which each image has its `source`, made of what is read, as both are mirrored.

    Args:
        images: split without them.
        apart: map of what is read (B, C', H, W) to image and source, (B, C, H, W) each.
    """

    def __init__(self, images: FileImages, apart: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        self.images, self.apart, self.fingerprint = images, apart, images.fingerprint
        self.labels, self.fields = images.labels, images.fields

    def __len__(self) -> int:
        return len(self.images)

    def beside(self, indices: list[int], rngs: list[torch.Generator] | None) -> tuple[Batch, Tensor]:
        return self.images.beside(indices, rngs)

    def read(self, indices: list[int], rngs: list[torch.Generator] | None) -> Batch:
        batch = self.images.read(indices, rngs)
        batch["image"], batch["source"] = self.apart(batch["image"])
        return batch


def one_of_each(texts: list[list[str]], indices: list[int], rngs: list[torch.Generator] | None) -> list[str]:
    """A text of each image: drawn by its generator, the first where there are none."""
    of = [texts[index] for index in indices]
    if rngs is None:
        return [some[0] for some in of]
    return [some[int(torch.randint(len(some), (), generator=rng))] for some, rng in zip(of, rngs, strict=True)]


def decoded(path: Path, read_file: Callable[[Path], Tensor]) -> Tensor:
    """What `read_file` gives of a file that could be read when it was checked. Raises UserError."""
    try:
        return read_file(path)
    except BadImage as error:
        problem = f"the image {printable(path.name)} cannot be read any more: {error}"
        raise UserError("data.root", printable(path.parent), problem, "put the file back") from error


class Views:
    """Files at one size; in training a random part of each at a larger one (random jitter: Isola, Zhu, Zhou, Efros
    2017, appendix 6.2, which cut 256 pixels out of 286).

    Args:
        paths: one file for each image.
        read_file: (path, size=) to (C, size, size) uint8; raises BadImage.
        image_size: S.
        jitter: pixels by which the whole is larger than S in training.
        flip: mirroring of half of the images in training.
        keep: whether what has been read stays in memory as uint8.
    """

    def __init__(
        self,
        paths: list[Path],
        read_file: Callable[..., Tensor],
        image_size: int,
        jitter: int,
        flip: bool,
        keep: bool,
    ) -> None:
        self.plain = FileImages(paths, partial(read_file, size=image_size), {}, False, keep, "")
        wide = partial(read_file, size=image_size + jitter)
        self.wide = FileImages(paths, wide, {}, False, keep, "") if jitter else self.plain
        self.image_size, self.jitter, self.flip = image_size, jitter, flip

    @staticmethod
    def n_pixels(image_size: int, jitter: int) -> int:
        """How many pixels of an image may be kept."""
        return image_size**2 + ((image_size + jitter) ** 2 if jitter else 0)

    def __len__(self) -> int:
        return len(self.plain)

    def draw(self, indices: list[int], rngs: list[torch.Generator] | None) -> Tensor:
        """(B, C, S, S) in [-1, 1]; rngs[i] says where image i is cut and whether it is mirrored, None means neither."""
        if rngs is None:
            return self.plain.read(indices, None)["image"]
        images = self.wide.read(indices, None)["image"]
        if self.jitter:
            images = torch.stack([self._part(image, rng) for image, rng in zip(images, rngs, strict=True)])
        return mirrored(images, tossed(rngs)) if self.flip else images

    def _part(self, image: Tensor, rng: torch.Generator) -> Tensor:
        top, left = torch.randint(self.jitter + 1, (2,), generator=rng).tolist()
        return image[:, top : top + self.image_size, left : left + self.image_size]


def threads() -> int:
    """Decoders run at once: one in a loader process, else one for each core."""
    return 1 if get_worker_info() is not None else min(16, os.cpu_count() or 1)
