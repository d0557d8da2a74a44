"""How the files of a part lie in a folder: as a run, as diffusers or transformers keep them, as the two of taef2."""

from __future__ import annotations

from pathlib import Path

from atelier.checkpoints import diffusers_folder, taesd_files, transformers_folder
from atelier.checkpoints.store import sha256

OURS = "config.yaml", "weights.safetensors"
DIFFUSERS = diffusers_folder.CONFIG, diffusers_folder.WEIGHTS
TAEF2 = taesd_files.FILES
TRANSFORMERS = transformers_folder.CONFIG, transformers_folder.WEIGHTS, "vocab.json", "merges.txt"
FORMS: tuple[tuple[str, ...], ...] = (OURS, DIFFUSERS, TAEF2, TRANSFORMERS)
DESCRIPTIONS = OURS[0], DIFFUSERS[0]  # files whose content is not what a part is known by


def files(folder: Path) -> tuple[str, ...] | None:
    """The names of the files that make a part, in `folder`; None where none is whole there."""
    return next((form for form in FORMS if all((folder / name).exists() for name in form)), None)


def digest(folder: Path) -> str | None:
    """The sha256 of all weights of a part, one file behind the other; None where there are none."""
    names = files(folder)
    return names and sha256(*(folder / name for name in names if name not in DESCRIPTIONS))
