"""The ledger: each evaluation that a document quotes is one row, a line of JSON, of results/<data>.jsonl.

A row ends with a checksum of all else in it, so that a number that was changed by hand, or by a merge, is found. It
protects from slips, not from somebody who writes a checksum too.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from atelier.core import provenance
from atelier.core.errors import UserError
from atelier.runs.folders import LoadedRun, summary

RESULTS = provenance.ROOT / "results"
ENOUGH = 1000  # samples that a quoted number stands on
ABSOLUTE = re.compile(r"(?<=[=\[,:'\"])[/~][^\],}'\"]*")


def check(run: LoadedRun, n_samples: int) -> None:
    """Refuse, before anything is judged, what would make no row; the code is looked at before anyone edits it.

    Raises:
        UserError: the run is not finished, or `n_samples` are fewer than 1000 and than the test split has.
    """
    provenance.commit()
    judged, budget = summary(run.folder).get("images_seen", 0), run.cfg.budget.images
    if not judged == run.images_seen >= budget:
        problem = f"not finished ({min(judged, run.images_seen):,} of {budget:,} images), no row of results/"
        raise UserError("run", run.folder, problem, "its train.py command, with run_dir= this folder")
    if n_samples < (enough := min(ENOUGH, len(run.data.split("test")))):
        raise UserError("eval.n_samples", n_samples, "too few for a row of results/", f"eval.n_samples={enough}")


def record(run: LoadedRun, printed: dict[str, Any], words: list[str]) -> None:
    """Append the row of an evaluation; it takes the place of the row of the same commands.

    Args:
        run: checked run that was judged.
        printed: object that evaluate.py prints.
        words: overrides of evaluate.py, as typed.
    """
    row = row_of(run, printed, [word for word in words if not re.match(r"(run|root|eval\.record)=", word)])
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{run.cfg.choices.data}.jsonl"
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another evaluation may end now
        file.seek(0)
        kept = [line for line in file if _same(json.loads(line)) != _same(row)]
        file.truncate(0)
        file.writelines([*kept, json.dumps(row | {"checksum": checksum(row)}) + "\n"])
    told = f"recorded in results/{path.name}; python studies/results.py puts it into the documents"
    print(told, file=sys.stderr, flush=True)


def checksum(row: dict[str, Any]) -> str:
    """16 hexadecimal digits of SHA-256 over all of a row but its checksum, whatever the order of its keys."""
    rest = {key: value for key, value in row.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16]


def _same(row: dict[str, Any]) -> list[Any]:
    return [*(row[key] for key in ("experiment", "overrides", "judged_with")), row["protocol"].get("adapters")]


def row_of(run: LoadedRun, printed: dict[str, Any], judged_with: list[str]) -> dict[str, Any]:
    """A row. "training" and "judging" are apart where they may differ; what an older run does not say is null.

    `experiment` is the model page where no experiment was asked for; `seconds` are of the whole training with its
    evaluations, null where it was stopped on the way.
    """
    trained, protocol = summary(run.folder), printed["protocol"]
    device = {"training": trained.get("device"), "judging": provenance.device(run.model.device)}
    precision = {"training": trained["protocol"]["precision"], "judging": protocol["precision"]}
    return {
        "experiment": run.cfg.choices.get("experiment") or run.cfg.choices.model,
        "overrides": [portable(word) for word in typed(run.folder, trained["command"])],
        "judged_with": [portable(word) for word in judged_with],
        "run": named(run.folder),
        "seeds": {"training": run.cfg.seed, "judging": protocol["seed"]},
        "n": protocol["n_samples"],
        "values": printed["metrics"],
        "intervals": printed["intervals"],
        "protocol": protocol,
        "images": run.images_seen,
        "tflop": trained.get("tflop"),
        "seconds": None if trained.get("resumed_at") else trained.get("seconds"),
        "device": {when: f"{device[when]}, {precision[when]}" if device[when] else None for when in device},
        "commit": {"training": trained.get("commit"), "judging": provenance.commit()},
        "versions": {"training": trained.get("versions"), "judging": provenance.versions()},
    }


def typed(folder: Path, command: str) -> list[str]:
    """The overrides that a run was started with; a job of a sweep has its own in overrides.txt."""
    note = folder / "overrides.txt"
    words = note.read_text().splitlines() if note.exists() else shlex.split(command)[1:]
    return [word for word in words if "=" in word and not word.startswith(("-", "run_dir="))]


def portable(word: str) -> str:
    """An override with each absolute path in it replaced by its name."""
    return ABSOLUTE.sub(lambda path: named(Path(path[0])), word)


def named(path: Path) -> str:
    """A path as it is called under outputs/; elsewhere its last part."""
    parts = path.absolute().parts
    after = len(parts) - parts[::-1].index("outputs") if "outputs" in parts else -1
    return "/".join(parts[after:])
