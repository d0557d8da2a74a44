"""Sets that are folders of image files: `images`, without labels, and what the other sets of files are made of."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, NamedTuple

import PIL
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import get_worker_info

from atelier.batch import Batch
from atelier.data.base import DataModule, Images, Split, mirrored, tossed
from atelier.data.reading import SUFFIXES, Background, BadImage, check, read
from atelier.errors import UserError, nearest
from atelier.pixels import to_float
from atelier.ranges import Name, PositiveInt, Probability

TEST_FOLDERS = ("test", "val", "validation")


class Item(NamedTuple):
    """An image file: its path under the root, the number of its class (0 where there are none), and the path of the
    file that belongs to it ("" where there is none)."""

    name: str
    label: int = 0
    partner: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, self.partner) if self.partner else (self.name,)


class Checked(NamedTuple):
    """A file of this size and age has been decoded; `reason` is "" where that went well."""

    size: int
    mtime_ns: int
    reason: str


class FileImages:
    """Images read from files.

    Args:
        paths: one file for each image.
        read_file: path to (C, S, S) uint8; raises BadImage.
        fields: further Batch fields, (N, ...) tensors.
        flip: mirror half of the images when generators are given.
        keep: keep each image as uint8 in memory once it has been read.
        fingerprint: what tells this set from another.

    A file that has become unreadable since it was checked is a UserError with its path.
    """

    def __init__(
        self,
        paths: list[Path],
        read_file: Callable[[Path], Tensor],
        fields: dict[str, Tensor],
        flip: bool,
        keep: bool,
        fingerprint: str,
    ) -> None:
        self.paths, self.read_file, self.fields = paths, read_file, fields
        self.flip, self.keep, self.fingerprint = flip, keep, fingerprint
        self.labels = fields.get("label")
        self._kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: list[int], rngs: list[torch.Generator] | None) -> Batch:
        where = torch.tensor(indices)
        batch: Batch = {"image": to_float(self._pixels(indices)), "index": where}
        batch.update({name: values[where] for name, values in self.fields.items()})
        if self.flip and rngs is not None:
            batch["image"] = mirrored(batch["image"], tossed(rngs))
        return batch

    def _pixels(self, indices: list[int]) -> Tensor:
        pixels = {index: self._kept[index] for index in indices if index in self._kept}
        missing = [index for index in indices if index not in pixels]
        if missing:
            with ThreadPoolExecutor(_threads()) as pool:
                pixels.update(zip(missing, pool.map(self._decoded, missing), strict=True))
        if self.keep:
            self._kept.update(pixels)
        return torch.stack([pixels[index] for index in indices])

    def _decoded(self, index: int) -> Tensor:
        return decoded(self.paths[index], self.read_file)


def decoded(path: Path, read_file: Callable[[Path], Tensor]) -> Tensor:
    """What `read_file` gives of a file that could be read when it was checked. Raises UserError."""
    try:
        return read_file(path)
    except BadImage as error:
        problem = f"the image {printable(path.name)} cannot be read any more: {error}"
        raise UserError("data.root", printable(path.parent), problem, "put the file back") from error


class Views:
    """Files at one size; in training a random part of each at a larger one (random jitter: Isola, Zhu, Zhou, Efros
    2017, appendix 6.2, which cut 256 pixels out of 286).

    Args:
        paths: one file for each image.
        read_file: (path, size=) to (C, size, size) uint8; raises BadImage.
        image_size: S.
        jitter: how many pixels larger than S the whole is in training.
        flip: mirror half of the images in training.
        keep: keep what has been read as uint8 in memory.
    """

    def __init__(
        self,
        paths: list[Path],
        read_file: Callable[..., Tensor],
        image_size: int,
        jitter: int,
        flip: bool,
        keep: bool,
    ) -> None:
        self.plain = FileImages(paths, partial(read_file, size=image_size), {}, False, keep, "")
        wide = partial(read_file, size=image_size + jitter)
        self.wide = FileImages(paths, wide, {}, False, keep, "") if jitter else self.plain
        self.image_size, self.jitter, self.flip = image_size, jitter, flip

    @staticmethod
    def n_pixels(image_size: int, jitter: int) -> int:
        """How many pixels of an image may be kept."""
        return image_size**2 + ((image_size + jitter) ** 2 if jitter else 0)

    def __len__(self) -> int:
        return len(self.plain)

    def draw(self, indices: list[int], rngs: list[torch.Generator] | None) -> Tensor:
        """(B, C, S, S) in [-1, 1]; rngs[i] says where image i is cut and whether it is mirrored, None means neither."""
        if rngs is None:
            return self.plain.read(indices, None)["image"]
        images = self.wide.read(indices, None)["image"]
        if self.jitter:
            images = torch.stack([self._part(image, rng) for image, rng in zip(images, rngs, strict=True)])
        return mirrored(images, tossed(rngs)) if self.flip else images

    def _part(self, image: Tensor, rng: torch.Generator) -> Tensor:
        top, left = torch.randint(self.jitter + 1, (2,), generator=rng).tolist()
        return image[:, top : top + self.image_size, left : left + self.image_size]


@dataclass(kw_only=True, eq=False)
class Folder(DataModule, ABC):
    """Image files under one folder, each decoded once at the start to find the unreadable ones.

    The files are those named .png .jpg .jpeg .webp .bmp (any case) at any depth, in natural order (2 before
    10); hidden ones, pipes, sockets, broken links and links back to where the search came from are passed
    over. How a file becomes pixels: data/reading.py. Where all images of both splits fit into `memory_mb`,
    each is kept once read, except the training images when loader processes read them (num_workers > 0).

    Args:
        root: the folder.
        holdout: share of the images, chosen by a hash of their paths, that is the test split where there is
            no test/, val/ or validation/; 0 = the test split is the training split.
        background: what lies behind transparent pixels.
        max_pixels: refuse larger images before decoding them.
        on_bad_image: `error` stops at the start and names the unreadable files, `skip` leaves them out and
            says how many.
        memory_mb: keep the images in memory if all need no more than this (in each training process).
        cache: folder for what was learnt of the files, so that only new or changed ones are decoded again.
    """

    root: Name
    holdout: Probability
    background: Background
    max_pixels: PositiveInt
    on_bad_image: Literal["error", "skip"]
    memory_mb: PositiveInt
    cache: Name

    @abstractmethod
    def layout(self) -> dict[Split, list[Item]]:
        """All files of both splits, not yet checked. Raises UserError where there are none."""

    def look(self) -> Callable[[Path, int], str]:
        """What is asked of each file: (path, max_pixels) to why it cannot be used, "" where it can."""
        return check

    def prepare_data(self) -> None:
        """Check the files on one rank; the others find the result in the cache."""
        _ = self.index

    @cached_property
    def files(self) -> dict[Split, list[Item]]:
        """All files of both splits."""
        return self.layout()

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
        for split, items in kept.items():
            if not items:
                fix = "more images, or data.holdout=0 (test on the training images)"
                problem = f"no readable image is left to {split}"
                raise UserError("data.root", printable(self.root), problem, fix)
        return kept

    def images(self, split: Split) -> Images:
        items = self.index[split]
        return FileImages(
            [Path(self.root, item.name) for item in items],
            partial(self.reader(), size=self.image_size),
            {"label": torch.tensor([item.label for item in items])} if "label" in self.provides else {},
            self.flip,
            self.keeps(split, self.channels * self.image_size**2),
            self.told(split),
        )

    def reader(self, read_file: Callable[..., Tensor] = read) -> Callable[..., Tensor]:
        """`read_file` with the options of this set: (path, size=) to (C, size, size) uint8."""
        return partial(read_file, channels=self.channels, background=self.background, max_pixels=self.max_pixels)

    def views(
        self,
        split: Split,
        paths: list[Path],
        jitter: int,
        reader: Callable[..., Tensor] | None = None,
        pictures: int = 1,
    ) -> Views:
        """The files of a split, cut and mirrored as this set says; `reader` may give several pictures of each."""
        n_bytes = pictures * self.channels * Views.n_pixels(self.image_size, jitter)
        return Views(paths, reader or self.reader(), self.image_size, jitter, self.flip, self.keeps(split, n_bytes))

    def keeps(self, split: Split, n_bytes: int) -> bool:
        """Whether all images, of `n_bytes` each, fit into `memory_mb`, and one process reads them."""
        return self.fits(split, sum(map(len, self.index.values())) * n_bytes)

    def fits(self, split: Split, n_bytes: int) -> bool:
        """The same of `n_bytes` together."""
        return n_bytes / 2**20 <= self.memory_mb and (self.num_workers == 0 or split == "test")

    def told(self, split: Split) -> str:
        """The fingerprint of the files of a split: names, labels and sizes."""
        files = [(name, item.label) for item in self.index[split] for name in item.names]
        told = "".join(f"{name}\0{label}\0{self.checked[name].size}\n" for name, label in files)
        return hashlib.sha256(os.fsencode(told)).hexdigest()[:16]

    def _refuse_or_tell(self, reasons: dict[str, str]) -> None:
        told = f"{len(reasons)} of {len(self.checked)} images cannot be read"
        if self.on_bad_image == "skip":
            rank_zero_warn(f"{printable(self.root)}: {told} and are left out", category=UserWarning)
            return
        first = "; ".join(f"{printable(name)} ({reason})" for name, reason in list(reasons.items())[:3])
        more = "; ..." if len(reasons) > 3 else ""
        fix = "mend or remove them, or data.on_bad_image=skip"
        raise UserError("data.root", printable(self.root), f"{told}: {first}{more}", fix)


@dataclass(kw_only=True, eq=False)
class ImageFolder(Folder):
    """Any folder of images, without labels.

    With a train/ in it the training split is train/, else the whole folder; the test split is test/, val/ or
    validation/ beside train/ (the first that is there), else held out (`holdout`).
    """

    def layout(self) -> dict[Split, list[Item]]:
        return any_images(self.root, self.holdout)


def any_images(
    root: str, holdout: float, items_of: Callable[[str], list[Item]] | None = None
) -> dict[Split, list[Item]]:
    """All images under `root`: of train/ and test/ where they are, else a share of them held out.

    Args:
        items_of: a folder under root to its items; None: each file is one.
    """
    train, test = split_folders(root)
    items_of = items_of or (lambda folder: list(map(Item, files_of(root, folder))))
    files = items_of(train)
    return hold_out(files, holdout) if test is None else {"train": files, "test": items_of(test)}


def must_be_folder(root: str) -> None:
    """Raises UserError where `root` is none."""
    if not os.path.isdir(root):
        what = "this is no folder" if os.path.exists(root) else "no such folder"
        raise UserError("data.root", printable(root), what, other_root(root, "data=shapes"))


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


def files_of(root: str, folder: str) -> list[str]:
    """The image files under root/folder as paths from `root`, in natural order; none is a UserError."""
    names = image_files(Path(root, folder))
    if not names:
        problem = f"0 images ({' '.join(SUFFIXES)}) under {printable(Path(root, folder))}"
        raise UserError("data.root", printable(root), problem, other_root(root, "data=shapes"))
    return [os.path.join(folder, name) for name in names]


def image_files(root: Path) -> list[str]:
    """Paths, from `root`, of the files under it that are named like images; every folder is entered once."""
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
            elif stat.S_ISREG(status.st_mode) and name.lower().endswith(SUFFIXES):
                found.append(path)
    return sorted(found, key=natural)


def subfolders(root: Path) -> list[str]:
    """Names of the visible folders in `root`, in natural order."""
    return [name for name, status in _entries(root) if stat.S_ISDIR(status.st_mode)]


def natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """A sort key under which numbers count as numbers: a2 before a10."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(0, int(p), "") if p[0] in "0123456789" else (1, 0, p) for p in parts], name


