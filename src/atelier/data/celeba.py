"""CelebA, aligned and cropped (Liu, Luo, Wang, Tang 2015): 202,599 faces, 178 x 218 pixels, 40 attributes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets

from atelier.data.base import DataModule, Split
from atelier.data.folders import FileImages
from atelier.data.published import absent, fetch
from atelier.data.reading import Box, read
from atelier.errors import UserError
from atelier.ranges import Name, PositiveInt

SOURCE = "mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
ATTRIBUTES, PARTITION, PHOTOGRAPHS = "list_attr_celeba.txt", "list_eval_partition.txt", "img_align_celeba"
PARTS = {"train": 0, "test": 2}  # 1 is the validation part
MAX_PIXELS = 1 << 20
CROPS: dict[str, Box] = {
    "ddim": (25, 57, 153, 185),
    "score_sde": (19, 39, 159, 179),
    "mimicry": (0, 20, 178, 198),
}


@dataclass(kw_only=True, eq=False)
class CelebA(DataModule):
    """Images and 40 attributes (0 or 1, in the order of the file); 162,770 train, 19,962 test.

    Files in torchvision's layout: `<root>/celeba/` with img_align_celeba/, list_attr_celeba.txt and
    list_eval_partition.txt; the other lists are not needed. Crops of the 178 x 218 photographs, each then
    resized (antialiased bicubic) to `image_size`; an FID is comparable only under the same crop:

        ddim       128 x 128 centred at row 121, column 89 (Song, Meng, Ermon 2021; DDIM)
        score_sde  140 x 140 in the centre (Song et al. 2021; also WAE)
        mimicry    178 x 178 in the centre (Lee and Town 2020)

    Args:
        root: the folder that has `celeba/`.
        download: fetch the files (1.4 GB, Google Drive, needs `pip install gdown`) if they are not there.
        crop: one of the above.
        memory_mb: keep the images of a split in memory, once read, if all of them need no more than this;
            not the training images when loader processes read them (num_workers > 0).
    """

    root: Name
    download: bool
    crop: Literal["ddim", "score_sde", "mimicry"]
    memory_mb: PositiveInt

    provides: ClassVar[frozenset[str]] = frozenset({"attributes"})

    @property
    def folder(self) -> Path:
        return Path(self.root, "celeba")

    def prepare_data(self) -> None:
        needed = (ATTRIBUTES, PARTITION, PHOTOGRAPHS)
        if self.download and not all((self.folder / name).exists() for name in needed):
            fetch(self.root, lambda: datasets.CelebA(self.root, download=True))

    def images(self, split: Split) -> FileImages:
        names, attributes = self._table(split)
        if attributes.shape[1] != self.n_attributes:
            fix = f"data.n_attributes={attributes.shape[1]}"
            raise UserError("data.n_attributes", self.n_attributes, "it is not what the files have", fix)
        self._all_there(names)
        megabytes = len(names) * self.channels * self.image_size**2 / 2**20
        return FileImages(
            [self.folder / PHOTOGRAPHS / name for name in names],
            partial(
                read,
                size=self.image_size,
                channels=self.channels,
                background="white",
                max_pixels=MAX_PIXELS,
                crop=CROPS[self.crop],
            ),
            {"attributes": attributes},
            self.flip,
            megabytes <= self.memory_mb and (self.num_workers == 0 or split == "test"),
            hashlib.sha256("\n".join(names).encode()).hexdigest()[:16],
        )

    def _table(self, split: Split) -> tuple[list[str], Tensor]:
        """File names of a split and their attributes (N, 40) float32."""
        parts = dict(line.split() for line in self._lines(PARTITION))
        rows = [line.split() for line in self._lines(ATTRIBUTES)[2:]]
        rows = [row for row in rows if parts.get(row[0]) == str(PARTS[split])]
        values = np.array([row[1:] for row in rows], dtype=np.int8)
        return [row[0] for row in rows], torch.from_numpy((values > 0).astype(np.float32))

    def _lines(self, name: str) -> list[str]:
        file = self.folder / name
        if not file.is_file():
            raise self._absent(f"no {file}")
        return file.read_text().splitlines()

    def _all_there(self, names: list[str]) -> None:
        folder = self.folder / PHOTOGRAPHS
        if not folder.is_dir():
            raise self._absent(f"no {folder}/")
        missing = sorted(set(names) - {file.name for file in folder.iterdir()})
        if missing:
            told = f"{len(missing)} of {len(names)} images are not in {folder}, first {missing[0]}"
            raise self._absent(told)

    def _absent(self, missing: str) -> UserError:
        return absent(self.root, missing, SOURCE, self.download)
