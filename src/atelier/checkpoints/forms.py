"""How the files of a part lie in a folder: as a run, as diffusers or transformers keep them, as the two of taef2."""

from __future__ import annotations

from pathlib import Path

from atelier.checkpoints import diffusers_folder, taesd_files, transformers_folder, weight_files
from atelier.checkpoints.store import sha256
from atelier.core.errors import UserError

OURS = "config.yaml", "weights.safetensors"
DIFFUSERS = diffusers_folder.CONFIG, diffusers_folder.WEIGHTS
TAEF2 = taesd_files.FILES
TRANSFORMERS = transformers_folder.CONFIG, transformers_folder.WEIGHTS  # and its tokenizer's, which may lie beside it
FORMS: tuple[tuple[str, ...], ...] = (OURS, DIFFUSERS, TAEF2, TRANSFORMERS)
PUBLISHED = DIFFUSERS, TRANSFORMERS  # by others
DESCRIPTIONS = OURS[0], DIFFUSERS[0]  # files whose content is not what a part is known by


def form(folder: Path) -> tuple[str, ...] | None:
    """Which of the forms a part has in `folder`; None where none is whole there.

    The weights of diffusers and transformers may be several files, or those of a variant (checkpoints/weight_files.py).

    Raises:
        UserError: an index of several files lists what is not there, or there are several variants alone.
    """
    return next((names for names in FORMS if _whole(folder, names)), None)


def variant(folder: Path) -> str:
    """The variant of the weights in `folder`, as fp16; "" where they are the plain ones. Raises as `form`."""
    names = form(folder)
    found = weight_files.found(folder, names[1], _refused) if names in PUBLISHED else None
    return found.variant if found else ""


def files(folder: Path) -> dict[str, Path]:
    """The files that make a part, by the names that they have in a copy of it; none where none is whole. Raises as
    `form`."""
    names = form(folder)
    if names is None:
        return {}
    more = transformers_folder.tokenizer_files(folder) if names == TRANSFORMERS else {}
    return {name: folder / name for name in _names(folder, names) or ()} | more


def digest(folder: Path) -> str | None:
    """The sha256 of all that a part is known by, one file behind the other; None where there is none. Raises as
    `form`."""
    known = [path for name, path in files(folder).items() if name not in DESCRIPTIONS]
    return sha256(*known) if known else None


def _whole(folder: Path, names: tuple[str, ...]) -> bool:
    there = _names(folder, names)
    return there is not None and all((folder / name).exists() for name in there)


def _names(folder: Path, names: tuple[str, ...]) -> tuple[str, ...] | None:
    """The names of the files of a form, of which the weights may be several; None where it has no weights."""
    if names not in PUBLISHED:
        return names
    found = weight_files.found(folder, names[1], _refused)
    return None if found is None else (names[0], *found.names)


def _refused(folder: Path, problem: str) -> UserError:
    return UserError(".run", folder, problem, ".run=FOLDER that is whole")
