"""What several test files stand on: one finished tiny run of each family."""

from __future__ import annotations

import fcntl
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from atelier.cli.start_up import load_torchmetrics

load_torchmetrics()  # before anything imports lightning: a few seconds of each worker

from tests.compose import composed  # noqa: E402
from tests.programs import ROOT, python  # noqa: E402
from tests.tiny import STANDS_ON, TINY, tiny  # noqa: E402

torch.set_num_threads(1)
os.fsync = lambda handle: None  # as in tests/warm.py
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
if "ATELIER_CACHE" not in os.environ:  # the workers take that of the process that starts them
    CACHE = tempfile.TemporaryDirectory(prefix="atelier-cache-")  # gone when that process ends
    os.environ["ATELIER_CACHE"] = CACHE.name


@pytest.fixture(autouse=True)
def nobody_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """A meeting place of ranks that an earlier test opened is not this one's."""
    from atelier.runs import meeting

    monkeypatch.setattr(meeting, "_store", None)


LONGEST = ("test_two_ranks.py", "test_resume.py", "test_configs.py", "test_entry_points.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first: a worker that begins one last would end minutes after the other."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_collection_finish() -> None:
    """What is imported by now is never garbage: looking for some, often and in all of it, took 7 % of the time."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # libraries count what is left at the end, and say so


def overrides(family: str, first: Path | str = "FIRST") -> list[str]:
    """The tiny run of a family; `first` is the folder of the run that it stands on."""
    return [word.replace("FIRST", str(first)) for word in TINY[family]]


def shared(factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of a session have, and its tests alone."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> run folder; the vae marks its best by recon/psnr. Copy before you change one.

    The workers share them: each trains what no other has begun, then waits for what others have.
    """
    root = shared(tmp_path_factory) / "finished"
    root.mkdir(exist_ok=True)
    for wait in (False, True):
        for family in TINY:
            train_once(root, family, wait)
    return {family: root / family for family in TINY}


def train_once(root: Path, family: str, wait: bool) -> None:
    """Unless another has, or `wait` is false and another does."""
    import train

    def done(family: str) -> bool:
        return (root / family / "weights.safetensors").exists()

    with (root / f"{family}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return
        if not done(family) and (family not in STANDS_ON or done(STANDS_ON[family])):
            words = [*tiny(family, root), "callbacks.grids.every_images=32"]
            words += ["checkpoint.best=recon/psnr"] if family == "vae" else []
            train.train(composed(*words, run_dir=root / family))


@pytest.fixture(scope="session")
def lpips_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The two weight files of LPIPS, random numbers under the names of the published ones."""
    from atelier.nets.vgg import VGG16, vgg

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    torch.save({f"features.{name}": v for name, v in vgg(VGG16).state_dict().items()}, folder / "vgg.pth")
    heads = {f"lin{k}.model.1.weight": torch.rand(1, w[-1], 1, 1) for k, w in enumerate(VGG16)}
    torch.save(heads, folder / "heads.pth")
    return {"vgg": str(folder / "vgg.pth"), "heads": str(folder / "heads.pth")}


SECRETS = {name: f"canary-7f3a9c51-{name}".ljust(40, "0") for name in ("WANDB_API_KEY", "HF_TOKEN", "MY_PASSWORD")}


def faults(what: str, folder: Path, *before: str) -> dict[str, Any]:
    """What tests/faults.py saw, with secrets in its environment; `before` is a command that it runs under."""
    words = ["-m", "tests.faults", what, str(folder)]
    environment = os.environ | SECRETS | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if before:
        command = [*before, sys.executable, *words]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    else:
        done = python(*words, folder=ROOT, environment=environment, seconds=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def provoked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Kills at every moment of a save, runs killed between saving and rotating, locks, secrets."""
    root = shared(tmp_path_factory)
    told = root / "provoked.json"
    with (root / "provoked.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # for all workers
        if not told.exists():
            found = faults("writing,stock,going_on,locks,secret", tmp_path_factory.mktemp("faults"))
            told.write_text(json.dumps(found))
    return json.loads(told.read_text())
