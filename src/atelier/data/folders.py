"""Sets that are folders of image files: `images`, without labels, and what the other sets of files are made of."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from atelier.core.errors import UserError
from atelier.core.ranges import Name, PositiveInt, Probability
from atelier.data.base import DataModule, Role, Split
from atelier.data.checking import Checked, check_files, fingerprint
from atelier.data.file_images import FileImages, Masks, Views
from atelier.data.finding import Item, files_of, printable, tell
from atelier.data.layouts import left_out, refuse_pairs, split_folders
from atelier.data.reading import Background, check, has_alpha, read, read_with_alpha


@dataclass(kw_only=True, eq=False)
class ImageFiles(DataModule, ABC):
    """Image files under one folder, each decoded once at the start to find the unreadable ones.

    The files are those named as reading.SUFFIXES lists (any case) at any depth, in natural order (2 before 10);
    of all that is not read one line says how much it is and why, but of links back to where the search came from and
    of what systems leave (finding.SYSTEM). What folders may be called: data/layouts.py. How a file becomes pixels:
    data/reading.py. Where all images of both splits fit into `memory_mb`, each is kept once read, except the training
    images when loader processes read them (num_workers > 0).

    Args:
        root: the folder.
        holdout: share of the readable images (of each class), chosen by a hash of their paths, that is the test split
            where there is no folder of one; 0 = the test split is the training split.
        background: colour behind transparent pixels.
        max_pixels: size beyond which images are refused before they are decoded.
        on_bad_image: `error` stops at the start and names the unreadable files, `skip` leaves them out, and what
            belongs to them, and says how many.
        memory_mb: limit of memory: images stay there if all need no more than this (in each training process).
        cache: folder for what was learnt of the files, so that only new or changed ones are decoded again.
    """

    root: Name = field(metadata={"role": Role.READING})
    holdout: Probability
    background: Background
    max_pixels: PositiveInt = field(metadata={"role": Role.NOT_PIXELS})
    on_bad_image: Literal["error", "skip"] = field(metadata={"role": Role.NOT_PIXELS | Role.MAY_CHANGE})
    memory_mb: PositiveInt = field(metadata={"role": Role.READING})
    cache: Name = field(metadata={"role": Role.READING})

    @abstractmethod
    def layout(self) -> dict[Split, list[Item]]:
        """All files of both splits, not yet checked; without `test` a share is held out. Raises UserError where there
        are none."""

    def look(self) -> Callable[[Path, int], str]:
        """What is asked of each file: (path, max_pixels) to why it cannot be used, "" where it can."""
        return check

    def prepare_data(self) -> None:
        """Check the files on one rank; the others find the result in the cache."""
        _ = self.index

    @cached_property
    def files(self) -> dict[Split, list[Item]]:
        """What `layout` gives; one line says which files under the root are no part of it."""
        files = self.layout()
        used = {name for items in files.values() for item in items for name in item.names}
        left = left_out(self.root, used | self.told_of())
        if left:
            tell(self.root, f"left out are {left}")
        return files

    def told_of(self) -> set[str]:
        """Further files under the root that are read, or of which a line says that they are not."""
        return set()

    def counted(self) -> dict[str, int]:
        return {split: len(items) for split, items in self.files.items()}

    @cached_property
    def checked(self) -> dict[str, Checked]:
        """What decoding each of `files` has shown."""
        names = {name: None for items in self.files.values() for item in items for name in item.names}
        return check_files(Path(self.root), list(names), self.max_pixels, Path(self.cache), self.look())

    @cached_property
    def index(self) -> dict[Split, list[Item]]:
        """The readable files of both splits."""
        reasons = {name: one.reason for name, one in self.checked.items() if one.reason}
        if reasons:
            self._refuse_or_tell(reasons)
        kept = {
            split: [item for item in items if not reasons.keys() & item.names] for split, items in self.files.items()
        }
        if "test" not in kept:
            kept = hold_out(kept["train"], self.holdout)
        for split, items in kept.items():
            if not items:
                raise self.none_left(split)
        return kept

    def none_left(self, split: Split, of: str = "") -> UserError:
        """The error where no readable image (`of` a domain) is in a split, by itself or after holding out."""
        held = split == "test" and "test" not in self.files
        fix = "data.on_bad_image=error, which names the others"
        fix = "data.holdout=0 (test on the training images), or more images" if held else fix
        return UserError("data.root", printable(self.root), f"no readable image{of} is left to {split}", fix)

    def reader(self, read_file: Callable[..., Tensor] = read) -> Callable[..., Tensor]:
        """`read_file` with the options of this set: (path, size=) to (C, size, size) uint8."""
        return partial(read_file, channels=self.image_channels, background=self.background, max_pixels=self.max_pixels)

    def views(
        self,
        split: Split,
        paths: list[Path],
        jitter: int,
        reader: Callable[..., Tensor] | None = None,
        pictures: int = 1,
    ) -> Views:
        """The files of a split, cut and mirrored as this set says; `reader` may give several pictures of each."""
        n_bytes = pictures * self.image_channels * Views.n_pixels(self.image_size, jitter)
        return Views(paths, reader or self.reader(), self.image_size, jitter, self.flip, self.keeps(split, n_bytes))

    def keeps(self, split: Split, n_bytes: int) -> bool:
        """Whether all images, of `n_bytes` each, fit into `memory_mb`, and one process reads them."""
        return self.fits(split, self.n_read(split) * n_bytes)

    def n_read(self, split: Split) -> int:
        """How many images there are in memory beside one another where a split is kept: those of both."""
        return sum(map(len, self.index.values()))

    def fits(self, split: Split, n_bytes: int) -> bool:
        """The same of `n_bytes` together."""
        return n_bytes / 2**20 <= self.memory_mb and (self.num_workers == 0 or split == "test")

    def files_fingerprint(self, split: Split) -> str:
        """The fingerprint of the files of a split: names, labels and contents."""
        return fingerprint([(name, item.label) for item in self.index[split] for name in item.names], self.checked)

    def _refuse_or_tell(self, reasons: dict[str, str]) -> None:
        problem = f"{len(reasons)} of {len(self.checked)} images cannot be read"
        first = "; ".join(f"{printable(name)} ({printable(reason)})" for name, reason in list(reasons.items())[:3])
        first += "; ..." if len(reasons) > 3 else ""
        if self.on_bad_image == "skip":
            touched = {
                name
                for items in self.files.values()
                for item in items
                for name in item.names
                if reasons.keys() & item.names
            }
            beside = f", with {n} that belong to them" if (n := len(touched) - len(reasons)) else ""
            line = f"{printable(self.root)}: {problem} and are left out{beside}: {first}"
            rank_zero_warn(line, category=UserWarning)
            return
        fix = "mend or remove them, or data.on_bad_image=skip"
        raise UserError("data.root", printable(self.root), f"{problem}: {first}", fix)


@dataclass(kw_only=True, eq=False)
class SingleFiles(ImageFiles, ABC):
    """Image files that are an image each.

    Args:
        masks: `mask`, what of each image is to be filled: "alpha", the object of a transparent image, all of it that
            is not transparent; "lama", strokes or boxes (Suvorov et al. 2022), drawn anew in training and the same for
            each image at test; "none", there is none.
    """

    masks: Masks = field(default="none", metadata={"role": Role.NOT_PIXELS | Role.OWN | Role.NOT_PART})

    @property
    def provides(self) -> frozenset[str]:
        return frozenset() if self.masks == "none" else frozenset({"mask"})

    def told(self, items: list[Item]) -> dict[str, Tensor | list[list[str]]]:
        """What is known of images beside their pixels, as `FileImages` takes it."""
        return {}

    def images(self, split: Split) -> FileImages:
        items, alpha = self.index[split], self.masks == "alpha"
        if alpha:
            self._refuse_opaque(split)
        return FileImages(
            [Path(self.root, item.name) for item in items],
            partial(self.reader(read_with_alpha if alpha else read), size=self.image_size),
            self.told(items),
            self.flip,
            self.keeps(split, (self.image_channels + alpha) * self.image_size**2),
            self.files_fingerprint(split),
            self.masks,
        )

    def _refuse_opaque(self, split: Split) -> None:
        names = [item.name for item in self.index[split]]
        opaque = [name for name in names if not has_alpha(Path(self.root, name))]
        where = f"of {len(names)} images to {split}"
        if len(opaque) == len(names):
            raise UserError("data.masks", "alpha", f"none {where} is transparent anywhere", "data.masks=lama")
        if opaque:
            what = f"{len(opaque)} {where} have no alpha, first {printable(opaque[0])}: their mask is all of them"
            tell(self.root, what)


@dataclass(kw_only=True, eq=False)
class ImageFolder(SingleFiles):
    """Any folder of images, without labels.

    With a train/ in it the training split is train/, else the whole folder; the test split is test/, val/ or another
    name of it beside train/ (the first that is there), else held out (`holdout`).
    """

    def layout(self) -> dict[Split, list[Item]]:
        return any_images(self.root)


def any_images(
    root: str, of_pairs: str = "", any_two: bool = False, items_of: Callable[[str], list[Item]] | None = None
) -> dict[Split, list[Item]]:
    """All images under `root`: of train/ and test/ where they are, else in one split.

    Args:
        of_pairs, any_two: advice for pairs, and what is taken for them, both as `refuse_pairs` has them.
        items_of: a folder under root to its items; None: each file is one.
    """
    train, test = split_folders(root)
    items_of = items_of or (lambda folder: list(map(Item, files_of(root, folder))))
    folders = {"train": train} if test is None else {"train": train, "test": test}
    for folder in folders.values():
        refuse_pairs(root, folder, of_pairs or "data=pairs, data=superres, data=classes data.n_classes=2", any_two)
    return {split: items_of(folder) for split, folder in folders.items()}


def hold_out(items: list[Item], share: float) -> dict[Split, list[Item]]:
    """Items to train and to test by the hash of their path, so that new files move no old one.

    Of each label by itself: one at least on each side where there are two, and the only one trains. Share 0 gives all
    of them to both.
    """
    if share == 0:
        return {"train": items, "test": items}
    test = {item for label in {item.label for item in items} for item in _held(items, label, share)}
    return {
        "train": [item for item in items if item not in test],
        "test": [item for item in items if item in test],
    }


def _held(items: list[Item], label: int, share: float) -> set[Item]:
    place = {item: _uniform(item.name) for item in items if item.label == label}
    by_place = sorted(place, key=place.__getitem__)
    return ({item for item in by_place if place[item] < share} | {by_place[0]}) - {by_place[-1]}


def _uniform(name: str) -> float:
    """A number in [0, 1) from a path, the same everywhere."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:7], "big") / 2**56
