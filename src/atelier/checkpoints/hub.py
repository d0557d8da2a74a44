"""First stages that lie on the Hugging Face hub, or in its cache on this machine."""

from __future__ import annotations

from pathlib import Path

from atelier.checkpoints import diffusers_folder, forms, weight_files
from atelier.core.errors import UserError


def folder(place: str, fetch: bool, key: str) -> Path:
    """The folder on this machine of a net in the format of diffusers.

    Args:
        place: OWNER/NAME of the hub, or OWNER/NAME/FOLDER of one that holds several nets.
        fetch: whether what the cache lacks may be downloaded.
        key: key of the part, `model.first_stage`.

    Raises:
        UserError: it is not in the cache and may not be downloaded, or there is no such place.
    """
    owner_name, inner = "/".join(place.split("/")[:2]), "/".join(place.split("/")[2:])
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(
            f"{key}.run", place, "huggingface_hub is not installed", "pip install huggingface_hub"
        ) from error
    files = [diffusers_folder.CONFIG, *weight_files.patterns(diffusers_folder.WEIGHTS)]
    names = [f"{inner}/{name}".strip("/") for name in files]
    try:
        found = Path(snapshot_download(owner_name, allow_patterns=names, local_files_only=not fetch))
    except (OSError, ValueError) as error:  # what the hub's own errors are
        raise _absent(place, fetch, key, type(error).__name__) from error
    if forms.form(found / inner) != forms.DIFFUSERS:
        raise _absent(place, fetch, key, f"no {names[1]} there")
    return found / inner


def _absent(place: str, fetch: bool, key: str, why: str) -> UserError:
    if fetch:
        return UserError(f"{key}.run", place, f"it could not be downloaded ({why})", f"{key}.run=FOLDER")
    problem = "it is no folder here, nor in the cache of the hub"
    return UserError(f"{key}.run", place, problem, f"{key}.fetch=true downloads it, {key}.run=FOLDER takes yours")
