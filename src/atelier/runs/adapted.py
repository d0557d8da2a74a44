"""Adapters that a request puts on a trained model: files of others, or what runs of `lora=...` have learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from atelier.core.errors import UserError
from atelier.runs import folders

FILE = "lora.safetensors"  # what a run of adapters leaves


def put_on(model: Any, places: list[str] | str | None, weights: list[float] | float | None) -> dict[str, Any]:
    """Put adapters on a model, and give what a protocol tells of them.

    Args:
        model: diffusion model.
        places: file or run, or a list of them; None: none.
        weights: numbers by which each of them counts; None: 1.

    Raises:
        UserError: the model takes none, a file does not fit it, or there are more weights than files or fewer.
    """
    from atelier.checkpoints import adapters
    from atelier.checkpoints.store import sha256

    paths = _listed(places)
    counts = [1.0] * len(paths) if weights is None else [float(weight) for weight in _listed(weights)]
    if len(counts) != len(paths):
        fix = f"adapter_weights=[{','.join(['1'] * len(paths))}]" if paths else "adapters=FILE"
        problem = f"there {'is 1 adapter' if len(paths) == 1 else f'are {len(paths)} adapters'}"
        raise UserError("adapter_weights", weights, problem, fix)
    if not paths:
        return {}
    if not model.takes_adapters:
        raise UserError("adapters", places, f"{type(model).__name__} takes none, diffusion models do", "adapters=null")
    files = [_file(place) for place in paths]
    adapters.read(model.net, model.embedder, files, counts)
    return {"adapters": [[Path(p).name, n, sha256(file)[:12]] for p, n, file in zip(paths, counts, files, strict=True)]}


def asked(cfg: Any) -> tuple[Any, Any]:
    """The two keys of a request, as plain values."""
    from atelier.runs.build import plain

    words = plain(cfg)
    return words["adapters"], words["adapter_weights"]


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _file(place: str) -> Path:
    path = folders.find(place) if place == "last" else Path(place).expanduser()
    if path.is_dir():
        path = path / FILE
        if not path.exists():
            raise UserError("adapters", place, f"this folder has no {FILE}", "adapters=RUN of lora=..., finished")
    return path
