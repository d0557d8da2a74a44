"""When the SLURM job that this process is part of ends."""

from __future__ import annotations

import math
import os
import subprocess
import time

from atelier.core.errors import UserError

PATIENCE = 30.0  # seconds for an answer of squeue; a controller may be busy


def seconds_left() -> float:
    """Seconds until SLURM ends the job, inf where its partition has no limit.

    squeue tells, whose answer follows `scontrol update TimeLimit=`; in a container without it, SLURM_JOB_END_TIME,
    which SLURM sets from 22.05 on.

    Raises:
        UserError: this is no job, or nobody says when it ends.
    """
    job, end = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_JOB_END_TIME")
    if job is None:
        raise UserError("budget.until", "job_end", "this is no SLURM job (SLURM_JOB_ID is not set)", "budget.minutes=N")
    try:
        command = ["squeue", "--noheader", f"--jobs={job}", "--format=%L"]
        told = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout
        return seconds(told.split()[0])
    except (OSError, subprocess.SubprocessError, IndexError, ValueError) as error:
        if end is not None:
            return max(0.0, float(end) - time.time())
        problem = f"squeue does not say when job {job} ends"
        raise UserError("budget.until", "job_end", problem, "budget.minutes=N") from error


def seconds(told: str) -> float:
    """SLURM's [days-][[hours:]minutes:]seconds in seconds; UNLIMITED is inf, what is over is 0.

    Raises:
        ValueError: it is none.
    """
    if told == "UNLIMITED":
        return math.inf
    if told.startswith("-"):
        return 0.0
    days, _, clock = told.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    return 86400.0 * int(days or 0) + sum(part * 60**k for k, part in enumerate(reversed(parts)))
