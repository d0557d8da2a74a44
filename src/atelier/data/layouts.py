"""What the folders of a set are called."""

from __future__ import annotations

import os

from atelier.data.finding import must_be_folder, printable
from atelier.errors import UserError

TEST_FOLDERS = ("test", "val", "validation")


def split_folders(root: str) -> tuple[str, str | None]:
    """The folders under `root` of the training and the test split: ("", None) where there is no train/."""
    must_be_folder(root)
    test = next((name for name in TEST_FOLDERS if os.path.isdir(os.path.join(root, name))), None)
    if os.path.isdir(os.path.join(root, "train")):
        return "train", test
    if test is not None:
        problem = f"there is a {test}/ but no train/"
        raise UserError("data.root", printable(root), problem, f"put the training images into {root}/train")
    return "", None
