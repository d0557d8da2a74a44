"""Kills and full disks, in children forked from one process that has imported everything.

Called by the tests as `python -m tests.faults WHAT FOLDER`, prints one JSON line; see campaign.py for why.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from atelier.callbacks.clock import Clock
from atelier.checkpoints import safe_io, store
from atelier.checkpoints.safe_io import SafeIO
from atelier.checkpoints.store import Manifest, load, newest
from atelier.core.errors import UserError
from atelier.core.lines import LOG
from atelier.runs import folders, preflight, report
from tests import campaign
from tests.campaign import differences, final
from tests.compose import composed
from tests.programs import forked

NUMBERS = 20_000  # in the checkpoints here


def run(folder: Path, family: str, *more: str) -> None:
    """The tiny run of a family, with these words too."""
    campaign.run(folder, [*campaign.words_of(folder.parent, family), *more])


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def checkpoint(images_seen: int) -> dict[str, Any]:
    return {"callbacks": {"Clock": {"images_seen": images_seen}}, "w": torch.full((NUMBERS,), float(images_seen))}


def save(folder: Path, images_seen: int) -> None:
    SafeIO().save_checkpoint(checkpoint(images_seen), folder / f"images_{images_seen:012d}.ckpt")


def at_byte(n: int) -> Callable[[], None]:
    def patch() -> None:
        def cut(data: Any, file: Any) -> None:
            path = Path("/dev/shm" if Path("/dev/shm").is_dir() else "/tmp") / f"whole{os.getpid()}"
            write(data, path)
            whole = path.read_bytes()
            path.unlink()
            file.write(whole[: n if n >= 0 else len(whole) + n])
            file.flush()
            die()

        write, torch.save = torch.save, cut

    return patch


def at_call(owner: Any, name: str, count: int) -> Callable[[], None]:
    """The count-th call kills instead of being done."""

    def patch() -> None:
        original, left = getattr(owner, name), [count]

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            return die() if left[0] == 0 else original(*args, **kwargs)

        setattr(owner, name, wrapped)

    return patch


MOMENTS: dict[str, Callable[[], None]] = {
    **{f"byte {n}": at_byte(n) for n in (0, 1, 100, 5_000, 40_000, -1)},
    "written, not synced": at_call(os, "fsync", 1),
    "synced, not renamed": at_call(os, "replace", 1),
    "renamed, not listed": at_call(Manifest, "add", 1),
    "listing": at_call(os, "replace", 2),
    "listed, older not dropped": at_call(Manifest, "prune", 1),
    "older dropped from the list": at_call(Path, "unlink", 1),
}


def writing(root: Path) -> dict[str, Any]:
    """For each moment: what is there after a kill in the third save, and what after the next one."""
    told = {}
    for i, (moment, patch) in enumerate(MOMENTS.items()):
        folder = root / str(i)
        for images_seen in (8, 16):
            save(folder, images_seen)
        code = forked(lambda folder=folder, patch=patch: (patch(), save(folder, 24)))
        path = newest(folder)
        found = load(path)
        seen = found["callbacks"]["Clock"]["images_seen"]
        whole = bool((found["w"] == seen).all()) and len(found["w"]) == NUMBERS
        save(folder, seen + 8)
        left = sorted(p.name for p in folder.glob("*.ckpt"))
        told[moment] = {"code": code, "seen": seen, "whole": whole, "left": [int(n[7:-5]) for n in left]}
    return told


def stock(root: Path) -> dict[str, Any]:
    """Lightning's save where TMPDIR is another disk, killed while it writes over the old file."""
    io, path = TorchCheckpointIO(), root / "last.ckpt"
    io.save_checkpoint(checkpoint(8), path)

    def other_disk(*_: Any, **__: Any) -> None:
        raise OSError(errno.EXDEV, "another disk")

    def partly(source: Any, target: Any, *_: Any) -> None:
        target.write(source.read(1000))
        target.flush()
        die()

    def killed() -> None:
        os.rename = other_disk
        shutil._fastcopy_sendfile = shutil.copyfileobj = partly
        io.save_checkpoint(checkpoint(16), path)

    return {"code": forked(killed), "bytes": path.stat().st_size}


