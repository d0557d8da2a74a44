"""Runs that are told to stop, each in a child forked from one process that has imported everything.

Called by test_stopping.py as a program of its own, because a process that has used several threads cannot be forked.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

torch.set_num_threads(1)

import train as entry
from atelier.callbacks.clock import Clock
from atelier.callbacks.evaluation import Evaluation
from atelier.callbacks.progress import Progress
from atelier.checkpoints.safe_io import SafeIO
from atelier.cli import jobs
from atelier.core import lines, stopping
from atelier.data.shapes import Shapes
from atelier.metrics.suite import Suite
from atelier.runs import preflight
from tests.compose import composed
from tests.programs import forked
from tests.tiny import TINY

WORDS = [*TINY["vae"], "data.num_workers=2", "eval.n_samples=4", "eval.n_real=4"]
OURS = ("out", "err", "hangs")  # files of what is looked at, not of the run
TERM, INT, HUP, USR1, KILL = (signal.Signals[f"SIG{name}"] for name in ("TERM", "INT", "HUP", "USR1", "KILL"))
Sent = Callable[[], None]


def group(*numbers: int) -> Sent:
    """Signals to this process and its loaders, as SLURM and a terminal send them: from outside."""

    def send() -> None:
        for number in numbers:
            subprocess.run(["kill", f"-{number}", "--", f"-{os.getpgid(0)}"], start_new_session=True, check=True)

    return send


def a_loader() -> None:
    """The end of one loader process, by the system's hand."""
    time.sleep(0.5)  # until it waits for work: in the midst of a batch it may leave a lock that its sibling waits for
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    os.kill(int(children[-1]), KILL)


def impatient() -> None:
    """Ctrl-C, and again some time later."""
    stopping.ECHO = 0.0
    for _ in range(2):
        group(INT)()


CASES: dict[str, tuple[type | Any, str, int, Sent]] = {  # where, at which call, what is sent
    "opening the set": (Shapes, "images", 1, group(TERM)),
    "checking, Ctrl-C twice": (preflight, "match", 1, group(INT, INT)),
    "the classifier": (Suite, "prepare", 1, group(USR1)),
    "Ctrl-C": (Clock, "on_train_batch_start", 4, group(INT)),
    "Ctrl-C, and again": (Clock, "on_train_batch_start", 4, impatient),
    "SIGTERM": (Clock, "on_train_batch_start", 4, group(TERM)),
    "SIGHUP": (Clock, "on_train_batch_start", 4, group(HUP)),
    "SIGUSR1": (Clock, "on_train_batch_start", 4, group(USR1)),
    "saving, twice": (SafeIO, "save_checkpoint", 1, group(TERM, TERM)),
    "the last evaluation": (Evaluation, "on_validation_end", 3, group(TERM)),
    "a loader is killed": (Clock, "on_train_batch_start", 5, a_loader),
}


def at(owner: Any, name: str, count: int, sent: Sent) -> None:
    """Patch a function so that its count-th call sends a signal first."""
    original, left = getattr(owner, name), [count]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            sent()
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def run(root: Path, case: str) -> None:
    """What happens in the child."""
    os.setsid()
    faulthandler.dump_traceback_later(100, exit=True, file=(root / "hangs").open("w"))
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(root / name, os.O_CREAT | os.O_WRONLY), number)
    stopping.listen()
    at(*CASES[case])
    jobs.job(entry.train, composed(*WORDS, run_dir=root / "outputs" / "run"))


def unheard(speak: Callable[[], object]) -> int:
    """The exit code of a process whose lines are for a pipe that nobody reads any more."""

    def work() -> None:
        reader, pipe = os.pipe()
        os.dup2(pipe, 1)
        os.close(reader)
        speak()

    return forked(work)


def a_job() -> None:
    """One of a sweep, which says its number first."""
    cfg = composed("model=gan", run_dir=Path(sys.argv[1]) / "job")
    hydra = HydraConfig.get()
    OmegaConf.set_readonly(hydra, False)
    hydra.mode, hydra.job.num = RunMode.MULTIRUN, 1
    jobs.job(lambda cfg: 0.5, cfg)


def main() -> None:
    speakers = (lambda: Progress(Clock(8, None, 0)).say("a line"), lambda: lines.say("a line"), a_job)
    told: dict[str, Any] = {"unheard": [unheard(speak) for speak in speakers]}
    for number, case in enumerate(CASES):
        root = Path(sys.argv[1]) / str(number)
        root.mkdir()
        os.chdir(root)
        begun = time.monotonic()
        code = forked(lambda root=root, case=case: run(root, case))
        seconds = time.monotonic() - begun
        files = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.name not in OURS)
        words = {name: (root / name).read_text() for name in ("out", "err")}
        told[case] = {"code": code, "files": files, "seconds": seconds} | words
    Path(sys.argv[1], "told.json").write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
