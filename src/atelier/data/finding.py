"""Where image files lie: what of a folder is looked at, and in which order."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import stat
from pathlib import Path
from typing import NamedTuple

from atelier.core.errors import UserError, nearest
from atelier.core.words import word
from atelier.data.reading import SUFFIXES

REQUEST, GRID = "request.yaml", "grid.png"  # what sample.py writes beside its pictures, none of which the grid is
CAPTIONS = "captions.tsv"  # lines FILE<tab>CAPTION
SYSTEM = ("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "thumbs.db", "desktop.ini")


class Item(NamedTuple):
    """An image file: its path under the root, the number of its class (0 where there are none), and the path of the
    file that belongs to it ("" where there is none)."""

    name: str
    label: int = 0
    partner: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, self.partner) if self.partner else (self.name,)


def must_be_folder(root: str) -> None:
    """Raises UserError where `root` is none."""
    if not os.path.isdir(root):
        what = "this is no folder" if os.path.exists(root) else "no such folder"
        raise UserError("data.root", printable(root), what, other_root(root, "data=shapes"))


def files_of(root: str, folder: str) -> list[str]:
    """The image files under root/folder as paths from `root`, in natural order; none is a UserError."""
    names = image_files(Path(root, folder))
    if not names:
        _refuse_arrow(Path(root, folder))
        problem = f"0 images ({' '.join(SUFFIXES)}) under {printable(Path(root, folder))}"
        raise UserError("data.root", printable(root), problem, other_root(root, "data=shapes"))
    return [os.path.join(folder, name) for name in names]


def image_files(root: Path) -> list[str]:
    """Paths, from `root`, of the files under it that are named like images, in natural order.

    Of a folder that sample.py has written the pictures, and not the grid of them.
    """
    found = visible_files(root)
    grids = {os.path.join(os.path.dirname(name), GRID) for name in found if os.path.basename(name) == REQUEST}
    return [name for name in found if is_image(name) and name not in grids]


def holds_images(folder: Path) -> bool:
    """Whether there are any `image_files` under a folder; at once where one lies in it."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        if any(is_image(entry.name) and not entry.name.startswith(".") and entry.is_file() for entry in entries):
            return True
    return bool(image_files(folder))


def is_image(name: str) -> bool:
    """Whether a file is called like an image that can be read."""
    return name.lower().endswith(SUFFIXES)


def visible_files(root: Path) -> list[str]:
    """Paths, from `root`, of all files under it, in natural order; every folder is entered once."""
    top = root.resolve()
    entered = {_identity(folder.stat()) for folder in (top, *top.parents)}
    found, waiting = [], [""]
    while waiting:
        inside = waiting.pop()
        for name, status in _entries(root / inside):
            path = os.path.join(inside, name)
            if stat.S_ISDIR(status.st_mode) and _identity(status) not in entered:
                entered.add(_identity(status))
                waiting.append(path)
            elif stat.S_ISREG(status.st_mode):
                found.append(path)
    return sorted(found, key=natural)


def subfolders(root: Path) -> list[str]:
    """Names of the visible folders in `root`, in natural order."""
    return [name for name, status in _entries(root) if stat.S_ISDIR(status.st_mode)]


def natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """A sort key under which numbers count as numbers: a2 before a10."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(0, int(p), "") if p[0] in "0123456789" else (1, 0, p) for p in parts], name


def printable(path: str | Path) -> str:
    """A path that can be printed on one line whatever its bytes are."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def root_word(folder: Path) -> str:
    """`data.root=FOLDER` as it is typed; a path of other bytes than text can only be shown."""
    return word("data.root", str(folder)) if str(folder).isprintable() else f"data.root={printable(folder)}"


def other_root(root: str, instead: str) -> str:
    """What to type: the folder beside `root` with the closest name, if there is one, else another set."""
    here = Path(os.path.abspath(root))
    beside = []
    with contextlib.suppress(OSError, UserError):
        beside = [name for name in subfolders(here.parent) if name != here.name]
    close = nearest(here.name, beside)
    if close is None:
        return f"data.root=FOLDER that holds them, or {instead}"
    return f"{root_word(Path(root).parent / close)}, or {instead}"


def _refuse_arrow(folder: Path) -> None:
    """Raises UserError where a folder is what `datasets` saves: its images lie within Arrow files."""
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        fix = f"data=hugging_face {root_word(folder)}"
        raise UserError("data.root", printable(folder), "a Hugging Face dataset saved to disk, no image files", fix)


def _entries(folder: Path) -> list[tuple[str, os.stat_result]]:
    """Visible entries with what they are, or link to, in natural order; dead links are left out."""
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and entry.name.lower() not in SYSTEM:
                    with contextlib.suppress(OSError):
                        found.append((entry.name, entry.stat()))
    except OSError as error:
        fix = f"chmod -R u+rX {shlex.quote(printable(folder))}"
        raise UserError("data.root", printable(folder), str(error.strerror), fix) from error
    return sorted(found, key=lambda pair: natural(pair[0]))


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
