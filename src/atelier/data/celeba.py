"""CelebA, aligned and cropped (Liu, Luo, Wang, Tang 2015): 202,599 faces, 178 x 218 pixels, 40 attributes."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from annotated_types import Interval, MinLen
from torch import Tensor
from torchvision import datasets

from atelier.core.errors import UserError, nearest
from atelier.core.ranges import Name, PositiveInt
from atelier.data.attribute_transfer import AttributeTransfer, changed
from atelier.data.base import DataModule, Role, Split, random_order
from atelier.data.checking import Checked, check_files, fingerprint
from atelier.data.file_images import FileImages
from atelier.data.finding import printable, root_word, subfolders, tell
from atelier.data.layouts import left_out
from atelier.data.published import absent, fetch
from atelier.data.reading import Box, check, read, upright_size

SOURCE = "mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
ATTRIBUTES, PARTITION, PHOTOGRAPHS = "list_attr_celeba.txt", "list_eval_partition.txt", "img_align_celeba"
PARTS = {"train": "0", "test": "2"}
VALIDATION = "1"
STARGAN, STARGAN_SEED, STARGAN_TEST = "images", 1234, 1999  # its folder, and how it takes a test part out
MAX_PIXELS = 64_000_000
WIDTH, HEIGHT = 178, 218  # of the photographs
OTHER_SIZE = f", not {WIDTH} x {HEIGHT} pixels"  # the end of what is said of one that has another
PUBLISHED = 40  # attributes
VALUES = {"1", "-1", "0"}
HAIR = ("Black_Hair", "Blond_Hair", "Brown_Hair", "Gray_Hair")  # a face is given one of them at most
CROPS: dict[str, Box | None] = {
    "ddim": (25, 57, 153, 185),
    "score_sde": (19, 39, 159, 179),
    "mimicry": (0, 20, 178, 198),
    "none": None,
}


@dataclass(kw_only=True, eq=False)
class CelebA(DataModule):
    """Images and 40 attributes (0 or 1, in the order of the file); 162,770 train, 19,962 test.

    `target`, the attributes that a face is to get, is that of another training image, drawn for each; of test
    images it is their own with one changed: see `changed`.

    Files in torchvision's layout: `<root>/celeba/` with img_align_celeba/, list_attr_celeba.txt and
    list_eval_partition.txt; the other lists are not needed. Or in StarGAN's (Choi et al. 2018): `<root>/celeba/` with
    images/ and list_attr_celeba.txt; 1,999 test images are those that its code takes, a tenth where there are fewer
    than 20,000, and all others train. Lists with commas, as Kaggle has them, and files in `root` itself are
    found too. One line says which files no use is made of. Crops of the 178 x 218 photographs (of others only "none"
    is taken), each then resized (antialiased bicubic) to `image_size`; an FID is comparable only under the same crop:

        ddim       128 x 128 centred at row 121, column 89 (Song, Meng, Ermon 2021; DDIM)
        score_sde  140 x 140 in the centre (Song et al. 2021; also WAE)
        mimicry    178 x 178 in the centre (Lee and Town 2020)
        N          N x N in the centre: 148, 108 and others in the literature
        none       the largest square in the centre, of files of any size

    Args:
        root: the folder that has `celeba/`.
        download: fetching of the files (1.4 GB, Google Drive, needs `pip install gdown`) if they are not there.
        crop: name of one of the above; N up to 178.
        memory_mb: limit of memory: the images of a split stay there, once read, if all of them need no more than this;
            not the training images when loader processes read them (num_workers > 0).
        attributes: names of those to use, in this order; None: all.
        cache: folder for what was learnt of the files, so that only new or changed ones are decoded again.
    """

    root: Name = field(metadata={"role": Role.READING})
    download: bool = field(metadata={"role": Role.READING})
    crop: Literal["ddim", "score_sde", "mimicry", "none"] | Annotated[int, Interval(ge=1, le=WIDTH)]
    memory_mb: PositiveInt = field(metadata={"role": Role.READING})
    attributes: Annotated[list[Name], MinLen(1)] | None = None
    cache: Name = field(default="data/cache", metadata={"role": Role.READING})

    provides: ClassVar[frozenset[str]] = frozenset({"attributes", "target"})

    @property
    def folder(self) -> Path:
        return place(self.root)

    @cached_property
    def listed(self) -> tuple[list[str], list[list[str]]]:
        """The attributes that the files have, and for each photograph its name and a value of each.

        Raises:
            UserError: the list was cut, is none, or has a photograph twice.
        """
        names, rows = parsed(self._lines(ATTRIBUTES))
        odd = next((row for row in rows if len(row) != 1 + len(names) or not set(row[1:]) <= VALUES), None)
        if not rows or odd is not None:
            said = f"has not 1 or -1 for each of {len(names)} attributes at {odd[0]}" if odd else "is empty"
            raise self._bad_list(ATTRIBUTES, said)
        self._refuse_twice(ATTRIBUTES, rows)
        return names, rows

    @cached_property
    def parts(self) -> dict[str, str]:
        """The part of each photograph that the list of parts has: 0, 1 or 2. Raises UserError as `listed` does."""
        rows = [line.replace(",", " ").split() for line in self._lines(PARTITION)]
        rows = rows[1:] if rows[:1] == [["image_id", "partition"]] else rows
        odd = next((row for row in rows if len(row) != 2 or row[1] not in {*PARTS.values(), VALIDATION}), None)
        if odd is not None:
            raise self._bad_list(PARTITION, f"has not 0, 1 or 2 at {odd[0]}")
        self._refuse_twice(PARTITION, rows)
        return dict(rows)

    def _refuse_twice(self, name: str, rows: list[list[str]]) -> None:
        seen: set[str] = set()
        for file, *_ in rows:
            if file in seen:
                raise self._bad_list(name, f"has {file} twice")
            seen.add(file)

    def _bad_list(self, name: str, said: str) -> UserError:
        problem = f"{printable(_found(self.folder / name))} {printable(said)}"
        return UserError("data.root", printable(self.root), problem, f"the whole list, from {SOURCE}")

    @property
    def known_names(self) -> list[str]:
        """The attributes that the files have, in their order."""
        return self.listed[0]

    @property
    def attribute_names(self) -> list[str]:
        return self.known_names if self.attributes is None else self.attributes

    @property
    def exclusive_attributes(self) -> list[list[str]]:
        return [[name for name in self.attribute_names if name in HAIR]]

    @property
    def photographs(self) -> Path:
        """The folder of the image files."""
        theirs, ours = self.folder / STARGAN, self.folder / PHOTOGRAPHS
        if theirs.is_dir() and not ours.exists():
            return theirs
        return ours / PHOTOGRAPHS if (ours / PHOTOGRAPHS).is_dir() else ours  # as Kaggle's archive unpacks

    def prepare_data(self) -> None:
        needed = (*self._lists, self.photographs.name)
        if self.download and not all(_found(self.folder / name).exists() for name in needed):
            fetch(self.root, lambda: datasets.CelebA(self.root, download=True))
        _ = self.checked
        if left := self._left_out():
            tell(self.root, f"left out are {left}")

    def counted(self) -> dict[str, int]:
        self._all_there([row[0] for rows in self._rows.values() for row in rows])
        return {split: len(rows) for split, rows in self._rows.items()}

    @property
    def _lists(self) -> list[str]:
        """The lists that are read."""
        return [ATTRIBUTES] if self.photographs.name == STARGAN else [ATTRIBUTES, PARTITION]

    def _left_out(self) -> str:
        """Which files no use is made of, and why; "" where there are none."""
        listed, inside = {row[0] for row in self.listed[1]}, os.path.relpath(self.photographs, self.folder)
        unused = listed - {row[0] for rows in self._rows.values() for row in rows}
        unused = {name for name in unused if (self.photographs / name).is_file()}
        validation = {name for name in unused if self.parts.get(name) == VALIDATION}
        whys = {"of the validation part": validation, f"that {PARTITION} has not": unused - validation}
        notes = [f"{len(names)} photographs {why}" for why, names in whys.items() if names]
        known = {os.path.join(inside, name) for name in listed} | {
            _found(self.folder / one).name for one in self._lists
        }
        return ", ".join([*notes, *filter(None, [left_out(str(self.folder), known)])])

    @cached_property
    def checked(self) -> dict[str, Checked]:
        """What decoding each photograph of both splits has shown; under `limit`, of those that are trained on.

        Raises:
            UserError: one is missing or damaged, or has another size than the crop is made for.
        """
        names = [*self._taken(), *(row[0] for row in self._rows["test"])]
        self._all_there(names)
        checked = check_files(self.photographs, names, MAX_PIXELS, Path(self.cache), check_photograph)
        sized = [name for name in names if checked[name].reason.endswith(OTHER_SIZE)]
        bad = [name for name in names if checked[name].reason and name not in sized]
        if bad:
            problem = (
                f"{len(bad)} of {len(names)} photographs cannot be read, first {bad[0]} ({checked[bad[0]].reason})"
            )
            raise UserError("data.root", printable(self.root), problem, "put whole files in their place")
        if sized and box(self.crop) is not None:
            first = f"{sized[0]} ({checked[sized[0]].reason.removesuffix(OTHER_SIZE)})"
            problem = (
                f"{len(sized)} of {len(names)} photographs have not the {WIDTH} x {HEIGHT} pixels that it is made for"
            )
            raise UserError("data.crop", self.crop, f"{problem}, first {first}", "data.crop=none")
        return checked

    def images(self, split: Split) -> AttributeTransfer:
        names, attributes = self._table(split)
        attributes = attributes[:, self._columns()]
        listed = [(name, row.tolist()) for name, row in zip(names, attributes.byte(), strict=True)]
        folder = self.photographs
        megabytes = len(names) * self.image_channels * self.image_size**2 / 2**20
        files = FileImages(
            [folder / name for name in names],
            partial(
                read,
                size=self.image_size,
                channels=self.image_channels,
                background="white",
                max_pixels=MAX_PIXELS,
                crop=box(self.crop),
            ),
            {"attributes": attributes},
            self.flip,
            megabytes <= self.memory_mb and (self.num_workers == 0 or split == "test"),
            fingerprint(listed, self.checked),
        )
        hair = [self.attribute_names.index(name) for group in self.exclusive_attributes for name in group]
        return AttributeTransfer(files, partial(changed, exclusive=hair))

    def _columns(self) -> list[int]:
        """Places of the asked attributes in the file."""
        names = self.attribute_names
        for name in names:
            if name not in self.known_names:
                fix = f"{nearest(name, self.known_names) or ', '.join(self.known_names[:5])} in its place"
                raise UserError("data.attributes", name, "the files have no such attribute", fix)
        if len(names) != self.n_attributes:
            whose = "what the files have" if self.attributes is None else "how many data.attributes names"
            problem = f"it is not {whose}"
            raise UserError("data.n_attributes", self.n_attributes, problem, f"data.n_attributes={len(names)}")
        return [self.known_names.index(name) for name in names]

    def _taken(self) -> list[str]:
        """The training images that `limit` leaves: the first in `order`, which is one without labels."""
        names = [row[0] for row in self._rows["train"]]
        return names if self.limit is None else [names[k] for k in random_order(len(names))[: self.limit]]

    @cached_property
    def _rows(self) -> dict[Split, list[list[str]]]:
        """The rows of the list of attributes that are of each split."""
        rows = self.listed[1]
        if self.photographs.name == STARGAN:
            return held_out(rows)
        of = {name: [row for row in rows if self.parts.get(row[0]) == part] for name, part in PARTS.items()}
        return of if of["test"] else held_out(of["train"])  # else the lists were cut

    def _table(self, split: Split) -> tuple[list[str], Tensor]:
        """File names of a split and their attributes (N, 40) float32."""
        rows = self._rows[split]
        values = np.array([row[1:] for row in rows], dtype=np.int8).reshape(len(rows), len(self.known_names))
        return [row[0] for row in rows], torch.from_numpy((values > 0).astype(np.float32))

    def _lines(self, name: str) -> list[str]:
        file = _found(self.folder / name)
        if not file.is_file():
            raise self._absent(f"no {file}")
        return [line for line in file.read_text("utf-8-sig", errors="replace").splitlines() if line.strip()]

    def _all_there(self, names: list[str]) -> None:
        folder = self.photographs
        if not folder.is_dir():
            raise self._absent(f"no {folder}/")
        missing = sorted(set(names) - {file.name for file in folder.iterdir()})
        if missing:
            problem = f"{len(missing)} of {len(names)} images are not in {folder}, first {missing[0]}"
            raise self._absent(problem)

    def _absent(self, missing: str) -> UserError:
        there = os.path.isdir(self.root) and not _found(self.folder / ATTRIBUTES).is_file()
        for below in subfolders(Path(self.root)) if there else []:
            if _found(place(deeper := Path(self.root, below)) / ATTRIBUTES).is_file():
                return UserError("data.root", printable(self.root), f"the files lie in {below}/", root_word(deeper))
        return absent(self.root, missing, SOURCE, self.download)


def place(root: str | Path) -> Path:
    """The folder of the files: <root>/celeba, or `root` itself where that is the folder with the list."""
    here = Path(root)
    return here if not (here / "celeba").is_dir() and _found(here / ATTRIBUTES).is_file() else here / "celeba"


def _found(file: Path) -> Path:
    """A list, or the same as Kaggle has it, with commas; a folder as it is."""
    comma = file.with_suffix(".csv")
    return comma if comma.is_file() and not file.exists() else file


def check_photograph(path: Path, max_pixels: PositiveInt) -> str:
    """Why a photograph cannot be read, as `check`; of one that can, its size where that is not the published one."""
    reason = check(path, max_pixels)
    size = (WIDTH, HEIGHT) if reason else upright_size(path)
    return reason if size == (WIDTH, HEIGHT) else f"{size[0]} x {size[1]}{OTHER_SIZE}"


def parsed(lines: list[str]) -> tuple[list[str], list[list[str]]]:
    """The names of attributes and the rows of a list of them, whose first line may be their number."""
    rows = [line.replace(",", " ").split() for line in lines]
    rows = rows[1:] if rows and len(rows[0]) == 1 and rows[0][0].isdigit() else rows
    names = rows[0] if rows else []
    return [name for name in names if name != "image_id"], rows[1:]


def held_out(rows: list[list[str]]) -> dict[Split, list[list[str]]]:
    """Lines of the list to train and to test as StarGAN's code parts them, a tenth where that is fewer than 1,999."""
    rows = list(rows)
    random.Random(STARGAN_SEED).shuffle(rows)
    n_test = max(1, min(STARGAN_TEST, len(rows) // 10))
    return {"train": rows[n_test:], "test": rows[:n_test]}


def box(crop: str | int) -> Box | None:
    """What is cut out of a photograph; None: nothing."""
    if not isinstance(crop, int):
        return CROPS[crop]
    left, top = (WIDTH - crop) // 2, (HEIGHT - crop) // 2
    return left, top, left + crop, top + crop


def n_listed(root: str, attributes: list[str] | None) -> int:
    """How many attributes a set has: those asked for, else those of its list; 40 where there is no list yet."""
    if attributes is not None:
        return len(attributes)
    try:
        with _found(place(root) / ATTRIBUTES).open(encoding="utf-8-sig", errors="replace") as file:
            return len(parsed([line for line in file.readlines(1 << 16) if line.strip()])[0]) or PUBLISHED
    except OSError:
        return PUBLISHED
