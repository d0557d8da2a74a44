"""How checkpoints lie on disk: listed with their hash; and the choice of the one to go on from.

Replaces lightning's `ckpt_path="last"`, which takes the newest by the clock of the file system, whole or not;
tests/callbacks/test_checkpoint.py fails with it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only

from atelier.checkpoints.renamed import weights
from atelier.core.errors import UserError
from atelier.core.lines import say

KEEP = 2
LACKING = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOLCK)  # it has no such call


def sha256(*paths: Path) -> str:
    """Of files, one behind the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Have the names in a folder reach the disk; a file system that cannot be asked to is told of once."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        sync(handle, folder)
    finally:
        os.close(handle)


def sync(handle: int, folder: Path) -> None:
    """`os.fsync`, or one warning where the file system of `folder` has none."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in LACKING:
            raise
        lacks = f"its file system cannot be told to write at once ({error.strerror})"
        _warn_once(f"{folder}: {lacks}; a crash of the machine may lose a save")


@functools.cache
def _warn_once(line: str) -> None:
    warn(line)


def write_text(path: Path, text: str) -> None:
    """Write a small file so that a kill leaves the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        sync(file.fileno(), path.parent)
    os.replace(temporary, path)
    sync_folder(path.parent)


@rank_zero_only
def warn(line: str) -> None:
    say(f"warning: {line}", error=True)


class Manifest:
    """checkpoints/manifest.json: name, sha256 and images_seen of each whole checkpoint, oldest first, and the best."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "manifest.json"

    def read(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            manifest = json.loads(self.path.read_text())
            if isinstance(manifest, dict):
                return manifest
        return {"files": [], "best": None}

    def add(self, name: str, digest: str, images_seen: int) -> None:
        manifest = self.read()
        files = [f for f in manifest["files"] if f["name"] != name]
        files.append({"name": name, "sha256": digest, "images_seen": images_seen})
        self._write(manifest | {"files": sorted(files, key=lambda f: f["images_seen"])})

    def mark_best(self, name: str, metric: str, value: float) -> None:
        """The older best stays where the new one could not be written."""
        manifest = self.read()
        if any(f["name"] == name for f in manifest["files"]):
            with contextlib.suppress(OSError):
                self._write(manifest | {"best": {"name": name, "metric": metric, "value": value}})
                self.prune()

    def cut(self, images_seen: int) -> None:
        """What lies after the checkpoint that a run goes on from is damaged or will come again: it goes."""
        manifest = self.read()
        kept = [f for f in manifest["files"] if f["images_seen"] <= images_seen]
        if len(kept) < len(manifest["files"]):
            best = (
                manifest["best"] if manifest["best"] and manifest["best"]["name"] in {f["name"] for f in kept} else None
            )
            self._write({"files": kept, "best": best})

    def prune(self) -> None:
        """Keep the newest KEEP and the best; the rest goes."""
        manifest = self.read()
        best = (manifest["best"] or {}).get("name")
        kept = [f for i, f in enumerate(manifest["files"]) if i >= len(manifest["files"]) - KEEP or f["name"] == best]
        self._write(manifest | {"files": kept})
        names = {f["name"] for f in kept}
        for path in self.folder.glob("*.ckpt"):
            if path.name not in names:
                path.unlink()

    def _write(self, manifest: dict[str, Any]) -> None:
        write_text(self.path, json.dumps(manifest, indent=1))


def load(path: str | Path) -> dict[str, Any]:
    """A checkpoint on the CPU, as data only, its weights under the names of today.

    Raises:
        UserError: it is an address, not whole, or holds more than data.
    """
    if ":/" in str(path):  # a Path makes one slash of two
        raise UserError("checkpoint", path, "checkpoints are read from disk only", "download and check it first")
    try:
        return weights(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        problem = f"not a safe, whole checkpoint ({type(error).__name__})"
        raise UserError("checkpoint", path, problem, "give a checkpoint written by train.py") from error


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint; None where nothing was ever saved. Changes nothing: the run may be going on.

    Raises:
        UserError: there are checkpoints, and none is whole.
    """
    known = Manifest(folder).read()["files"]
    for entry in reversed(known):
        path = folder / entry["name"]
        if path.exists() and sha256(path) == entry["sha256"]:
            return path
        warn(f"{path} is damaged or missing, the one before is taken")
    unlisted = [] if known else sorted(folder.glob("*.ckpt"), reverse=True)
    for path in unlisted:  # killed before the first line of the manifest, or the manifest is lost
        with contextlib.suppress(UserError):
            load(path)
            return path
    if known or unlisted:
        raise UserError("run_dir", folder.parent, "none of its checkpoints is whole", "run_dir=NEW_FOLDER")
    return None
