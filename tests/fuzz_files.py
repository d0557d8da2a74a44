"""Folders of odd files, and what becomes of every file in them: `python -m tests.fuzz_files [FILES] [SEED]`.

Each folder goes through what train.py does with it (both values of on_bad_image) and through `sample.py source=FOLDER`.
A file must be read as what it shows, or be counted by a line that leaves it out, or be named by one line that refuses
the folder. What else happens is a fault: each is printed, and the exit code is 1.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from atelier.core.batch import Batch
from atelier.core.errors import UserError
from atelier.core.names import SetNames
from atelier.core.rng import generator
from atelier.data.base import DataModule
from atelier.data.finding import GRID, REQUEST, is_image, printable
from atelier.requests import files
from atelier.requests.folder import Folder
from atelier.requests.request import Request
from atelier.runs import build
from atelier.runs.folders import register
from atelier.runs.pages import CONF
from tests import odd_files
from tests.odd_files import Kind, Rng, picture

SIZE = 16  # of the images that are read
OFF = 16  # levels of 256 that a quarter of an image may differ by: JPEG and resizing
NOBODY = 65534  # who may not read a file of mode 000, as root may
SECONDS = 20  # for a folder
SILENT = (".ds_store", "__macosx", "@eadir", "thumbs.db", "desktop.ini")  # what systems leave, of which no line is due


@dataclass
class Item:
    """What is to be read of a file, and beside it: pictures (H, W, 3), the file that belongs to it, its label, ..."""

    image: np.ndarray | None
    source: np.ndarray | None = None
    partner: str = ""
    told: dict[str, Any] = field(default_factory=dict)

    def files(self, name: str) -> list[str]:
        return [name, self.partner] if self.partner else [name]


@dataclass
class Case:
    """A folder and what is known of it.

    `shown`: file -> what it shows, None where it cannot be read. `maybe`: files that were cut, which may be refused or
    read whole. `torn`: those that have no halves. `reasons`: what a line may say that refuses the folder as it is.
    """

    page: str
    root: Path
    rng: Rng
    words: dict[str, Any] = field(default_factory=dict)
    shown: dict[str, np.ndarray | None] = field(default_factory=dict)
    maybe: set[str] = field(default_factory=set)
    torn: set[str] = field(default_factory=set)
    items: dict[str, Item] = field(default_factory=dict)
    lists: set[str] = field(default_factory=set)
    reasons: list[str] = field(default_factory=list)
    as_nobody: bool = False
    damaged: float = 0.15  # the share of the files
    splits: list[str] = field(default_factory=list)
    n: int = 0

    @property
    def bad(self) -> set[str]:
        """The files that must be refused."""
        return {name for name, shown in self.shown.items() if shown is None} | self.torn

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def write(self, name: str, content: bytes) -> str:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return name

    def stem(self) -> str:
        self.n += 1
        return odd_files.stem(self.rng, self.n)

    def image(self, base: str, kind: Kind, x: np.ndarray) -> str:
        """An image file called base + the suffix of its kind."""
        suffix, content, shown = kind(self.rng, x)
        name = self.write(base + suffix, content)
        self.shown[name] = x if kind is odd_files.cut else shown
        if kind is odd_files.cut:
            self.maybe.add(name)
        elif kind is not odd_files.PLAIN[0] and self.as_nobody and self.chance(0.2):
            (self.root / name).chmod(0)
            self.shown[name] = None
        return name

    def drawn(self, folder: str, width: int, height: int, damaged: float | None = None) -> str:
        """An image file of any kind, perhaps a damaged one."""
        return self.image(os.path.join(folder, self.stem()), self.kind(damaged), picture(self.rng, width, height))

    def kind(self, damaged: float | None = None) -> Kind:
        kinds = odd_files.DAMAGED if self.chance(self.damaged if damaged is None else damaged) else odd_files.WHOLE
        return kinds[self.rng.integers(len(kinds))]

    def size(self, least: int = 1) -> tuple[int, int]:
        """Width and height, now and then of one pixel."""
        if least == 1 and self.chance(0.1):
            return [(1, 1), (1, 300), (400, 1), (2, 3)][self.rng.integers(4)]
        return tuple(int(n) for n in self.rng.integers(max(least, 9), 60, 2))

    def litter(self, folder: str) -> None:
        """Something that is no image, or seems to be none."""
        place, draw = os.path.join(folder, self.stem()), self.rng.random()
        whole = odd_files.encoded(Image.fromarray(picture(self.rng, 12, 12)), "PNG")
        (self.root / folder).mkdir(parents=True, exist_ok=True)
        if draw < 0.35:
            suffix, content = odd_files.of_no_suffix(self.rng, picture(self.rng, 12, 12))
            self.write(place + suffix, content)
        elif draw < 0.55:
            hidden = str(self.rng.choice([".hidden{}.png", "._{}.png", ".git{}/1.png", ".gitignore{}"]))
            self.write(os.path.join(folder, hidden.format(self.n)), whole)
        elif draw < 0.7:
            left = ["__MACOSX/._1.png", "@eaDir/1.png", ".DS_Store", "Thumbs.db", "desktop.ini"]
            self.write(os.path.join(folder, str(self.rng.choice(left))), whole)
        elif draw < 0.75:
            with contextlib.suppress(FileExistsError):
                os.mkfifo(self.root / f"{place}.png")
        elif draw < 0.85:
            target = str(self.rng.choice(["nowhere.png", os.path.basename(place) + ".png"]))  # itself
            (self.root / f"{place}.png").symlink_to(target)
        elif draw < 0.95:
            (self.root / f"{place}.png").symlink_to(str(self.rng.choice([".", "..", "/dev/null"])))
        else:
            (self.root / f"{place}.png").mkdir()

    def fill(self, folder: str, n: int, sizes: Callable[[], tuple[int, int]] | None = None) -> list[str]:
        """About n odd files in a folder, two of them whole images; gives those that are called like images."""
        names = [
            self.image(os.path.join(folder, self.stem()), odd_files.PLAIN[0], picture(self.rng, 40, 30))
            for _ in range(2)
        ]
        for _ in range(max(0, n - 2)):
            if self.chance(0.25):
                self.litter(folder)
                continue
            within = os.path.join(folder, str(self.rng.choice(["", "", "", "deep er/ö", "dir.png"])))
            names.append(self.drawn(within, *(sizes or self.size)()))
            if self.chance(0.06):  # the same again: a copy, a link, the name in another case
                names.append(self.again(names[-1], os.path.join(within, self.stem())))
        return names

    def again(self, name: str, base: str) -> str:
        suffix = os.path.splitext(name)[1]
        other = os.path.join(os.path.dirname(name), os.path.basename(name).swapcase())
        if (self.root / other).exists():
            other = base + suffix
        if self.chance(0.5):
            (self.root / other).symlink_to(self.root / name)
        else:
            shutil.copy2(self.root / name, self.root / other)
            (self.root / other).chmod((self.root / name).stat().st_mode)
        self.shown[other] = self.shown[name]
        self.maybe |= {other} if name in self.maybe else set()
        return other

    def outside(self, folder: str) -> list[str]:
        """A link to a folder that lies elsewhere, whose images count."""
        place = self.root.with_name(f"{self.root.name}_elsewhere")
        names = []
        for _ in range(2):
            base, x = self.stem(), picture(self.rng, 20, 20)
            suffix, content, shown = odd_files.PLAIN[0](self.rng, x)
            place.mkdir(exist_ok=True)
            (place / (base + suffix)).write_bytes(content)
            names.append(os.path.join(folder, "linked", base + suffix))
            self.shown[names[-1]] = shown
        (self.root / folder).mkdir(parents=True, exist_ok=True)
        (self.root / folder / "linked").symlink_to(place)
        return names


# ---- sets


def single(case: Case, n: int, sizes: Callable[[], tuple[int, int]] | None = None) -> list[str]:
    """A folder of single images, perhaps with train/ and test/ in it and more beside them."""
    if case.chance(0.3):
        folders = (["train", "Train", "training"], ["test", "val", "Validation"])
        case.splits = [str(case.rng.choice(some)) for some in folders]
        names = [
            name
            for one, of in zip(case.splits, (n * 2 // 3, n // 3), strict=True)
            for name in case.fill(one, of, sizes)
        ]
        for folder in case.rng.choice(["", "more", "more/deeper"], int(case.rng.integers(0, 4)), replace=False):
            case.drawn(str(folder), 12, 12)
        return names
    names = case.fill("", n, sizes)
    return names + (case.outside("") if case.chance(0.2) else [])


def images(case: Case, n: int) -> None:
    case.items = {name: Item(case.shown[name]) for name in single(case, n)}


def edges(case: Case, n: int) -> None:
    images(case, n)


def classes(case: Case, n: int) -> None:
    names = sorted({"cat", "dog 2", "größe", "10", "O'Neil=x"})[: int(case.rng.integers(2, 5))]
    for one in names:
        for name in case.fill(one, max(4, n // len(names))):
            case.items[name] = Item(case.shown[name], told={"class": one})
    for _ in range(int(case.rng.integers(0, 3))):
        case.litter("")
    if case.chance(0.3):
        (case.root / "empty class").mkdir()
    if case.chance(0.2):
        case.drawn("", 12, 12)


def unpaired(case: Case, n: int) -> None:
    folders = ["trainA", "trainB"] + (["testA", "testB"] if case.chance(0.5) else [])
    for k, folder in enumerate(folders):
        for name in case.fill(folder, max(4, n // len(folders))):
            case.items[name] = Item(case.shown[name], told={"domain": k % 2})
    if case.chance(0.3):
        case.fill("more", 3)


def pairs(case: Case, n: int) -> None:
    case.words["jitter"] = 4
    if case.chance(0.4):
        halves(case, n)
        return
    folders = [("trainA", "trainB"), ("A", "B"), ("input", "target")][case.rng.integers(3)]
    for k in range(max(3, n // 2)):
        base, (width, height) = case.stem(), case.size()
        plain_one = k < 2
        sides = []
        for folder in folders:
            kind = odd_files.PLAIN[0] if plain_one else case.kind(case.damaged / 2)
            sides.append(case.image(os.path.join(folder, base), kind, picture(case.rng, width, height)))
        stems = [
            os.path.splitext(os.path.relpath(name, folder))[0] for name, folder in zip(sides, folders, strict=True)
        ]
        if stems[0] != stems[1]:  # the suffix of one side has two dots
            case.reasons.append("no partner")
        case.items[sides[0]] = Item(case.shown[sides[1]], case.shown[sides[0]], sides[1])
        if case.chance(0.2):
            case.litter(str(case.rng.choice(folders)))
    if case.chance(0.15):
        case.drawn(folders[0], 10, 10, 0)
        case.reasons.append("no partner")
    if case.chance(0.15):
        base = case.stem()
        for folder, size in zip(folders, ((20, 10), (10, 20)), strict=True):
            name = case.image(os.path.join(folder, base), odd_files.PLAIN[0], picture(case.rng, *size))
        case.reasons += ["differ in proportions"]
        case.items[os.path.join(folders[0], os.path.basename(name))] = Item(None, None, name)


def halves(case: Case, n: int) -> None:
    """Pairs of one file each."""
    for k in range(max(4, n)):
        if case.chance(0.2):
            case.litter("train")
            continue
        width, height = case.size(9)
        x = np.concatenate([picture(case.rng, width, height), picture(case.rng, width, height)], 1)
        odd = k > 2 and case.chance(0.05)
        name = case.image(f"train/{case.stem()}", case.kind() if k > 2 else odd_files.PLAIN[0], x[:, 1:] if odd else x)
        whole = case.shown[name]
        if odd:
            case.torn.add(name)
            case.maybe.discard(name)
        case.items[name] = Item(None) if odd or whole is None else Item(whole[:, width:], whole[:, :width])


def superres(case: Case, n: int) -> None:
    case.words |= {"image_size": SIZE, "scale_factor": int(case.rng.choice([2, 4]))}
    if case.chance(0.5):
        names = single(case, n, lambda: case.size(SIZE))
        if case.chance(0.1) and not case.splits:
            names.append(case.drawn("", 5, 40, 0))
            case.reasons.append("smaller than")
        case.items = {name: Item(case.shown[name]) for name in names}
    else:
        scaled(case, n)


def scaled(case: Case, n: int) -> None:
    """Pairs of files, whose sources are as large as a rounding of any kind leaves them."""
    scale = case.words["scale_factor"]
    rounding = [np.floor, np.ceil, np.round][case.rng.integers(3)]
    for k in range(max(3, n // 2)):
        base, large = case.stem(), case.size(SIZE)
        small = tuple(int(rounding(side / scale)) for side in large)
        if case.chance(0.03):
            small = (small[0] + 1, small[1])
            case.reasons.append(f"is not {scale} times")
        kinds = [odd_files.PLAIN[0] if k < 2 else case.kind(case.damaged / 2) for _ in range(2)]
        sides = [
            case.image(os.path.join(folder, base), kind, picture(case.rng, *size))
            for folder, kind, size in zip(("HR", "LR"), kinds, (large, small), strict=True)
        ]
        if len({os.path.splitext(name[3:])[0] for name in sides}) > 1:
            case.reasons.append("none in LR")
        case.items[sides[0]] = Item(*(case.shown[name] for name in sides), sides[1])
        if case.chance(0.2):
            case.litter(str(case.rng.choice(["HR", "LR"])))
    if case.chance(0.2):
        case.drawn("LR", 10, 10, 0)


# ---- lists


def captioned(case: Case, n: int) -> None:
    names = single(case, n)
    case.items = {name: Item(case.shown[name]) for name in names}
    layout = str(case.rng.choice(["tsv", "jsonl", "txt"]))
    texts: dict[str, list[str]] = {}
    for name in names:
        if not case.chance(0.08) or name == names[0]:
            texts[name] = [caption(case) for _ in range(1 + int(case.rng.integers(2)))]
    if layout == "txt":
        beside(case, texts)
    else:
        table(case, layout, texts)
    for name in names:
        said = [text.strip() for text in texts.get(name, []) if text.strip()]
        if said:
            case.items[name].told["text"] = said
        else:
            del case.items[name]
    case.reasons += ["none of"] if not case.items else []
    read = [name for name, item in case.items.items() if item.image is not None and name not in case.maybe]
    counts = [sum(name.startswith(f"{split}/") for name in read) for split in case.splits] or [len(read) - 1]
    if min(counts) < 1:
        case.reasons.append("is left to")


def caption(case: Case) -> str:
    texts = [
        "a cat",
        'he said "hi"',
        "größe 画像 \U0001f3a8",
        "",
        "  spaces around  ",
        "a, b; c",
        "\\n",
        "x" * 9_000,
        "'",
    ]
    return texts[case.rng.integers(len(texts))]


def encoded_list(case: Case, lines: list[str], broken: str = "no UTF-8") -> bytes:
    """Lines as other systems end and begin them; now and then in another encoding, which is refused."""
    end = str(case.rng.choice(["\n", "\r\n", "\r"]))
    with_blanks = [line for one in lines for line in ([one, ""] if case.chance(0.05) else [one])]
    text = end.join(with_blanks) + end * int(case.rng.integers(0, 3))
    content = os.fsencode(text)
    if case.chance(0.3):
        content = b"\xef\xbb\xbf" + content
    if case.chance(0.06):
        content = text.encode("utf-16", "surrogatepass")
        case.reasons += [broken, "no tab", "no JSON", "is in no text", "none of", "is empty"]
    return content


def beside(case: Case, texts: dict[str, list[str]]) -> None:
    """A .txt of its name beside each image; those of one name share it."""
    of: dict[str, list[str]] = {}
    for name in case.items:
        of.setdefault(os.path.splitext(name)[0], []).append(name)
    for base, group in of.items():
        said = next((texts[name] for name in group if name in texts), None)
        for name in group:
            texts.pop(name, None)
        if said is None:
            continue
        case.lists.add(case.write(base + ".txt", encoded_list(case, said)))
        texts |= dict.fromkeys(group, said)
    for name in list(texts):  # an image called like the text of another
        if not (case.root / (os.path.splitext(name)[0] + ".txt")).exists():
            del texts[name]


def table(case: Case, layout: str, texts: dict[str, list[str]]) -> None:
    rows = [(name, text) for name, some in texts.items() for text in some]
    case.rng.shuffle(rows)
    for name in texts:
        texts[name] = [text for other, text in rows if other == name]
    if case.chance(0.3):
        rows.append((f"gone/{case.n}.png", "of no file"))
    if layout == "jsonl":
        keep = [(name, text) for name, text in rows]
        lines = [
            json.dumps({"file_name": name, "text": text, "more": 1}, ensure_ascii=case.chance(0.5))
            for name, text in keep
        ]
        file, wrong = (
            "metadata.jsonl",
            ['{"file_name": "a.png"}', "[" * 100_000, '{"file_name": 3, "text": 4}', "{", "[]"],
        )
    else:
        unsaid = [name for name in texts if re.search(r"[\t\r\n]", name) or name != name.strip()]
        for name in unsaid:
            texts.pop(name)
        lines = [f"{name}\t{text}" for name, text in rows if name not in unsaid]
        file, wrong = "captions.tsv", ["no tab here", "a.png\ta caption\twith another tab", "a.png"]
        if case.chance(0.2):
            lines = [
                "n\tcaption\tfile",
                *(f"{k}\t{line.split(chr(9))[1]}\t{line.split(chr(9))[0]}" for k, line in enumerate(lines)),
            ]
            wrong = wrong[:1]
    if lines and case.chance(0.15):
        lines.insert(int(case.rng.integers(1, len(lines) + 1)), str(case.rng.choice(wrong)))
        case.reasons += ["no tab", "it is no JSON", "FILE, ", "columns"]
    if any(re.search(r"[\ud800-\udfff]", line) for line in lines) and layout == "jsonl":
        case.reasons.append("no UTF-8")
    case.lists.add(case.write(file, encoded_list(case, lines)))


ATTRIBUTES = ["Black_Hair", "Male", "Smiling"]


def celeba(case: Case, n: int) -> None:
    n = max(8, n)
    layout = str(case.rng.choice(["stargan", "torchvision", "kaggle"]))
    folder = {
        "stargan": "celeba/images",
        "torchvision": "celeba/img_align_celeba",
        "kaggle": "celeba/img_align_celeba/img_align_celeba",
    }[layout]
    crop = case.words["crop"] = [None, "none", 148][case.rng.integers(3)] or "ddim"
    rows, parts = [], []
    for k in range(1, n + 1):
        name = f"{k:06d}.jpg"
        size = (178, 218)
        if case.chance(0.02):
            size = (64, 64) if case.chance(0.5) else (400, 700)
            case.reasons += ["178 x 218"] if crop != "none" else []
        content = odd_files.encoded(Image.fromarray(x := picture(case.rng, *size)), "JPEG", quality=95)
        draw = case.rng.random()
        place = os.path.join(folder, name)
        if draw < 0.01:
            content = content[: len(content) // 2]
            case.reasons.append("cannot be read")
        if 0.01 < draw < 0.025:
            (case.root / folder).mkdir(parents=True, exist_ok=True)
            [
                (case.root / place).mkdir,
                lambda p=place: os.mkfifo(case.root / p),
                lambda p=place: (case.root / p).symlink_to("nowhere"),
            ][k % 3]()
            case.reasons += ["cannot be read"]
        elif 0.025 < draw < 0.035:
            case.reasons += ["are not in"]
        else:
            case.write(place, content)
        part = int(k > n * 0.6) + int(k > n * 0.8)
        said = [str(v) for v in case.rng.choice([-1, 1], 3)]
        if not case.chance(0.03):
            rows.append([name, *said])
        if not case.chance(0.03):
            parts.append([name, str(part)])
        case.items[place] = Item(cropped(x, crop), told={"attributes": [float(v == "1") for v in said]})
    if case.chance(0.3):
        case.litter(folder)
    damage(case, rows, parts)
    by, suffix = (",", ".csv") if layout == "kaggle" else (str(case.rng.choice([" ", "  ", "\t"])), ".txt")
    head = ["image_id"] if layout == "kaggle" else []
    lines = [by.join([*head, *ATTRIBUTES]), *(by.join(row) for row in rows)]
    if layout != "kaggle" and case.chance(0.8):
        lines.insert(0, str(len(rows)))
    case.lists.add(case.write(f"celeba/list_attr_celeba{suffix}", encoded_list(case, lines, "has not 1 or -1")))
    if layout != "stargan":
        lines = [by.join(part) for part in parts]
        lines = ["image_id,partition", *lines] if layout == "kaggle" else lines
        case.lists.add(
            case.write(f"celeba/list_eval_partition{suffix}", encoded_list(case, lines, "list_eval_partition"))
        )
    listed, parted = {row[0] for row in rows}, {part[0]: part[-1] for part in parts}
    for place in list(case.items):
        name = os.path.basename(place)
        if name not in listed or layout != "stargan" and parted.get(name) not in ("0", "2"):
            del case.items[place]


def damage(case: Case, rows: list[list[str]], parts: list[list[str]]) -> None:
    """One mistake in the lists, now and then."""
    k, draw = int(case.rng.integers(len(rows))), case.rng.random()
    if draw < 0.05:
        rows[k] = rows[k][:-1]
        case.reasons.append("has not 1 or -1")
    elif draw < 0.1:
        rows.insert(k, list(rows[-1]))
        case.reasons.append("twice")
    elif draw < 0.15:
        rows[k][1] = "yes"
        case.reasons.append("has not 1 or -1")
    elif draw < 0.2:
        parts[0] = parts[0][:1]
        case.reasons.append("list_eval_partition")
    elif draw < 0.25:
        parts[0] = [parts[0][0], "train"]
        case.reasons.append("list_eval_partition")
    elif draw < 0.3:
        parts.append([parts[0][0], "2"])
        case.reasons.append("twice")
    elif draw < 0.35:
        rows.append(["999999.jpg", "1", "1", "1"])
        parts.append(["999999.jpg", "0"])
        case.reasons.append("are not in")


def cropped(x: np.ndarray, crop: str | int) -> np.ndarray:
    if crop == "none":
        return x
    left, top, side = (25, 57, 128) if crop == "ddim" else (15, 35, 148)
    return x[top : top + side, left : left + side]


SETS = (images, classes, pairs, unpaired, edges, superres, captioned, celeba)


def drawn(page: Callable[[Case, int], None], folder: Path, seed: int, n: int) -> Case:
    """A folder of about n odd files for a page."""
    case = Case(page.__name__, folder, np.random.default_rng(seed))
    case.as_nobody = os.geteuid() == 0 and case.chance(0.15)
    case.damaged = 0.0 if case.chance(0.4) else 0.15
    folder.mkdir(parents=True)
    folder.chmod(0o755)
    case.words |= {"holdout": float(case.rng.choice([0.0, 0.3])), "image_channels": int(case.rng.choice([1, 3, 3]))}
    if page is celeba:
        del case.words["holdout"]
    page(case, n)
    if page is not celeba:  # whose folders are not searched
        hopeless(case)
    if not sum(item.image is not None for item in case.items.values()):
        case.reasons.append("no readable image")
    return case


LOCKED, DEEP = "Permission denied", "File name too long"


def hopeless(case: Case) -> None:
    """Now and then a folder that nobody can list: all is refused."""
    if case.as_nobody and case.chance(0.3):
        case.drawn("locked", 12, 12)
        (case.root / "locked").chmod(int(case.rng.choice([0, 0o644])))
        case.reasons += [LOCKED]
    elif case.chance(0.03):
        within = os.open(case.root, os.O_RDONLY)
        for _ in range(20):
            os.mkdir("d" * 250, dir_fd=within)
            before, within = within, os.open("d" * 250, os.O_RDONLY, dir_fd=within)
            os.close(before)
        os.close(within)
        case.reasons += [DEEP]


# ---- what is there, and what is said of it


def there(root: Path) -> tuple[list[Path], int]:
    """All files that are visible under a folder, with each folder once; and how many entries are something else.

    Something else are hidden files and folders, links to nothing, pipes and devices; what systems leave is nothing.
    """
    seen = {one.stat().st_ino for one in (root.resolve(), *root.resolve().parents)}
    found, others, waiting = [], 0, [root]
    for folder in waiting:
        for entry in sorted(folder.iterdir()):
            if entry.name.lower() in SILENT or entry.name.startswith("._"):
                continue
            if entry.name.startswith(".") or not (entry.exists() and (entry.is_dir() or entry.is_file())):
                others += 1
            elif entry.is_file():
                found.append(entry)
            elif entry.stat().st_ino not in seen:
                seen.add(entry.stat().st_ino)
                waiting.append(entry)
    return found, others


def counted(told: str) -> int:
    """How many files the lines of a set say that they leave out."""
    n = 0
    for note in re.findall(r": left out are (.*)", told):
        while "(" in note:
            note = re.sub(r"\([^()]*\)", "", note)
        n += sum(int(one.replace(",", "")) for one in re.findall(r"(?:^|, | and )(\d[\d,]*\d|\d)(?= )", note))
    n += sum(map(int, re.findall(r"(\d+) of \d+ images have no caption and are left out", told)))
    for bad, more in re.findall(
        r"(\d+) of \d+ (?:images|files) cannot be read and are left out(?:, with (\d+))?", told
    ):
        n += int(bad) + int(more or 0)
    return n


def quarters(x: np.ndarray) -> np.ndarray:
    """The mean colours of the quarters of (H, W, C), (2, 2, C)."""
    parts = []
    for dim in (0, 1):
        n = x.shape[dim]
        parts.append([slice(0, (n + 1) // 2), slice(n // 2, n)])
    return np.array([[x[rows, columns].mean((0, 1)) for columns in parts[1]] for rows in parts[0]])


def squared(x: np.ndarray, size: int) -> np.ndarray:
    """The central square of (H, W, 3), as large as it is to be."""
    height, width = x.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    image = Image.fromarray(x.round().astype(np.uint8))
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side)))


def differs(got: Tensor, shown: np.ndarray, channels: int) -> bool:
    """Whether an image (C, H, W) in [-1, 1] is not what a file shows."""
    shown = shown if channels == 3 else (shown @ odd_files.LUMA)[..., None]
    levels = got.permute(1, 2, 0).double().numpy() * 127.5 + 127.5
    return float(np.abs(quarters(levels) - quarters(shown.astype(float))).max()) > OFF


# ---- the way through


OUTCOMES = ("read", "refused", "fault")


@dataclass
class Outcome:
    what: str  # one of OUTCOMES
    line: str


class Fault(Exception):
    """What may never happen."""


PAGES: dict[str, Any] = {}  # the config of each set, composed while all files may be read


def built(case: Case, **words: object) -> DataModule:
    """The set as train.py builds it."""
    page = PAGES[case.page]
    own = {"root": str(case.root), "image_size": SIZE, "batch_size": 4, "num_workers": 0} | case.words | words
    own["cache"] = str(case.root.with_name("cache"))
    before = {key: page.data._get_node(key) for key in own}
    for key, value in own.items():
        page.data[key] = value
    try:
        return build.data(page)
    finally:
        for key, node in before.items():
            page.data[key] = node


def read_all(data: DataModule, case: Case) -> None:
    """Every image of both splits, once as they are and once as training sees them."""
    data.trainer = SimpleNamespace(world_size=1)
    data.prepare_data()
    data.setup("fit")
    for split in ("train", "test"):
        data.fingerprint(split)
        data.order(split)
        names = names_of(data, split)
        for first in range(0, len(names), 8):
            numbers = list(range(first, min(first + 8, len(names))))
            batch = data.split(split).read(numbers, None)
            drawn = data.split(split).read(numbers, [generator(k) for k in numbers])
            for one in (batch, drawn):
                sound(one, data)
            for k, name in enumerate(names[first : first + 8] if case.items else []):
                compare(batch, k, name, data, case)


def names_of(data: DataModule, split: str) -> list[str]:
    """The file of each image of a split, from the root."""
    images = data.split(split)
    if hasattr(images, "files"):
        images = images.files
    if hasattr(images, "a"):
        longer = images.b if len(images.b) == len(images) else images.a
        images = longer.plain
    if hasattr(images, "views"):
        images = images.views.plain
    return [os.path.relpath(path, data.root) for path in images.paths]


def sound(batch: dict[str, Any], data: DataModule) -> None:
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            if not value.isfinite().all() or value.abs().max() > 1.001:
                raise Fault(f"{name} has values that are no image's")
    for name in ("image", "source", "image_a", "image_b"):
        if name in batch:
            size = data.image_size // (data.scale_factor if name == "source" and hasattr(data, "scale_factor") else 1)
            if batch[name].shape[1:] != (data.image_channels, size, size) or batch[name].dtype != torch.float32:
                raise Fault(f"{name} is {tuple(batch[name].shape)} {batch[name].dtype}")


def compare(batch: dict[str, Any], k: int, name: str, data: DataModule, case: Case) -> None:
    """Whether image k of a batch is what its file shows, and what is said of it."""
    if name not in case.items:
        raise Fault(f"{name!r} is read, which is no image of the set")
    item = case.items[name]
    if item.image is None:
        raise Fault(f"{name!r} is read, which cannot be")
    image, source = item.image, item.source
    if case.page == "superres":
        image, source = superres_part(image, source, data.scale_factor)
    got = batch["image_a" if item.told.get("domain") == 0 else "image"][k]
    longer_is_b = case.page != "unpaired" or len(data.split("train").b) >= len(data.split("train").a)
    if case.page != "unpaired" or item.told["domain"] == int(longer_is_b):
        if differs(got, squared(image, data.image_size), data.image_channels):
            raise Fault(f"{name!r} is read as something else")
    if source is not None and differs(
        batch["source"][k], squared(source, batch["source"].shape[-1]), data.image_channels
    ):
        raise Fault(f"the source of {name!r} is read as something else")
    for key, value in item.told.items():
        if key == "text" and batch["text"][k] != value[0] or key == "attributes" and batch[key][k].tolist() != value:
            raise Fault(f"{name!r} has the {key} {batch[key][k]!r}, not {value!r}")
        if key == "class" and list(data._classes)[int(batch["label"][k])] != value:
            raise Fault(f"{name!r} has another class than {value}")


def superres_part(image: np.ndarray, source: np.ndarray | None, scale: int) -> tuple[np.ndarray, np.ndarray | None]:
    """What is cut out of the middle; on the grid of the source where that is a file."""
    if source is None:
        top, left = ((n - SIZE) // 2 for n in image.shape[:2])
        return image[top : top + SIZE, left : left + SIZE], None
    side = SIZE // scale
    top, left = ((n // scale - side) // 2 for n in image.shape[:2])
    cut = image[top * scale : top * scale + SIZE, left * scale : left * scale + SIZE]
    return cut, source[top : top + side, left : left + side]


def used(data: DataModule, case: Case) -> set[str]:
    """The files that a set reads, and the lists."""
    if case.page == "celeba":
        names = {name for split in ("train", "test") for name in names_of(data, split)}
    else:
        names = {name for items in data.index.values() for item in items for name in item.names}
    return names | case.lists


def as_expected(data: DataModule, case: Case) -> None:
    """What is read is what was put there to be read."""
    names = used(data, case) - case.lists
    if case.page == "celeba":
        if set(case.items) != names:
            raise Fault(f"not the photographs of the lists: {sorted(set(case.items) ^ names)[:3]}")
        return
    bad = case.bad | case.maybe
    whole = {n for name, item in case.items.items() if not bad & set(item.files(name)) for n in item.files(name)}
    if missing := whole - names:
        raise Fault(f"{len(missing)} whole images are not read, {sorted(missing)[0]!r}")
    if more := names - {n for name, item in case.items.items() for n in item.files(name)}:
        raise Fault(f"{len(more)} files are read that are none of the set, {sorted(more)[0]!r}")


def account(data: DataModule, case: Case, told: str) -> None:
    """Every file is read, or counted by a line."""
    names = used(data, case)
    visible, others = there(case.root)
    read = {(case.root / name).stat().st_ino for name in names}
    unread = [path for path in visible if os.path.relpath(path, case.root) not in names]
    left = sum(path.stat().st_ino not in read for path in unread) + others
    if not left <= counted(told) <= len(unread) + others:  # a file of two names may be read by one of them
        raise Fault(f"{left} files are left out, the lines tell of {counted(told)}: {told!r}")


@contextlib.contextmanager
def listening(case: Case) -> Iterator[io.StringIO]:
    """What is printed and warned of; a hang becomes a Fault; in some folders nobody's rights are all that there are."""

    def hang(*_: object) -> None:
        for path in case.root.rglob("*"):
            if path.is_fifo():
                with contextlib.suppress(OSError):
                    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        raise Fault("it hangs")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    told = io.StringIO()
    try:
        with warnings.catch_warnings(record=True) as warned, contextlib.redirect_stderr(told):
            warnings.simplefilter("always")
            with contextlib.redirect_stdout(io.StringIO()):
                if case.as_nobody:
                    os.seteuid(NOBODY)
                yield told
            for one in warned:
                told.write(f"{one.category.__name__}: {one.message}\n")
    finally:
        if case.as_nobody:
            os.seteuid(0)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(work: Callable[[], None], allowed: Callable[[str], bool]) -> Outcome:
    """What becomes of a folder; a refusal is a fault where nothing is wrong that it may name."""
    try:
        work()
        return Outcome("read", "")
    except UserError as error:
        line = error.line()
        if "\n" in line or len(line) > 200 or not error.fix:
            return Outcome("fault", f"no line: {line!r}")
        return Outcome("refused" if allowed(str(error)) else "fault", line)
    except Fault as fault:
        return Outcome("fault", str(fault))
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return Outcome("fault", f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})")


