"""What a multirun leaves behind: one table of its jobs, and the exit code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from atelier.cli.jobs import direction, fits_a_sweep, note, worst
from atelier.cli.messages import report
from atelier.core.errors import UserError
from atelier.core.lines import say
from atelier.runs.folders import shorter, summary
from atelier.runs.pages import task_words


class Summary(Callback):
    """Hydra calls it before the first job of a sweep and when all have ended, whichever launcher runs them."""

    def on_multirun_start(self, config: DictConfig, config_name: str) -> None:
        """Refuse what no job can do; Hydra would turn an exception here into a warning."""
        try:
            fits_a_sweep(config, config.hydra)
            its_folder(task_words(config.hydra))
            searching(config)
        except UserError as error:
            report(error)
            sys.exit(2)
        if "submitit" in config.hydra.launcher._target_:
            outlive_killed_jobs(Path(config.hydra.sweep.dir), worst(config.hydra))

    def on_multirun_end(self, config: DictConfig, config_name: str) -> None:
        """Write and print the table; a job that failed, which said so itself, makes the exit code 1."""
        folder = shorter(Path(config.hydra.sweep.dir))
        jobs = [job_summary(job) for job in sorted(folder.glob("[0-9]*"), key=lambda p: int(p.name))]
        if not jobs:
            return
        columns = ["job", "overrides", *dict.fromkeys(name for job in jobs for name in job["metrics"]), "error"]
        common = set.intersection(*(set(job["overrides"]) for job in jobs))
        for job in jobs:
            job["overrides"] = " ".join(word for word in job["overrides"] if word not in common)
        lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        for job in jobs:
            cells = {"job": job["job"], "overrides": job["overrides"], "error": job["error"]}
            cells |= {name: f"{value:.4g}" for name, value in job["metrics"].items()}
            shown = [str(cells.get(column, "")).replace("|", "\\|") for column in columns]
            lines.append("| " + " | ".join(shown) + " |")
        (folder / "table.md").write_text("\n".join(lines) + "\n")
        say("\n".join(lines) + f"\n{folder / 'table.md'}")
        if any(job["error"] for job in jobs):
            sys.exit(1)


def outlive_killed_jobs(folder: Path, value: float) -> None:
    """A job that SLURM or the system ended gives a sweeper `value`, as one that failed by itself, and has its row.

    Hydra's launcher asks submitit for one job after the other, and the first that left no result would end the sweep,
    without the other jobs and the table.
    """
    import submitit
    from submitit.core.utils import UncompletedJobError

    results = submitit.Job.results

    def or_value(self: submitit.Job) -> list[Any]:
        try:
            return results(self)
        except UncompletedJobError:
            overrides, _, number, *_ = self.submission().args  # of the launcher's call
            note(folder / str(number), "overrides.txt", "\n".join(filter_overrides(overrides)))
            note(folder / str(number), "error.txt", f"its job {self.job_id} was ended from outside: {self.state}")
            return [JobReturn(_return_value=value, status=JobStatus.COMPLETED)]

    submitit.Job.results = or_value


def its_folder(words: list[str]) -> None:
    """The folder of a sweep that a page began, not -m, has Hydra's name alone.

    Raises:
        UserError: `run_dir` was typed, at which no job would look.
    """
    for one in words:
        if one.startswith("run_dir="):
            folder = one.partition("=")[2]
            raise UserError("run_dir", folder, "it is of one run, and this is a sweep", f"hydra.sweep.dir={folder}")


def searching(config: DictConfig) -> None:
    """A search has a metric, and goes where that is better.

    Raises:
        UserError: it has none, or goes the other way.
    """
    way = direction(config.hydra)
    if way is None:
        return
    if config.objective is None:
        raise UserError("objective", None, "a search needs a metric", "objective=judge/valid")
    from atelier.callbacks.checkpoint import lower_is_better

    better = "minimize" if lower_is_better(config.objective) else "maximize"
    if way != better:
        word = "lower" if better == "minimize" else "higher"
        problem = f"{word} is better, and hydra.sweeper.direction={way}"
        raise UserError("objective", config.objective, problem, f"hydra.sweeper.direction={better}")


def job_summary(folder: Path) -> dict[str, Any]:
    """What a job's folder says of it."""
    error = folder / "error.txt"
    overrides = folder / "overrides.txt"
    values = summary(folder)["metrics"]
    unfinished = "" if (folder / "done").exists() else "did not finish"
    return {
        "job": folder.name,
        "overrides": overrides.read_text().splitlines() if overrides.exists() else [],
        "metrics": {name: value for name, value in values.items() if not name.startswith("real/")},
        "error": " ".join(error.read_text().split()) if error.exists() else unfinished,
    }
