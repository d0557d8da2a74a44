"""Where a number comes from: the code, the device and the versions that made it."""

from __future__ import annotations

import functools
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[3]
CODE = ("src", "conf", "train.py", "evaluate.py")  # what a number depends on: a changed document is no other code
VERSIONS = ("torch", "lightning", "torchmetrics", "hydra-core", "numpy", "atelier")


@functools.cache
def commit() -> str | None:
    """Hash of the commit that this code is, with `-dirty` where files of it differ or are new.

    None outside a git checkout of the project: installed as a package, unpacked, or without git. It is looked up once
    a process, as what was imported stays what it was.
    """
    found = _git("rev-parse", "--show-prefix", "HEAD")
    if found is None or not found.startswith("\n"):  # its first line is where ROOT lies in the repository: at the top
        return None
    return found.strip() + ("-dirty" if _git("status", "--porcelain", "--", *CODE) != "" else "")


def _git(*words: str) -> str | None:
    """What git says of the project's folder; None where it fails."""
    command = ["git", "--no-optional-locks", "-C", str(ROOT), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def device(where: torch.device, ranks: int = 1) -> str:
    """Name of the GPU, or of the CPU with the number of its threads, and how many of them where several ranks work."""
    if where.type == "cuda":
        name = torch.cuda.get_device_name(where)
    else:
        n = torch.get_num_threads()
        name = f"{_cpu()}, {n} thread{'s' * (n > 1)}"
    return name if ranks == 1 else f"{ranks} x {name}"


@functools.cache
def _cpu() -> str:
    """As Linux names it; elsewhere what Python knows, or the kind of machine."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, [*names[:1], platform.processor(), platform.machine()]), "CPU")


def versions() -> dict[str, str | None]:
    """Of the libraries that numbers depend on, and of this project; None of what is not installed."""
    return {name: _version(name) for name in VERSIONS}


@functools.cache
def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
