"""Datasets of Hugging Face as `datasets` saves them to disk: `hugging_face`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from atelier.core.errors import UserError, nearest
from atelier.core.ranges import Name, PositiveInt, Probability
from atelier.data.base import DataModule, Role, Split
from atelier.data.file_images import FileImages, Sourced
from atelier.data.finding import Item, must_be_folder, printable, tell
from atelier.data.folders import hold_out
from atelier.data.reading import Background, BadImage, read

if TYPE_CHECKING:
    from datasets import Dataset

Column = Literal["image", "source", "text", "instruction", "label"]
PICTURES = ("image", "source")
TEST_SPLITS = ("test", "validation", "val", "valid")
N_NAMED = 5  # columns that a line names first
ROWS_AT_ONCE = 256


@dataclass(kw_only=True, eq=False)
class HuggingFace(DataModule):
    """What `Dataset.save_to_disk` or `DatasetDict.save_to_disk` of the library `datasets` wrote.

    The training split is that called train, or the only one; the test split is that called test, validation, val or
    valid, else a share is held out; one line says which splits are not used. Rows are read as they are asked for, and
    one whose image cannot be read is a UserError; how an image becomes pixels: data/reading.py.
    A row with several texts gives one that is drawn each time in training, and the first at test.

    Args:
        root: the folder.
        columns: Batch field -> column that it stands in: `image`, and where there are any `source`, `text`,
            `instruction` and `label`; None: there is none. A source is cut and mirrored as its image is.
        holdout: share of the rows, chosen by a hash of their numbers, that is the test split where there is none.
        background: colour behind transparent pixels.
        max_pixels: size beyond which images are refused before they are decoded.
        memory_mb: limit of memory: images stay there if all need no more than this.
    """

    root: Name = field(metadata={"role": Role.READING})
    columns: dict[Column, Name | None]
    holdout: Probability
    background: Background
    max_pixels: PositiveInt = field(metadata={"role": Role.NOT_PIXELS})
    memory_mb: PositiveInt = field(metadata={"role": Role.READING})

    @property
    def there(self) -> dict[Column, str]:
        """The fields that have a column."""
        return {name: column for name, column in self.columns.items() if column is not None}

    @property
    def provides(self) -> frozenset[str]:
        return frozenset(self.there) - {"image"}

    @cached_property
    def tables(self) -> dict[str, Dataset]:
        """The splits as they are called, with images as the bytes of their files.

        Raises:
            UserError: nothing of the kind lies there, or a column is missing or holds something else.
        """
        must_be_folder(self.root)
        datasets = _library()
        try:
            found = datasets.load_from_disk(self.root)
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = "no dataset that save_to_disk of `datasets` wrote, or a damaged one"
            raise UserError("data.root", printable(self.root), problem, "data=captioned, or data=images") from error
        splits = dict(found) if isinstance(found, datasets.DatasetDict) else {"train": found}
        return {split: self._columns_of(table) for split, table in splits.items()}

    def _columns_of(self, table: Dataset) -> Dataset:
        datasets, kinds = _library(), table.features
        if "image" not in self.there:
            raise UserError("data.columns.image", None, "a set needs images", "data.columns.image=image")
        for name, column in self.there.items():
            if column not in kinds:
                has = ", ".join(map(printable, list(kinds)[:N_NAMED]))
                fix = f"data.columns.{name}={nearest(column, list(kinds)) or 'null'}"
                raise UserError(f"data.columns.{name}", column, f"no such column, but {has}", fix)
            if name in PICTURES and not isinstance(kinds[column], datasets.Image):
                pictures = [other for other in kinds if isinstance(kinds[other], datasets.Image)]
                fix = f"data.columns.{name}={pictures[0]}" if pictures else "another data.root"
                raise UserError(f"data.columns.{name}", column, "it holds no images", fix)
            if n := table.data.column(column).null_count:
                problem = f"{n} of {len(table)} rows have none"
                raise UserError(f"data.columns.{name}", column, problem, "leave those rows out before it is saved")
            if name in PICTURES:
                table = table.cast_column(column, datasets.Image(decode=False))
        return table.select_columns(list(dict.fromkeys(self.there.values())))

    @property
    def label_names(self) -> list[str]:
        """Those of a ClassLabel."""
        if "label" not in self.there:
            return []
        table = self.tables[self.index["train"][0]]
        return [printable(name) for name in getattr(table.features[self.there["label"]], "names", None) or []]

    @cached_property
    def index(self) -> dict[Split, tuple[str, list[int]]]:
        """Of both splits, the table and the numbers of its rows."""
        names = list(self.tables)
        train = "train" if "train" in names else names[0] if len(names) == 1 else None
        if train is None:
            problem = f"its splits are {', '.join(map(printable, names[:N_NAMED]))}, none of them train"
            raise UserError("data.root", printable(self.root), problem, "save it with a split called train")
        rows = {split: list(range(len(table))) for split, table in self.tables.items()}
        test = next((name for name in TEST_SPLITS if name in rows and name != train), None)
        if test is not None:
            return {"train": (train, rows[train]), "test": (test, rows[test])}
        held = hold_out([Item(str(row)) for row in rows[train]], self.holdout)
        return {split: (train, [int(item.name) for item in items]) for split, items in held.items()}

    def counted(self) -> dict[str, int]:
        return {split: len(rows) for split, (_, rows) in self.index.items()}

    def prepare_data(self) -> None:
        unused = self.tables.keys() - {name for name, _ in self.index.values()}
        rows = [f"{len(self.tables[name])} rows of the split {printable(name)}" for name in sorted(unused)]
        if rows:
            tell(self.root, f"left out are {', '.join(rows)}")

    def images(self, split: Split) -> FileImages | Sourced:
        name, rows = self.index[split]
        table, pictures = self.tables[name], [one for one in PICTURES if one in self.there]
        places = [Path(self.root, f"row {row} of {name}") for row in rows]
        n_bytes = sum(len(kept) for _, kept in self.index.values()) * len(pictures) * self.image_channels
        files = FileImages(
            places,
            partial(self._pixels, bytes_of=partial(_bytes, table, dict(zip(places, rows, strict=True)))),
            {name: self._told(name, table.select(rows)) for name in self.there if name not in PICTURES},
            self.flip,
            n_bytes * self.image_size**2 <= self.memory_mb << 20 and (self.num_workers == 0 or split == "test"),
            self._content(table, rows),
        )
        for place in places[:1]:  # so that what is wrong with all of them is said before training
            files.read_file(place)
        return Sourced(files, lambda both: both.chunk(2, dim=1)) if "source" in pictures else files

    def _pixels(self, place: Path, bytes_of: Callable[[Path, str], BytesIO]) -> Tensor:
        """The image of a row, and behind it its source, (C or 2 C, S, S) uint8.

        Raises:
            UserError: it cannot be read.
        """
        how = (self.image_size, self.image_channels, self.background, self.max_pixels)
        try:
            return torch.cat([read(bytes_of(place, self.there[one]), *how) for one in PICTURES if one in self.there])
        except BadImage as error:
            problem = f"the image of {place.name} cannot be read: {error}"
            fix = "leave such rows out before it is saved, or another data.columns.image"
            raise UserError("data.root", printable(self.root), problem, fix) from error

    def _content(self, table: Dataset, rows: list[int]) -> str:
        """A hash of all that is read of some rows; the library's own changes whenever a set is saved."""
        found = hashlib.sha256(json.dumps(self.there).encode())
        for batch in table.select(rows).iter(ROWS_AT_ONCE):
            for column in sorted(batch):
                for value in batch[column]:
                    inside = value["bytes"] if isinstance(value, dict) else None
                    found.update(json.dumps(value, default=str).encode() if inside is None else inside)
        return found.hexdigest()[:16]

    def _told(self, name: Column, table: Dataset) -> Tensor | list[list[str]]:
        """The labels of all rows, or the texts of each. Raises UserError where they are something else."""
        column = self.there[name]
        values, key = table[column][:], f"data.columns.{name}"
        if name == "label":
            if not all(type(value) is int and 0 <= value < self.n_classes for value in values):
                problem = f"a label that is no number from 0 up to data.n_classes={self.n_classes}"
                n = getattr(table.features[column], "num_classes", None) or 0
                fix = f"data.n_classes={n}" if n > self.n_classes else f"{key}=null"
                raise UserError(key, column, problem, fix)
            return torch.tensor(values)
        texts = [[value] if isinstance(value, str) else value for value in values]
        if not all(isinstance(some, list) and some and all(isinstance(one, str) for one in some) for some in texts):
            raise UserError(key, column, "a row that has no text there", f"{key}=null, or drop such rows")
        return texts


def _bytes(table: Dataset, rows: dict[Path, int], place: Path, column: str) -> BytesIO:
    """The file of an image, which lies in the table, or beside it. Raises BadImage."""
    kept: dict[str, Any] | None = table[rows[place]][column]
    if kept is None:
        raise BadImage("there is none")
    if kept["bytes"] is not None:
        return BytesIO(kept["bytes"])
    try:
        return BytesIO(Path(kept["path"]).read_bytes())
    except OSError as error:
        raise BadImage(f"{printable(kept['path'])}: {error.strerror}") from error


def _library() -> Any:
    """The library `datasets`, which takes seconds to import. Raises UserError where it is not installed."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            "data", "hugging_face", "the library datasets is not installed", "pip install datasets"
        ) from error
    return datasets
