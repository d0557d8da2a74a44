"""Files of tensors that can always be made again: a file that is not whole counts as absent."""

from __future__ import annotations

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import torch

_DIGEST = 64  # hexadecimal characters of sha256 after the content; torch.load does not mind them


def name(*parts: object) -> str:
    """A file name that differs where any part does; parts are plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24] + ".pt"


def read(path: Path) -> dict[str, Any] | None:
    """What `write` stored, on the CPU; None where the file is absent, cut or changed."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    content, digest = data[:-_DIGEST], data[-_DIGEST:]
    if hashlib.sha256(content).hexdigest().encode() != digest:
        return None
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def write(path: Path, content: dict[str, Any]) -> None:
    """Store tensors and plain values; a reader sees the old file or the whole new one."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = buffer.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            file.write(data + hashlib.sha256(data).hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
