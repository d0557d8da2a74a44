"""How the files of a part lie in a folder: as a run, as diffusers or transformers keep them, as the two of taef2."""

from __future__ import annotations

from pathlib import Path

from atelier.checkpoints import diffusers_folder, taesd_files, transformers_folder
from atelier.checkpoints.store import sha256

OURS = "config.yaml", "weights.safetensors"
DIFFUSERS = diffusers_folder.CONFIG, diffusers_folder.WEIGHTS
TAEF2 = taesd_files.FILES
TRANSFORMERS = transformers_folder.CONFIG, transformers_folder.WEIGHTS  # and its tokenizer's, which may lie beside it
FORMS: tuple[tuple[str, ...], ...] = (OURS, DIFFUSERS, TAEF2, TRANSFORMERS)
DESCRIPTIONS = OURS[0], DIFFUSERS[0]  # files whose content is not what a part is known by


def form(folder: Path) -> tuple[str, ...] | None:
    """Which of the forms a part has in `folder`; None where none is whole there."""
    return next((names for names in FORMS if all((folder / name).exists() for name in names)), None)


def files(folder: Path) -> dict[str, Path]:
    """The files that make a part, by the names that they have in a copy of it; none where none is whole."""
    names = form(folder) or ()
    more = transformers_folder.tokenizer_files(folder) if names == TRANSFORMERS else {}
    return {name: folder / name for name in names} | more


def digest(folder: Path) -> str | None:
    """The sha256 of all that a part is known by, one file behind the other; None where there is none."""
    known = [path for name, path in files(folder).items() if name not in DESCRIPTIONS]
    return sha256(*known) if known else None
