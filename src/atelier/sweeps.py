"""What a multirun leaves behind: one table of its jobs, and the exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

failed: list[str] = []  # lines of the jobs of this process's sweep that did not finish


class Summary(Callback):
    """Hydra calls it when all jobs of a sweep have ended, whichever launcher ran them."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        jobs = [told(job) for job in sorted(folder.glob("[0-9]*"), key=lambda p: int(p.name))]
        if not jobs:
            return
        columns = ["job", "overrides", *dict.fromkeys(name for job in jobs for name in job["metrics"]), "error"]
        lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        for job in jobs:
            cells = {"job": job["job"], "overrides": job["overrides"], "error": job["error"]}
            cells |= {name: f"{value:.4g}" for name, value in job["metrics"].items()}
            lines.append("| " + " | ".join(str(cells.get(column, "")) for column in columns) + " |")
        (folder / "table.md").write_text("\n".join(lines) + "\n")
        print("\n".join(lines) + f"\n{folder / 'table.md'}", flush=True)
        failed.extend(f"job {job['job']} ({job['overrides']}): {job['error']}" for job in jobs if job["error"])


def told(folder: Path) -> dict[str, Any]:
    """What a job's folder says of it."""
    summary = folder / "summary.json"
    error = folder / "error.txt"
    overrides = folder / "overrides.txt"
    values = json.loads(summary.read_text())["metrics"] if summary.exists() else {}
    return {
        "job": folder.name,
        "overrides": overrides.read_text().strip() if overrides.exists() else "",
        "metrics": {name: value for name, value in values.items() if not name.startswith("real/")},
        "error": error.read_text().strip() if error.exists() else ("" if values else "did not finish"),
    }
