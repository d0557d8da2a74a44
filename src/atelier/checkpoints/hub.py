"""First stages and whole pipelines that lie on the Hugging Face hub, or in its cache on this machine."""

from __future__ import annotations

import re
from pathlib import Path

from atelier.checkpoints import (
    diffusers_folder,
    diffusers_pipeline,
    diffusers_scheduler,
    forms,
    transformers_folder,
    weight_files,
)
from atelier.core.errors import UserError

NAME = re.compile(r"[\w.-]+/[\w.-]+")  # OWNER/NAME
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")  # of a pipeline


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
    files = [diffusers_folder.CONFIG, *weight_files.patterns(diffusers_folder.WEIGHTS)]
    names = [f"{inner}/{name}".strip("/") for name in files]
    found = _snapshot(owner_name, names, fetch, key, place)
    if forms.form(found / inner) != forms.DIFFUSERS:
        raise _absent(place, fetch, key, f"no {names[1]} there")
    return found / inner


def pipeline(place: str, fetch: bool, key: str) -> Path:
    """The folder on this machine of a whole pipeline of diffusers, without what checks its pictures.

    Args:
        place: OWNER/NAME of the hub.
        fetch: whether what the cache lacks may be downloaded.
        key: key of the part, `model.net`.

    Raises:
        UserError: it is not in the cache and may not be downloaded, or there is no such place.
    """
    weights = [*weight_files.patterns(diffusers_folder.WEIGHTS), *weight_files.patterns(transformers_folder.WEIGHTS)]
    inside = [diffusers_folder.CONFIG, diffusers_scheduler.CONFIG, *transformers_folder.TOKENIZER, *weights]
    names = [diffusers_pipeline.INDEX, *(f"{part}/{name}" for part in PARTS for name in inside)]
    found = _snapshot(place, names, fetch, key, place)
    if not (found / diffusers_pipeline.INDEX).exists():
        raise _absent(place, fetch, key, f"no {diffusers_pipeline.INDEX} there")
    return found


def _snapshot(owner_name: str, names: list[str], fetch: bool, key: str, place: str) -> Path:
    """Where the files of these names lie, or are downloaded to."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        problem = "huggingface_hub is not installed"
        raise UserError(f"{key}.run", place, problem, "pip install huggingface_hub") from error
    try:
        return Path(snapshot_download(owner_name, allow_patterns=names, local_files_only=not fetch))
    except (OSError, ValueError) as error:  # what the hub's own errors are
        raise _absent(place, fetch, key, type(error).__name__) from error


def _absent(place: str, fetch: bool, key: str, why: str) -> UserError:
    if fetch:
        return UserError(f"{key}.run", place, f"it could not be downloaded ({why})", f"{key}.run=FOLDER")
    problem = "it is no folder here, nor in the cache of the hub"
    return UserError(f"{key}.run", place, problem, f"{key}.fetch=true downloads it, {key}.run=FOLDER takes yours")
