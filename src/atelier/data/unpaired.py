"""Sets of two domains without pairs: `unpaired`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from annotated_types import Len
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from atelier.core.batch import Batch
from atelier.core.errors import UserError, nearest
from atelier.core.ranges import Name, NonNegInt
from atelier.core.words import word
from atelier.data.base import RANDOM, Role, Split, random_order
from atelier.data.file_images import Views
from atelier.data.finding import Item, files_of, must_be_folder, printable, subfolders
from atelier.data.folders import ImageFiles
from atelier.data.layouts import refuse_deeper, side_folders

FOLDERS = ["trainA", "trainB", "testA", "testB"]  # these are also found under other names: data/layouts.py
DOMAINS = (0, 1)  # A and B; an item's label


class UnpairedImages:
    """Images of two domains; as many items as the larger has.

    Item i has image i mod n of A and, in training, any image of B, drawn by its generator; else image i mod n of B
    as well. The two are cut and mirrored independently.

    Args:
        a, b: the domains.
        fingerprint: text that tells this set from another.
    """

    def __init__(self, a: Views, b: Views, fingerprint: str) -> None:
        self.a, self.b, self.fingerprint, self.labels = a, b, fingerprint, None

    def __len__(self) -> int:
        return max(len(self.a), len(self.b))

    def read(self, indices: list[int], rngs: list[torch.Generator] | None) -> Batch:
        n_a, n_b = len(self.a), len(self.b)
        if rngs is None:
            of_b = [index % n_b for index in indices]
        else:
            of_b = [int(torch.randint(n_b, (), generator=rng)) for rng in rngs]
        image_a = self.a.draw([index % n_a for index in indices], rngs)
        image_b = self.b.draw(of_b, rngs)
        return {"image": image_b, "image_a": image_a, "image_b": image_b, "index": torch.tensor(indices)}


@dataclass(kw_only=True, eq=False)
class Unpaired(ImageFiles):
    """Two domains A and B without pairs, `image_a` and `image_b`, in the layout of CycleGAN (Zhu, Park, Isola, Efros
    2017); `image` is `image_b`.

    The domains need not be of one size. An epoch is as long as the larger: of A each image comes as often (nearly),
    of B independent draws. The test split has the larger's length too and begins the smaller anew. Each domain is
    brought into a random order, so that the first n items have n of either, as different as they are. A file that has
    the same content as one of the other domain, or of the other split, is counted in one warning.

    Args:
        folders: names of folders under the root: A and B to train, A and B to test; or A and B alone, a share of each
            held out (`holdout`). trainA, trainB, testA, testB are found by other names of theirs too, or without test
            folders.
        jitter: training images are read so many pixels larger and cut at a random place.
    """

    folders: Annotated[list[Name], Len(2, 4)]
    jitter: NonNegInt = field(metadata={"role": Role.NOT_PIXELS | Role.OWN | Role.DRAWN})

    provides: ClassVar[frozenset[str]] = frozenset({"image_a", "image_b"})
    shuffled: ClassVar[bool] = True  # here, each domain by itself

    def layout(self) -> dict[Split, list[Item]]:
        must_be_folder(self.root)
        if len(self.folders) == 3:
            fix = "A and B to train, A and B to test; or A and B alone"
            raise UserError("data.folders", self.folders, "it names three folders", fix)
        found = side_folders(self.root) if self.folders == FOLDERS else None
        folders = [name for sides in found.values() for name in sides] if found else self.folders
        files = [self._domain(folder, k % 2) for k, folder in enumerate(folders)]
        splits = ("train", "test")[: len(files) // 2]
        return {split: files[2 * k] + files[2 * k + 1] for k, split in enumerate(splits)}

    def prepare_data(self) -> None:
        super().prepare_data()
        n = self.n_repeated()
        if n:
            message = f"{printable(self.root)}: {n} images are in both domains or both splits, with the same content"
            rank_zero_warn(message, category=UserWarning)

    def images(self, split: Split) -> UnpairedImages:
        a, b = (self._views(split, domain) for domain in DOMAINS)
        return UnpairedImages(a, b, self.files_fingerprint(split))

    def choice(self, split: Split) -> str:
        return RANDOM

    def count(self, split: Split, field: str) -> int:
        domains = self.split(split)
        return len(domains.a if field == "image_a" else domains.b)

    def n_repeated(self) -> int:
        """How many contents lie in more than one of the two domains of the two splits. With holdout=0 the splits are
        the same, and the domains alone are compared."""
        one_split = "test" not in self.files and self.holdout == 0
        splits: list[Split] = ["train"] if one_split else ["train", "test"]
        found: dict[str, set[tuple[str, int]]] = {}
        for split in splits:
            for item in self.index[split]:
                found.setdefault(self.checked[item.name].content, set()).add((split, item.label))
        return sum(len(groups) > 1 for groups in found.values())

    def _domain(self, folder: str, domain: int) -> list[Item]:
        if not os.path.isdir(os.path.join(self.root, folder)):
            within = os.path.dirname(folder)
            within = within if os.path.isdir(os.path.join(self.root, within)) else ""
            there = [os.path.join(within, name) for name in subfolders(Path(self.root, within))]
            refuse_deeper(self.root, within, subfolders(Path(self.root, within)))
            problem = f"no folder {printable(folder)} in {printable(self.root)}"
            if self.folders == FOLDERS and len(there) == 2:
                raise UserError("data.folders", self.folders, problem, word("data.folders", [*map(printable, there)]))
            close = nearest(folder, there) or ", ".join(map(printable, there[:6])) or "a folder of images"
            raise UserError("data.folders", self.folders, problem, f"{close} in its place, or data.root=FOLDER")
        return [Item(name, domain) for name in files_of(self.root, folder)]

    def _views(self, split: Split, domain: int) -> Views:
        paths = [Path(self.root, item.name) for item in self.index[split] if item.label == domain]
        if not paths:
            raise self.none_left(split, f" of domain {'AB'[domain]}")
        order = random_order(len(paths))[: self.limit if split == "train" else None]
        return self.views(split, [paths[k] for k in order], self.jitter)
