"""How the files of a part lie in a folder: as a run of ours, as a folder of diffusers, as the two files of taef2."""

from __future__ import annotations

from pathlib import Path

from atelier.checkpoints import diffusers_folder, taesd_files
from atelier.checkpoints.store import sha256

OURS = "config.yaml", "weights.safetensors"
DIFFUSERS = diffusers_folder.CONFIG, diffusers_folder.WEIGHTS
TAEF2 = taesd_files.FILES
DESCRIPTIONS = OURS[0], DIFFUSERS[0]  # files that hold no weights


def files(folder: Path) -> tuple[str, str] | None:
    """The names of the files that make a part, in `folder`; None where none is whole there."""
    return next((form for form in (OURS, DIFFUSERS, TAEF2) if all((folder / name).exists() for name in form)), None)


def digest(folder: Path) -> str | None:
    """The sha256 of all weights of a part, one file behind the other; None where there are none."""
    names = files(folder)
    return names and sha256(*(folder / name for name in names if name not in DESCRIPTIONS))