def trained(case: Case, on_bad_image: str) -> Outcome:
    words = {} if case.page == "celeba" else {"on_bad_image": on_bad_image}
    bad = case.bad | case.maybe

    def work() -> None:
        with listening(case) as told:
            data = built(case, **words)
            read_all(data, case)
        if on_bad_image == "error" and case.bad & used(data, case):
            raise Fault("a bad file did not stop the start")
        if noise := re.findall(r"^(?!UserWarning)\w+Warning: .*|^UserWarning: (?!.*left out).*", told.getvalue(), re.M):
            if not all("with the same content" in line for line in noise):
                raise Fault(f"a warning of a library: {noise[0]}")
        as_expected(data, case)
        account(data, case, told.getvalue())

    def allowed(text: str) -> bool:
        if (
            on_bad_image == "error"
            and "cannot be read" in text
            and any(printable(name) in " ".join(text.split()) or printable(name) in text for name in bad)
        ):
            return True
        return any(reason in text for reason in case.reasons)

    return outcome(work, allowed)


def counted_in(page: str, root: Path) -> Outcome:
    """What becomes of a folder of which nothing is known but what it is for."""
    case = Case(page, root, np.random.default_rng(0))
    case.lists = {os.path.relpath(path, root) for path in root.glob("celeba/*.txt")}
    prepare([page], root.parent)

    def work() -> None:
        with listening(case) as told:
            data = built(case, **({} if page == "celeba" else {"on_bad_image": "skip"}))
            read_all(data, case)
        account(data, case, told.getvalue())

    return outcome(work, lambda text: True)