def hold_out(items: list[Item], share: float) -> dict[Split, list[Item]]:
    """Items to train and to test by the hash of their path, so that new files move no old one.

    One at least on each side where there are two; share 0 gives all of them to both.
    """
    if share == 0:
        return {"train": items, "test": items}
    place = {item: _uniform(item.name) for item in items}
    test = {item for item in items if place[item] < share}
    if len(items) > 1:
        by_place = sorted(items, key=place.__getitem__)
        test = (test | {by_place[0]}) - {by_place[-1]}
    return {
        "train": [item for item in items if item not in test],
        "test": [item for item in items if item in test],
    }


def check_files(
    root: Path,
    names: Iterable[str],
    max_pixels: int,
    cache: Path,
    look: Callable[[Path, int], str] | None = None,
) -> dict[str, Checked]:
    """Decode every file once; those whose size and time are as the cache says are not decoded again.

    `look` is what is asked of a file, `reading.check` where it is not given.

    The cache is one JSON file for each root, written beside and renamed; one that is damaged, or that cannot
    be written, costs only time.
    """
    look = look or check
    rule = f"{max_pixels} {PIL.__version__}" + ("" if look is check else f" {look.__name__}")
    file = cache / f"checked_{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]}.json"
    known = _cached(file, rule)

    def one(name: str) -> tuple[str, Checked]:
        status = os.stat(root / name)
        before = known.get(name)
        if before is not None and before[:2] == (status.st_size, status.st_mtime_ns):
            return name, before
        return name, Checked(status.st_size, status.st_mtime_ns, look(root / name, max_pixels))

    with ThreadPoolExecutor(_threads()) as pool:
        checked = dict(pool.map(one, names))
    if checked != known:
        _write(file, {"rule": rule, "files": checked})
    return checked


