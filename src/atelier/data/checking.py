"""Every file of a set is decoded once at the start, and what that showed is kept."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import PIL

from atelier.data.file_images import threads
from atelier.data.reading import check


class Checked(NamedTuple):
    """A file of this size and age has been decoded; `reason` is "" where that went well."""

    size: int
    mtime_ns: int
    reason: str


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

    with ThreadPoolExecutor(threads()) as pool:
        checked = dict(pool.map(one, names))
    if checked != known:
        _write(file, {"rule": rule, "files": checked})
    return checked


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
