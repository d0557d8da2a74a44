"""Where image files lie: what of a folder is looked at, and in which order."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
import stat
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from atelier.core.errors import UserError, nearest
from atelier.core.launchers import rank
from atelier.core.lines import say
from atelier.core.words import word
from atelier.data.reading import SUFFIXES

REQUEST, GRID = "request.yaml", "grid.png"  # what sample.py writes beside its pictures, none of which the grid is
CAPTIONS = "captions.tsv"  # lines FILE<tab>CAPTION
SYSTEM = (
    "__macosx", ".ds_store", "@eadir", "$recycle.bin", "system volume information", "lost+found", "thumbs.db",
    "desktop.ini",
)  # fmt: skip
RESOURCES = "._"  # how the files begin that macOS puts beside each of a user's


class Listing(NamedTuple):
    """What lies under a folder.

    `files` are the paths, from there, of all visible files in natural order; every folder is entered once. `others`
    counts what of the user's is passed over, by what it is; what systems leave (SYSTEM, RESOURCES) is nobody's.
    """

    files: list[str]
    others: Counter[str]


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
    return images_among(visible_files(root))


def images_among(files: list[str]) -> list[str]:
    """Those of all files under a folder that are `image_files`."""
    grids = {os.path.join(os.path.dirname(name), GRID) for name in files if os.path.basename(name) == REQUEST}
    return [name for name in files if is_image(name) and name not in grids]


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
    """The `files` that are `found_under` a folder."""
    return found_under(root).files


def found_under(root: Path) -> Listing:
    """All that lies under a folder. Raises UserError where a folder cannot be read."""
    entered, files, others, waiting = _chain(root), [], Counter(), [""]
    while waiting:
        inside = waiting.pop()
        for name, status in _entries(root / inside, others):
            path = os.path.join(inside, name)
            if stat.S_ISREG(status.st_mode):
                files.append(path)
            elif not stat.S_ISDIR(status.st_mode):
                others["pipes, sockets or devices"] += 1
            elif _identity(status) not in entered:
                entered.add(_identity(status))
                waiting.append(path)
    return Listing(sorted(files, key=natural), others)


def passed_over(found: Listing) -> list[str]:
    """What of all that was found is no image by its name, and how much of it, as a line tells it."""
    suffixes = Counter(os.path.splitext(name)[1].lower() or "no suffix" for name in found.files if not is_image(name))
    kinds = ", ".join(f"{n} {printable(one)}" for one, n in suffixes.most_common(4)) + ", ..." * (len(suffixes) > 4)
    formats = [f"{sum(suffixes.values())} files of formats that are not read ({kinds})"] if suffixes else []
    return formats + [f"{n} {what}" for what, n in found.others.items()]


def identity(path: Path) -> tuple[int, int]:
    """What two paths of one file or folder share."""
    return _identity(path.stat())


def subfolders(root: Path) -> list[str]:
    """Names of the visible folders in `root`, in natural order, but of links to itself or to what it lies in."""
    above = _chain(root)
    return [name for name, status in _entries(root) if stat.S_ISDIR(status.st_mode) and _identity(status) not in above]


def natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """A sort key under which numbers count as numbers: a2 before a10."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(0, int(p), "") if p[0] in "0123456789" else (1, 0, p) for p in parts], name


def printable(path: str | Path) -> str:
    """A path that can be printed on one line whatever its bytes are."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def tell(root: str, what: str) -> None:
    """One line about the files of a set, once for all ranks."""
    if rank() == 0:
        say(f"{printable(root)}: {what}", error=True)


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


def _entries(folder: Path, others: Counter[str] | None = None) -> list[tuple[str, os.stat_result]]:
    """Visible entries with what they are, or link to, in natural order; `others` counts what is left out of them."""
    found, others = [], Counter() if others is None else others
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.lower() in SYSTEM or entry.name.startswith(RESOURCES):
                    continue
                if entry.name.startswith("."):
                    others["hidden files or folders"] += 1
                elif (status := _status(entry)) is None:
                    others["links that lead nowhere"] += 1
                else:
                    found.append((entry.name, status))
    except OSError as error:
        denied = error.errno in (errno.EACCES, errno.EPERM)
        fix = (
            f"chmod -R u+rX {shlex.quote(printable(folder))}" if denied else "another data.root, or remove that folder"
        )
        raise UserError("data.root", printable(folder), str(error.strerror), fix) from error
    return sorted(found, key=lambda pair: natural(pair[0]))


def _status(entry: os.DirEntry) -> os.stat_result | None:
    """What an entry is, or links to; None for a link whose end cannot be seen."""
    try:
        return entry.stat()
    except OSError:
        if entry.is_symlink():
            return None
        raise


def _chain(root: Path) -> set[tuple[int, int]]:
    """A folder and all that it lies in."""
    top = root.resolve()
    return {identity(folder) for folder in (top, *top.parents)}


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
