"""What a frozen first stage says of training images, kept on disk and read in place of encoding them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atelier.core.batch import Batch
from atelier.core.errors import UserError
from atelier.core.rng import generator
from atelier.data.base import Images, OnlyMirrored, mirrored
from atelier.data.kept_rows import ROWS, KeptRows, Wording

PROBED = 8  # images that are looked at, whether training changes them by more than mirroring
KEY = "latent_cache"
WORDING = Wording(KEY, stem="moments", rows="latents", row="a latent", of="image", maker="first stage")


class LatentCache:
    """Mean and log-variance of the latents of training images, and of their mirror images where the set flips.

    Of each both are kept, since the latents of a mirror image are not those of the image, mirrored: rows
    (2 or 1, 2 Z, h, w) in the order of `indices`, as data/kept_rows.py keeps rows.

    They are float32, in which a run with the cache is the run without it, to rounding. In float16 they would take half
    the disk, with an rms error of 2e-4 of the latents' deviation (benchmarks/latent_cache.py).

    Args:
        folder: place of the files, which all ranks see.
        identity: name to plain value of all that decides the moments: where one is another, the cache is stale.
        indices: numbers in their split of the images that are trained on.
        shape: (2 Z, h, w).
        flip: whether mirror images are needed.
        rows: images of a shard.
    """

    def __init__(
        self,
        folder: Path,
        identity: dict[str, Any],
        indices: Sequence[int],
        shape: tuple[int, int, int],
        flip: bool,
        rows: int = ROWS,
    ) -> None:
        self.folder, self.identity, self.indices, self.shape, self.n_rows = folder, identity, indices, shape, rows
        self._row = None if isinstance(indices, range) else {index: row for row, index in enumerate(indices)}
        self.flip, self.kept = flip, self._rows(flip)

    def _rows(self, flip: bool) -> KeptRows:
        n, shape = len(self.indices), (2 if flip else 1, *self.shape)
        layout = {"shape": list(self.shape), "images": n, "flips": flip}
        return KeptRows(self.folder, WORDING, self.identity, layout, n, shape, self.n_rows)

    @property
    def n_bytes(self) -> int:
        """Size on disk once it is finished."""
        return self.kept.n_bytes

    def describe(self) -> str:
        """What it holds, in a few words."""
        mirror = " and of as many mirror images" if self.flip else ""
        return self.kept.describe(f"{len(self.indices):,} images{mirror}")

    def check(self) -> bool:
        """Whether it is finished. Where one lies there that has mirror images too, they are read and written as well.

        Raises:
            UserError: something else lies there, or what lies there is of something else, or has lost a shard.
        """
        stored = self.kept.stored()
        if stored is not None and stored["flips"] != self.flip:
            there = self._rows(stored["flips"])
            there.refuse_stale(stored)
            if self.flip:
                raise there.refused("it has no mirror images, which data.flip=true needs")
            self.flip, self.kept = True, there
        return self.kept.check()

    def begin(self) -> None:
        """As `KeptRows.begin`."""
        self.kept.begin()

    def fill(
        self, images: Images, encode: Callable[[Tensor], Tensor], batch_size: int, rank: int = 0, ranks: int = 1
    ) -> None:
        """Write those shards of this rank that are missing; the first rank tells how far it is.

        Args:
            images: training split.
            encode: images (B, C, H, W) to moments (B, 2 Z, h, w), on any device.
            batch_size: images that are encoded at once.
            rank, ranks: number of this process, and how many share the work.

        Raises:
            UserError: a latent is not finite, or the disk is full.
        """

        def moments(rows: list[int]) -> Tensor:
            x = images.read([self.indices[row] for row in rows], None)["image"]
            sides = [x, x.flip(-1)] if self.flip else [x]
            return torch.stack([encode(side) for side in sides], 1)  # (B, 2 or 1, 2 Z, h, w)

        self.kept.fill(moments, lambda row: f"training image {self.indices[row]}", batch_size, rank, ranks)

    def finish(self) -> None:
        """As `KeptRows.finish`."""
        self.kept.finish()

    def read(self, indices: list[int], chosen: Tensor) -> Tensor:
        """Moments (B, 2 Z, h, w) of images with these numbers in their split, mirrored where `chosen` (B,) is true."""
        rows = indices if self._row is None else [self._row[index] for index in indices]
        sides = chosen.long().tolist()
        return torch.stack([self.kept.row(row)[side] for row, side in zip(rows, sides, strict=True)])


class KeptLatents:
    """A training split whose `moments` come from a finished cache, in place of its images.

    Args:
        images: split that all else comes from.
        cache: latents of it.
    """

    def __init__(self, images: OnlyMirrored, cache: LatentCache) -> None:
        self.images, self.cache = images, cache
        self.fingerprint, self.labels = images.fingerprint, images.labels

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: list[int], rngs: list[torch.Generator] | None) -> Batch:
        batch, chosen = self.images.beside(indices, rngs)
        batch["moments"] = self.cache.read(indices, chosen)
        return batch


def check_only_mirrored(images: OnlyMirrored, indices: Sequence[int], flip: bool) -> None:
    """Look at some images whether training shows them, or their mirror images, and nothing else.

    Args:
        images: training split.
        indices: numbers of the images that are trained on; the first few are looked at.
        flip: whether there are to be mirror images.

    Raises:
        UserError: it shows something else.
    """
    chosen = list(indices[:PROBED])
    plain = images.read(chosen, None)["image"]
    for epoch in range(2):
        seen = images.read(chosen, [generator(epoch, index) for index in chosen])["image"]
        _, turned = images.beside(chosen, [generator(epoch, index) for index in chosen])
        if (turned.any() and not flip) or not torch.equal(seen, mirrored(plain, turned)):
            problem = "training changes the pixels of this set by more than mirroring, anew each epoch"
            raise UserError(KEY, type(images).__name__, problem, f"{KEY}=null")