def printable(path: str | Path) -> str:
    """A path that can be printed on one line whatever its bytes are."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def _cached(file: Path, rule: str) -> dict[str, Checked]:
    try:
        stored = json.loads(file.read_text())
        files = stored["files"] if stored["rule"] == rule else {}
        return {name: Checked(*values) for name, values in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write(file: Path, content: dict) -> None:
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(content))
        part.replace(file)


def _entries(folder: Path) -> list[tuple[str, os.stat_result]]:
    """Visible entries with what they are, or link to, in natural order; dead links are left out."""
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    with contextlib.suppress(OSError):
                        found.append((entry.name, entry.stat()))
    except OSError as error:
        fix = f"chmod -R u+rX {printable(folder)}"
        raise UserError("data.root", printable(folder), str(error.strerror), fix) from error
    return sorted(found, key=lambda pair: natural(pair[0]))


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _uniform(name: str) -> float:
    """A number in [0, 1) from a path, the same everywhere."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:7], "big") / 2**56


def other_root(root: str, instead: str) -> str:
    """What to type: the folder beside `root` with the closest name, if there is one, else another set."""
    here = Path(os.path.abspath(root))
    beside = []
    with contextlib.suppress(OSError, UserError):
        beside = [name for name in subfolders(here.parent) if name != here.name]
    close = nearest(here.name, beside)
    if close is None:
        return f"data.root=FOLDER that holds them, or {instead}"
    return f"data.root={printable(Path(root).parent / close)}, or {instead}"


def _threads() -> int:
    """Decoders run at once: one in a loader process, else one for each core."""
    return 1 if get_worker_info() is not None else min(16, os.cpu_count() or 1)