class Copies(Request):
    """Each source as it is read is what is made of it."""

    def translated(self, x: Tensor, k: int, own: Batch | None = None) -> Tensor:
        return x


def sampled(case: Case) -> Outcome:
    """`sample.py source=FOLDER`: of every image file of the folder a picture, or a line."""
    out = case.root.with_name(f"{case.root.name}_out")
    if case.as_nobody:
        out.mkdir()
        out.chmod(0o777)

    def work() -> None:
        with listening(case) as told:
            words = {"do": "sample", "first": 0, "source": str(case.root), "run": "run", "seed": 0}
            sources = files.sources(str(case.root), out)
            folder = Folder(out, words | {"n": len(sources)})
            data = SimpleNamespace(image_channels=3, background="white", image_size=SIZE, names=SetNames())
            request = Copies(SimpleNamespace(needs=frozenset()), data)
            for made in request.of_files("sample", sources):
                folder.add(made)
            if len(request.unread) == len(sources):
                raise UserError("source", words["source"], "none of its files can be read", "source=OTHER_FILES")
            folder.finish()
        made_of(case, sources, request.unread, out, told.getvalue())

    def allowed(text: str) -> bool:
        if any(reason in text for reason in {LOCKED, DEEP} & set(case.reasons)):
            return "source=" in text
        return "none of its files" in text and all(shown is None for shown in case.shown.values())

    return outcome(work, allowed)


