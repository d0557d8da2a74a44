"""Which runs a report is about."""

from __future__ import annotations

import sys
from pathlib import Path

from atelier.core.errors import UserError
from atelier.runs import build, folders


def runs(words: list[str]) -> list[Path]:
    """Run folders, and those below folders of several; of no words, the newest finished run of each family.

    Runs without a checkpoint are left out, which one line tells.

    Raises:
        UserError: there is no such run, or none that has a checkpoint.
    """
    found = list(dict.fromkeys(run for word in words for run in _of(word))) if words else _newest()
    able = [run for run in found if folders.has_checkpoint(run)]
    if left := [run.name for run in found if run not in able]:
        print(f"left out, without a checkpoint: {', '.join(left)}", file=sys.stderr, flush=True)
    if not able:
        raise UserError("report.py", " ".join(words) or "outputs/", "no run with a checkpoint", "python train.py")
    return able


def _of(word: str) -> list[Path]:
    """A run, or the runs in a folder of several, as a sweep or outputs/."""
    folder = Path(word)
    if folder.is_dir() and not (folder / "config.yaml").exists():
        if found := folders.inside(folder):
            return sorted(found)
    return [folders.find(word)]


def _newest() -> list[Path]:
    """The newest run with a checkpoint of each family, oldest first."""
    newest = {build.stored_config(run).model._target_: run for run in folders.all_runs() if folders.has_checkpoint(run)}
    return list(newest.values())
