"""Two ranks of which one ends or hangs, as srun starts them: what each then says, and how soon.

Called by runs/test_meeting.py as a program of its own, which imports everything once and forks both.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)

from PIL import Image

import train as entry
from atelier.callbacks.clock import Clock
from atelier.cli import jobs
from atelier.core.errors import UserError
from atelier.data import folders
from atelier.data.base import _Places
from atelier.data.shapes import Shapes
from atelier.models.vae import VAE
from atelier.runs import preflight
from tests.compose import composed
from tests.programs import forked
from tests.tiny import TINY

WORDS = [*TINY["vae"], "trainer.devices=2", "trainer.timeout_minutes=0.2", "data.num_workers=1"]


def refuse(*_: Any) -> None:
    raise UserError("data.root", "HERE", "the image a.png cannot be read any more: cut", "put the file back")


def killed(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hung(*_: Any) -> None:
    time.sleep(60)


def diverged(model: VAE, *_: Any) -> None:
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)


Done = Callable[..., None]
CASES: dict[str, tuple[tuple[int, ...], Any, str, int, Done]] = {  # which ranks, where, at which call, what
    "the first refuses": ((0,), entry.resume, "check_same_data", 1, refuse),
    "the second refuses": ((1,), preflight, "match", 1, refuse),
    "both refuse": ((0, 1), preflight, "match", 1, refuse),
    "a bug in the second": ((1,), Shapes, "images", 1, lambda *_: 1 / 0),
    "a loader of the second": ((1,), _Places, "__getitems__", 3, refuse),
    "both diverge": ((0, 1), VAE, "training_step", 4, diverged),
    "the second is killed": ((1,), Clock, "on_train_batch_start", 4, killed),
    "the first is killed": ((0,), Clock, "on_train_batch_start", 4, killed),
    "a hang of the second": ((1,), Clock, "on_train_batch_start", 4, hung),
}


FILES, N_FILES = "files", 12


def at(owner: Any, name: str, count: int, done: Done) -> None:
    """Patch a function so that something happens before its count-th call."""
    original, left = getattr(owner, name), [count]

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            done(*args)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def one(rank: int, root: Path, case: str, job: int) -> None:
    """What happens in the process of one rank."""
    step = {"JOB_ID": job, "STEP_ID": 0, "NTASKS": 2, "STEP_NUM_TASKS": 2, "NNODES": 1}
    step |= {"PROCID": rank, "LOCALID": rank, "NODEID": 0, "NODELIST": "127.0.0.1"}
    os.environ |= {f"SLURM_{name}": str(value) for name, value in step.items()}
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(root / f"{name}_{rank}", os.O_CREAT | os.O_WRONLY), stream)
    if case == FILES:
        return read_files(root)
    which, *rest = CASES[case]
    if rank in which:
        at(*rest)
    jobs.job(entry.train, composed(*WORDS, run_dir=root / "run"))


def read_files(root: Path) -> None:
    """A run on a folder of images, which notes each time that one is decoded to be checked."""
    (root / "images").mkdir(exist_ok=True)
    for k in range(N_FILES):
        if not (file := root / "images" / f"{k}.png").exists():
            Image.new("RGB", (8, 8), (k, 0, 0)).save(file)
    check = folders.check

    @functools.wraps(check)
    def noted(path: Path, most: int) -> str:
        with (root / "decoded").open("a") as notes:
            notes.write(f"{path.name}\n")
        time.sleep(0.05)  # both would be at it
        return check(path, most)

    folders.check = noted
    own = [word for word in WORDS if not word.startswith("data.n_")]
    data = ["data=images", f"data.root={root / 'images'}", f"data.cache={root / 'cache'}", "data.num_workers=0"]
    jobs.job(entry.train, composed(*own, *data, "budget.images=8", run_dir=root / "run"))


def both(root: Path, case: str, job: int) -> dict[str, Any]:
    """Exit codes, error lines and seconds of the two; what still runs when one has ended long ago is killed."""
    begun, pids, told = time.monotonic(), {}, {}
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            os._exit(forked(lambda rank=rank: one(rank, root, case, job)) % 256)
        pids[pid] = rank
    while pids:
        pid, status = os.wait()
        rank = pids.pop(pid)
        err = (root / f"err_{rank}").read_text()
        decoded = root / "decoded"
        told["decoded"] = decoded.read_text().split() if decoded.exists() else []
        told[rank] = {"code": os.waitstatus_to_exitcode(status), "err": err, "seconds": time.monotonic() - begun}
    return told


def main() -> None:
    told: dict[str, Any] = {}
    for number, case in enumerate(sys.argv[2:] or [*CASES, FILES]):
        root = Path(sys.argv[1]) / str(number)
        root.mkdir()
        os.chdir(root)
        told[case] = both(root, case, os.getpid() + 100 * number)
    Path(sys.argv[1], "told.json").write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
