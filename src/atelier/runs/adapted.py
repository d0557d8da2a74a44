"""Adapters that a request puts on a trained model: files of others, or what runs of `lora=...` have learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from atelier.core.errors import UserError

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

    paths = _listed(places)
    counts = [1.0] * len(paths) if weights is None else [float(weight) for weight in _listed(weights)]
    if len(counts) != len(paths):
        fix = f"adapter_weights=[{','.join(['1'] * len(paths))}]" if paths else "adapters=FILE"
        raise UserError("adapter_weights", weights, f"there are {len(paths)} adapters", fix)
    if not paths:
        return {}
    if not model.takes_adapters:
        raise UserError("adapters", places, f"{type(model).__name__} takes none, diffusion models do", "adapters=null")
    names = [f"file_{k}" for k in range(len(paths))]
    files, how_much = dict(zip(names, map(_file, paths), strict=True)), dict(zip(names, counts, strict=True))
    adapters.read(model.net, model.embedder, files, how_much)
    return {"adapters": {Path(place).name: count for place, count in zip(paths, counts, strict=True)}}


def asked(cfg: Any) -> tuple[Any, Any]:
    """The two keys of a request, as plain values."""
    from atelier.runs.build import plain

    words = plain(cfg)
    return words["adapters"], words["adapter_weights"]


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _file(place: str) -> Path:
    path = Path(place).expanduser()
    if path.is_dir():
        path = path / FILE
        if not path.exists():
            raise UserError("adapters", place, f"this run has no {FILE}", "adapters=RUN of lora=..., finished")
    return path