def made_of(case: Case, sources: list[files.Source], unread: list[Path], out: Path, told: str) -> None:
    visible, others = there(case.root)
    by_inode = {(case.root / name).stat().st_ino: name for name in case.shown}
    results = [path for path in out.rglob("*") if path.is_file() and path.name not in (REQUEST, GRID)]
    if len(results) != len(sources) - len(unread):
        raise Fault(f"{len(sources)} sources, {len(unread)} of them unread, but {len(results)} pictures")
    if len(unread) != len(re.findall(r"^error: source=", told, re.M)):
        raise Fault("not a line for each file that is not read")
    for result, path in sources:
        shown = case.shown.get(by_inode.get(path.stat().st_ino, ""), None)
        name = os.path.relpath(path, case.root)
        if path in unread:
            if shown is not None and name not in case.maybe and by_inode[path.stat().st_ino] not in case.maybe:
                raise Fault(f"{name!r} is whole, but not read")
            continue
        with Image.open(out / result) as picture_made:
            got = torch.from_numpy(np.array(picture_made)).permute(2, 0, 1) / 127.5 - 1
        if case.page != "celeba" and (shown is None or got.shape[1:] != shown.shape[:2] or differs(got, shown, 3)):
            raise Fault(f"{name!r} is read as something else")
    if case.page != "celeba":
        left = len([path for path in visible if not is_image(path.name)]) + others
        if counted(told) != left:
            raise Fault(f"{left} files are left out of the sources, the lines tell of {counted(told)}: {told!r}")


