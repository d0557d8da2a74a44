"""Every file of a set is decoded once at the start, and what that showed is kept."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import PIL

from atelier.core.lines import paced
from atelier.data.file_images import threads
from atelier.data.finding import printable
from atelier.data.reading import check, unwarned


class Checked(NamedTuple):
    """A file of this size, last changed then, has been decoded; `reason` is "" where that went well.

    `content` is a hash of its bytes, "" where they cannot be read.
    """

    size: int
    changed_ns: int
    reason: str
    content: str


def check_files(
    root: Path,
    names: Iterable[str],
    max_pixels: int,
    cache: Path,
    look: Callable[[Path, int], str] | None = None,
) -> dict[str, Checked]:
    """Decode every file once; those whose size and time are as the cache says are not looked at again, those that
    have the same content in spite of another time are not decoded again.

    `look` is what is asked of a file, `reading.check` where it is not given.

    The cache is one JSON file for each root, written beside and renamed; one that is damaged, or that cannot
    be written, costs only time.
    """
    look = look or check
    rule = f"{max_pixels} {PIL.__version__}" + ("" if look is check else f" {look.__name__}")
    file = cache / f"checked_{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]}.json"
    known = _cached(file, rule)

    def one(name: str) -> tuple[str, Checked]:
        try:
            status = os.stat(root / name)
        except OSError as error:  # a link that leads nowhere, or gone since the folder was looked at
            return name, Checked(0, 0, str(error.strerror), "")
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            return name, Checked(0, 0, "no file, but a folder, pipe, socket or device", "")
        before = known.get(name)
        state = (status.st_size, max(status.st_mtime_ns, status.st_ctime_ns))  # an mtime can be put back
        if before is not None and before[:2] == state:
            return name, before
        content = _content(root / name)
        same = before is not None and content and before.content == content
        return name, Checked(*state, before.reason if same else look(root / name, max_pixels), content)

    names = list(names)
    with unwarned(), ThreadPoolExecutor(threads()) as pool:
        told = f"{printable(root)}: checking {len(names):,} images, once for all runs"
        checked = dict(paced(pool.map(one, names), len(names), lambda k, left: f"{told}: {k:,} done, {left}"))
    if not checked.items() <= known.items():
        _write(file, {"rule": rule, "files": known | checked})
    return checked


def fingerprint(files: Iterable[tuple[str, object]], checked: dict[str, Checked]) -> str:
    """Tells a set from another by the names of its files, what is said of each (a label), and their contents.

    Of a file that is not `checked`, since it is not used, the name and what is said of it tell.
    """
    content = {name: one.content for name, one in checked.items()}
    listing = "".join(f"{name}\0{said}\0{content.get(name, '')}\n" for name, said in files)
    return hashlib.sha256(os.fsencode(listing)).hexdigest()[:16]


def _content(path: Path) -> str:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]
    return ""


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
