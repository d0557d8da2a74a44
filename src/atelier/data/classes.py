"""Sets with a folder of image files for each class: `classes`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from atelier.core.errors import UserError
from atelier.data.attribute_transfer import AttributeTransfer, another
from atelier.data.base import Images, Split
from atelier.data.finding import Item, files_of, holds_images, image_files, other_root, printable, subfolders, tell
from atelier.data.folders import SingleFiles
from atelier.data.layouts import refuse_deeper, split_folders


@dataclass(kw_only=True, eq=False)
class ClassFolders(SingleFiles):
    """A folder for each class; labels number the folders in natural order.

    Layouts: <root>/<class>/ with a share of each class held out (`holdout`), or <root>/train/<class>/ and
    <root>/test/<class>/ (or val/ and other names of it), in which StarGAN keeps RaFD (Choi et al. 2018). `n_classes`
    must be the number of class folders that have images; the only image of a class is trained on, and a class of which
    none can be read is a UserError.

    With `n_attributes` as many, there are `attributes` too, of which an image has the one that is its class, and
    `target`, what it is to become: the class of another training image, drawn for each; of test images each of the
    other classes in turn.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_attributes and self.n_classes < 2:
            problem = f"attributes are the classes here, and there are {self.n_classes}"
            raise UserError("data.n_attributes", self.n_attributes, problem, "data.n_attributes=0")
        if self.n_attributes not in (0, self.n_classes):
            problem = f"attributes are the classes here, and there are {self.n_classes}"
            fix = f"data.n_classes={self.n_attributes}, or data.n_attributes={self.n_classes}"
            raise UserError("data.n_attributes", self.n_attributes, problem, fix)

    @property
    def provides(self) -> frozenset[str]:
        return super().provides | ({"label", "attributes", "target"} if self.n_attributes else {"label"})

    @property
    def label_names(self) -> list[str]:
        return [printable(one) for one in self._classes]

    @property
    def attribute_names(self) -> list[str]:
        return self.label_names if self.n_attributes else []

    @property
    def exclusive_attributes(self) -> list[list[str]]:
        return [self.attribute_names] if self.n_attributes else []

    def told(self, items: list[Item]) -> dict[str, Tensor | list[list[str]]]:
        return {"label": torch.tensor([item.label for item in items])}

    def images(self, split: Split) -> Images:
        of = {item.label for item in self.index["train"]}
        bare = [one for k, one in enumerate(self._classes) if k not in of]
        if bare:
            problem = f"no image of the class {printable(bare[0])} can be read"
            raise UserError("data.root", printable(self.root), problem, "mend one, or remove the folder of that class")
        files = super().images(split)
        if not self.n_attributes:
            return files
        files.fields["attributes"] = one_hot(files.fields["label"], self.n_attributes).float()
        return AttributeTransfer(files, another)

    def layout(self) -> dict[Split, list[Item]]:
        train, test = class_splits(self.root)
        files = {"train": self._items(self._classes)}
        if test is None:
            return files
        of_test = class_files(self.root, test)
        unknown = [one for one in of_test if one not in self._classes]
        if unknown:
            problem = f"{test}/ has the class {printable(unknown[0])}, {train}/ has not"
            fix = f"the same class folders in {train}/ and {test}/"
            raise UserError("data.root", printable(self.root), problem, fix)
        return files | {"test": self._items(of_test)}

    @cached_property
    def _classes(self) -> dict[str, list[str]]:
        """The classes with their training files. Raises UserError where there are not as many as asked for."""
        train, _ = class_splits(self.root)
        folders, place = subfolders(Path(self.root, train)), printable(Path(self.root, train))
        if not folders:
            problem = f"no class folders in {place}"
            raise UserError("data.root", printable(self.root), problem, other_root(self.root, "data=images"))
        refuse_deeper(self.root, train, folders)
        classes = class_files(self.root, train)
        if not classes:
            files_of(self.root, train)  # which refuses
        if len(classes) != self.n_classes:
            named = ", ".join(map(printable, list(classes)[:5])) + (", ..." if len(classes) > 5 else "")
            empty = f", {len(folders) - len(classes)} without images" if len(folders) > len(classes) else ""
            problem = f"{place} has {len(classes)} class folders ({named}){empty}"
            raise UserError("data.n_classes", self.n_classes, problem, f"data.n_classes={len(classes)}")
        if len(folders) > len(classes):
            empty = ", ".join(printable(one) for one in folders if one not in classes)
            tell(self.root, f"{empty}: no images, so no class")
        return classes

    def _items(self, files: dict[str, list[str]]) -> list[Item]:
        numbers = {one: k for k, one in enumerate(self._classes)}
        return [Item(name, numbers[one]) for one, names in files.items() for name in names]


def class_splits(root: str) -> tuple[str, str | None]:
    """As `split_folders`; but a train/ without class folders, beside others, is the class of trains."""
    train, test = split_folders(root)
    a_class = train and test is None and not subfolders(Path(root, train))
    return ("", None) if a_class and len(subfolders(Path(root))) > 1 else (train, test)


def class_files(root: str, split: str) -> dict[str, list[str]]:
    """The class folders in root/split that have images, with their paths from `root`, in natural order."""
    found = {one: image_files(Path(root, split, one)) for one in subfolders(Path(root, split))}
    return {one: [os.path.join(split, one, name) for name in names] for one, names in found.items() if names}


def n_folders(root: str) -> int:
    """How many classes there are in `root`; 1 where it cannot be read, which opening the set reports."""
    try:
        place = Path(root, class_splits(root)[0])
        return max(1, sum(holds_images(place / one) for one in subfolders(place)))
    except UserError:
        return 1