def going_on(root: Path) -> dict[str, Any]:
    """A run killed at its first listing, at a rotation, or in marking the best; against the same run left alone."""
    words = ("vae", "checkpoint.best=recon/psnr")
    forked(lambda: run(root / "straight", *words))
    straight, told = final(root / "straight"), {}
    moments = {"first": (Manifest, "add", 1), "rotation": (Manifest, "prune", 3), "best": (Manifest, "mark_best", 1)}
    for name, where in moments.items():
        folder = root / name
        code = forked(lambda folder=folder, where=where: (at_call(*where)(), run(folder, *words)))
        again = forked(lambda folder=folder: run(folder, *words))
        told[name] = {"codes": [code, again], "differ": differences(straight, final(folder))}
        told[name]["files"] = sorted(p.name for p in (folder / "checkpoints").iterdir())
    told["straight"] = sorted(p.name for p in (root / "straight/checkpoints").iterdir())
    return told


def full_disk(root: Path) -> dict[str, Any]:
    """A run on a disk of 8 MB that fits no second checkpoint until a file goes."""
    filler = root / "filler"
    filler.write_bytes(b"0" * 4_000_000)
    preflight.fits_on_disk = lambda *_: None
    warned: list[str] = []

    def warn(line: str) -> None:
        warned.append(line)
        if len(warned) == 2:
            filler.unlink()

    safe_io.warn = store.warn = warn
    run(root / "run", "vae", "model.net.width=24")
    sizes = [p.stat().st_size for p in (root / "run/checkpoints").glob("*.ckpt")]
    left = sorted(p.name for p in (root / "run/checkpoints").iterdir())
    return {"warned": warned, "left": left, "sizes": sizes, "newest": newest(root / "run/checkpoints").name}


def full_at_the_end(root: Path) -> dict[str, Any]:
    """A run that finds no room on its disk for what comes after the last checkpoint."""
    export, warned = report._export, []

    def filled(*args: Any) -> None:
        with contextlib.suppress(OSError), (root / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(b"0" * 4096)
        export(*args)

    report._export, report.warn = filled, warned.append
    preflight.fits_on_disk = lambda *_: None
    run(root / "run", "vae", "budget.images=16", "eval.every_images=16")
    seen = load(newest(root / "run/checkpoints"))["callbacks"]["Clock"]["images_seen"]
    left = [path.name for path in (root / "run").glob("weights*")]
    return {"warned": warned, "images_seen": seen, "left": left}


def locks(root: Path) -> dict[str, Any]:
    """Who gets a run folder while another has it, after that one was killed, and with loader processes left over."""

    def tried(folder: Path) -> str:
        reader, writer = os.pipe()

        def work() -> None:
            try:
                with folders.open_run(composed("model=vae", run_dir=folder)):
                    os.write(writer, b"held")
            except UserError as error:
                os.write(writer, error.line().encode())

        forked(work)
        os.close(writer)
        return os.read(reader, 1000).decode()

    told: dict[str, Any] = {}
    folder = root / "locked"
    with folders.open_run(composed("model=vae", run_dir=folder)):
        told["pid"], told["second"] = os.getpid(), tried(folder)
    told["after"], told["empty"] = tried(folder), [path.name for path in folder.iterdir()] == [LOG]
    killed = at_call(Clock, "on_train_batch_end", 3)
    code = forked(lambda: (killed(), run(root / "killed", "vae", "data.num_workers=2")))
    told["killed"], told["left"], told["stale"] = code, (root / "killed/lock").exists(), tried(root / "killed")
    return told


def secret(root: Path) -> dict[str, Any]:
    """In which files of a run with W&B offline a secret of the environment lies."""
    run(root / "run", "gan", "budget.images=8", "logger=wandb", "logger.mode=offline")
    files = [path for path in root.rglob("*") if path.is_file()]
    found = [str(path) for path in files if b"canary-7f3a9c51" in path.read_bytes()]
    logged = sum(path.suffix == ".wandb" for path in files)
    there = sum("canary-7f3a9c51" in value for value in os.environ.values())
    return {"code": 0, "in": found, "files": len(files), "wandb": logged, "environment": there}


def main() -> None:
    what, root = sys.argv[1], Path(sys.argv[2])
    parts = {part.__name__: part for part in (writing, stock, going_on, locks, full_disk, full_at_the_end, secret)}
    out = os.dup(1)
    os.dup2(2, 1)
    found = {}
    for name in what.split(","):
        (root / name).mkdir()
        found[name] = parts[name](root / name)
    os.write(out, (json.dumps(found) + "\n").encode())


if __name__ == "__main__":
    main()
