"""Checkpoints that survive a kill at any byte, and the choice of the one to go on from.

Replaces lightning's ModelCheckpoint and TorchCheckpointIO: the first counts optimizer steps and forgets the clock, the
second writes in place where TMPDIR is another disk and never syncs; tests/callbacks/test_checkpoint.py provokes both.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import CheckpointIO

from atelier.batch import Batch
from atelier.callbacks.clock import Clock
from atelier.callbacks.ema import EMA
from atelier.errors import UserError
from atelier.ranges import Name, PositiveInt

KEEP = 2
LOWER_IS_BETTER = ("fid", "fd_", "kid", "bpd", "nll", "lpips", "duplicates")


def lower_is_better(metric: str) -> bool:
    return any(word in metric.rsplit("/", 1)[-1] for word in LOWER_IS_BETTER)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a small file so that a kill leaves the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


class Manifest:
    """checkpoints/manifest.json: name, sha256 and images_seen of each whole checkpoint, oldest first, and the best."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "manifest.json"

    def read(self) -> dict[str, Any]:
        try:
            return json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {"files": [], "best": None}

    def add(self, name: str, images_seen: int) -> None:
        told = self.read()
        files = [f for f in told["files"] if f["name"] != name]
        files.append({"name": name, "sha256": sha256(self.folder / name), "images_seen": images_seen})
        self.write(told | {"files": sorted(files, key=lambda f: f["images_seen"])})

    def write(self, told: dict[str, Any]) -> None:
        write_text(self.path, json.dumps(told, indent=1))

    def prune(self) -> None:
        """Keep the newest KEEP and the best; the rest goes."""
        told = self.read()
        best = (told["best"] or {}).get("name")
        kept = [f for i, f in enumerate(told["files"]) if i >= len(told["files"]) - KEEP or f["name"] == best]
        self.write(told | {"files": kept})
        names = {f["name"] for f in kept}
        for path in self.folder.glob("*.ckpt"):
            if path.name not in names:
                path.unlink()


class SafeIO(CheckpointIO):
    """Temporary file in the same folder, fsync, rename, manifest, then the older ones go.

    A full or failing disk is told in one line and training goes on; it is caught here because all ranks meet at a
    barrier right behind the save.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        temporary = path.with_name(path.name + ".tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
            manifest = Manifest(path.parent)
            manifest.add(path.name, checkpoint["callbacks"]["Clock"]["images_seen"])
            manifest.prune()
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
                raise
            temporary.unlink(missing_ok=True)
            self._tell(path, checkpoint, error)

    def _tell(self, path: Path, checkpoint: dict[str, Any], error: Exception) -> None:
        tensors = _tensors(checkpoint)
        needed = sum(t.numel() * t.element_size() for t in tensors) / 2**20
        try:
            space = os.statvfs(path.parent)
            free = f"{space.f_bavail * space.f_frsize / 2**20:.0f} MB free"
        except OSError:
            free = "folder not reachable"
        reason = str(error).splitlines()[0][:80]
        print(
            f"warning: no checkpoint written ({reason}; {needed:.0f} MB needed, {free}); the older one stays, the next"
            f" save tries again. Fix: free space under run_dir={path.parent.parent}",
            file=sys.stderr,
            flush=True,
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


def load(path: Path) -> dict[str, Any]:
    """A checkpoint on the CPU, as data only."""
    if "://" in str(path):
        raise UserError("checkpoint", path, "checkpoints are read from disk only", "download and check it first")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        problem = f"not a safe, whole checkpoint ({type(error).__name__})"
        raise UserError("checkpoint", path, problem, "give a checkpoint written by train.py") from error


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint; None where nothing was ever saved.

    Raises:
        UserError: there are checkpoints, and none is whole.
    """
    for stray in folder.glob("*.tmp"):
        stray.unlink()
    known = Manifest(folder).read()["files"]
    for entry in reversed(known):
        path = folder / entry["name"]
        if path.exists() and sha256(path) == entry["sha256"]:
            return path
        print(f"warning: {path} is damaged or missing, the one before is taken", file=sys.stderr, flush=True)
    if known or list(folder.glob("*.ckpt")):
        raise UserError("run_dir", folder.parent, "none of its checkpoints is whole", "resume=never run_dir=NEW_FOLDER")
    return None


class Checkpoints(Callback):
    """Args:
    every_images: images between saves; one more at the end and on a signal.
    best: metric whose best checkpoint is kept beside the newest two; None = none.
    folder: where they lie.
    """

    def __init__(self, every_images: PositiveInt, best: Name | None, folder: Name, clock: Clock, ema: EMA) -> None:
        self.every_images, self.best, self.folder = every_images, best, Path(folder)
        self.clock, self.ema = clock, ema

    def on_train_batch_end(
        self, trainer: Trainer, model: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        interrupted = self.clock.interrupted(trainer)
        if interrupted or trainer.should_stop or self.clock.due(self.every_images, trainer.datamodule.batch_size):
            self.save(trainer, model)
        if interrupted:
            self.clock.leave(trainer)

    def save(self, trainer: Trainer, model: LightningModule) -> None:
        if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
            problem = f"weights are not finite at {self.clock.images_seen} images; the last good checkpoint stays"
            raise UserError("model", type(model).__name__, problem, "a lower lr, or trainer.precision=32-true")
        self.ema.broadcast_buffers(model)
        trainer.save_checkpoint(self.folder / f"images_{self.clock.images_seen:012d}.ckpt", weights_only=False)

    def keep_best(self, trainer: Trainer, model: LightningModule, values: dict[str, float]) -> None:
        """After an evaluation on all ranks: save, and mark this checkpoint if it is the best so far."""
        if self.best is None:
            return
        if self.best not in values:
            raise UserError("checkpoint.best", self.best, "no such metric", f"checkpoint.best={next(iter(values), None)}")
        value, manifest = values[self.best], Manifest(self.folder)
        before = (manifest.read()["best"] or {}).get("value")
        sign = -1 if lower_is_better(self.best) else 1
        better = value == value and (before is None or sign * value > sign * before)
        if not trainer.strategy.reduce_boolean_decision(better, all=False):
            return
        self.save(trainer, model)
        if trainer.is_global_zero:
            name = f"images_{self.clock.images_seen:012d}.ckpt"
            manifest.write(manifest.read() | {"best": {"name": name, "metric": self.best, "value": value}})
            manifest.prune()