def prepare(pages: list[str], folder: Path) -> None:
    """What is done while all files may be read; `folder` is for the sets' cache too."""
    register()
    for page in pages:
        PAGES[page] = OmegaConf.create({"seed": 0, "data": OmegaConf.load(CONF / "data" / f"{page}.yaml")})
    Image.init()
    folder.chmod(0o755)
    (folder / "cache").mkdir(exist_ok=True)
    (folder / "cache").chmod(0o777)


def fuzz(n: int, seed: int, folder: Path, most: int = 40) -> tuple[dict, list[str]]:
    """About n odd files, at least 5 and about `most` in a folder for each set in turn.

    Gives (set, command, outcome) -> the numbers of files of such folders, and the faults.
    """
    prepare([page.__name__ for page in SETS], folder)
    rng, table, faults, made, k = np.random.default_rng(seed), {}, [], 0, 0
    while made < n or k < len(SETS):
        each = min(int(rng.integers(5, most + 1)), max(5, n - made))
        case = drawn(SETS[k % len(SETS)], folder / str(k) / "set", seed * 100_003 + k, each)
        (folder / str(k)).chmod(0o777)
        here = sum(len(names) for _, _, names in os.walk(case.root))
        made += here
        ways = {
            "train": partial(trained, case, "error"),
            "train, skip": partial(trained, case, "skip"),
            "sample": partial(sampled, case),
        }
        for way, work in list(ways.items())[: 1 if case.page == "celeba" else 3]:
            found = work()
            table.setdefault((case.page, way, found.what), []).append(here)
            if found.what == "fault":
                faults.append(f"{case.page} {k}, {way}: {found.line}")
        shutil.rmtree(folder / str(k), ignore_errors=True)
        k += 1
    return table, faults


def main() -> int:
    given = [int(word) for word in sys.argv[1:]]
    n, seed = (given + [1000, int(time.time())][len(given) :])[:2]
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="odd-files-") as folder:
        table, faults = fuzz(n, seed, Path(folder))
    print(f"seed {seed}, {time.monotonic() - begun:.0f} s; folders (files) that were")
    for page, way in dict.fromkeys((page, way) for page, way, _ in table):
        counts = [table.get((page, way, what), []) for what in OUTCOMES]
        cells = [f"{what} {len(sizes):3} ({sum(sizes):4})" for what, sizes in zip(OUTCOMES, counts, strict=True)]
        print(f"{page:10} {way:12} {'  '.join(cells)}")
    whole = {what: sum(sum(sizes) for (_, _, w), sizes in table.items() if w == what) for what in OUTCOMES}
    print(f"{sum(sum(sizes) for (_, way, _), sizes in table.items() if way == 'train')} files, over all ways {whole}")
    print("\n".join(faults))
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
