"""What a run was begun on: `ground.json` in its folder, which the help reads too, without the libraries of a run."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from atelier.core.names import SetNames

FILE = "ground.json"


def names(folder: Path) -> SetNames | None:
    """What the set of a run called its labels and attributes when it began; None where the run is from before that."""
    path = folder / FILE
    found = json.loads(path.read_text()).get("names") if path.exists() else None
    return None if found is None else SetNames(**found)


def images(folder: Path) -> str | None:
    """The fingerprint of the images that a run was begun on; None where it is not known."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        return json.loads((folder / FILE).read_text())["images"]
    return None
