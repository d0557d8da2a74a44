"""How a checkpoint gets on disk: whole or not at all, and never at the price of the one before.

Replaces lightning's TorchCheckpointIO, which writes over the old file where TMPDIR is another disk, never syncs and
lets a full disk end the run; tests/callbacks/test_checkpoint.py fails with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import IO, Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO

from atelier.checkpoints.store import Manifest, load, sha256, sync, sync_folder, warn
from atelier.core.errors import causes


class _Hashed:
    """A file that hashes what it is told to write."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.flush, self.digest = file, file.flush, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.file.write(data)


class SafeIO(CheckpointIO):
    """Temporary file in the same folder, fsync, read back, rename, manifest; then the older ones go.

    A full or failing disk is reported in one line and training goes on; it is caught here because all ranks meet at a
    barrier right behind the save.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        temporary = path.with_name(path.name + ".tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                hashed = _Hashed(file)
                torch.save(checkpoint, hashed)
                file.flush()
                sync(file.fileno(), path.parent)
            digest = hashed.digest.hexdigest()
            if sha256(temporary) != digest:
                raise OSError("the file reads back differently")
            os.replace(temporary, path)
            sync_folder(path.parent)
            manifest = Manifest(path.parent)
            manifest.add(path.name, digest, checkpoint["callbacks"]["Clock"]["images_seen"])
            manifest.prune()
        except (OSError, RuntimeError) as error:  # torch's writer fails in its own words after the disk's
            disk = next((cause for cause in causes(error) if isinstance(cause, OSError)), None)
            if disk is None:
                raise
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            self._tell(path, checkpoint, disk)

    def _tell(self, path: Path, checkpoint: dict[str, Any], error: OSError) -> None:
        needed = sum(t.numel() * t.element_size() for t in _tensors(checkpoint)) / 2**20
        try:
            space = os.statvfs(path.parent)
            free = f"{space.f_bavail * space.f_frsize / 2**20:.0f} MB free"
        except OSError:
            free = "folder not reachable"
        reason = str(error).splitlines()[0][:80]
        warn(
            f"no checkpoint written ({reason}; {needed:.0f} MB needed, {free}); the older one stays, the next save"
            f" tries again. Fix: free space under run_dir={path.parent.parent}"
        )

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> dict:
        return load(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


def _tensors(node: Any) -> list[torch.Tensor]:
    if isinstance(node, torch.Tensor):
        return [node]
    children = node.values() if isinstance(node, dict) else node if isinstance(node, (list, tuple)) else ()
    return [tensor for child in children for tensor in _tensors(child)]
