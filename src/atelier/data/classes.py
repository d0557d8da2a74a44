"""Sets with a folder of image files for each class: `classes`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from torch.nn.functional import one_hot

from atelier.data.base import Images, Split
from atelier.data.finding import Item, files_of, other_root, printable, subfolders
from atelier.data.folders import Folder, hold_out
from atelier.data.layouts import split_folders
from atelier.data.recast import Recast, another
from atelier.errors import UserError


@dataclass(kw_only=True, eq=False)
class ClassFolders(Folder):
    """A folder for each class; labels number the folders in natural order.

    Layouts: <root>/<class>/ with a share of each class held out (`holdout`), or <root>/train/<class>/ and
    <root>/test/<class>/ (or val/, validation/), in which StarGAN keeps RaFD (Choi et al. 2018). `n_classes` must be
    the number of class folders.

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
        return frozenset({"label", "attributes", "target"} if self.n_attributes else {"label"})

    @property
    def attribute_names(self) -> list[str]:
        """What the classes are called."""
        return self._classes(split_folders(self.root)[0])

    def images(self, split: Split) -> Images:
        files = super().images(split)
        if not self.n_attributes:
            return files
        files.fields["attributes"] = one_hot(files.fields["label"], self.n_attributes).float()
        return Recast(files, another)

    def layout(self) -> dict[Split, list[Item]]:
        train, test = split_folders(self.root)
        classes = self._classes(train)
        files = [
            [Item(name, k) for name in files_of(self.root, os.path.join(train, one))] for k, one in enumerate(classes)
        ]
        if test is None:
            parts = [hold_out(items, self.holdout) for items in files]
            return {split: [item for part in parts for item in part[split]] for split in ("train", "test")}
        unknown = [one for one in subfolders(Path(self.root, test)) if one not in classes]
        if unknown:
            problem = f"{test}/ has the class {printable(unknown[0])}, {train}/ has not"
            fix = f"the same class folders in {train}/ and {test}/"
            raise UserError("data.root", printable(self.root), problem, fix)
        held = [
            Item(name, classes.index(one))
            for one in subfolders(Path(self.root, test))
            for name in files_of(self.root, os.path.join(test, one))
        ]
        return {"train": [item for items in files for item in items], "test": held}

    def _classes(self, train: str) -> list[str]:
        classes = subfolders(Path(self.root, train))
        if not classes:
            problem = f"no class folders in {printable(Path(self.root, train))}"
            raise UserError("data.root", printable(self.root), problem, other_root(self.root, "data=images"))
        if len(classes) != self.n_classes:
            named = ", ".join(map(printable, classes[:5])) + (", ..." if len(classes) > 5 else "")
            problem = f"{printable(Path(self.root, train))} has {len(classes)} class folders ({named})"
            raise UserError("data.n_classes", self.n_classes, problem, f"data.n_classes={len(classes)}")
        return classes
