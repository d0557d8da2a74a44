"""Who started this process, and how many like it: torchrun, srun, Lightning, or a user alone."""

from __future__ import annotations

import os


def rank() -> int:
    """Which of all processes of a run this is, as torchrun, srun or Lightning's launcher tell it; 0 says things."""
    given = os.environ.get("RANK") or (os.environ["SLURM_PROCID"] if by_srun() else None)
    return int(given or os.environ.get("LOCAL_RANK") or 0) + (0 if given else int(os.environ.get("NODE_RANK") or 0))


def started() -> int | None:
    """How many processes a launcher started for one run, this one among them; None: it may start its own."""
    if os.environ.get("WORLD_SIZE"):
        return int(os.environ["WORLD_SIZE"])
    return srun_tasks() if by_srun() else None


def by_srun() -> bool:
    """Whether srun started several processes that are one run.

    torchrun may have been started by srun; then it tells. Lightning's SLURMEnvironment takes the variables of a job for
    those of a step: a batch script that calls python without srun has SLURM_NTASKS too, and one process.
    """
    return "TORCHELASTIC_RUN_ID" not in os.environ and srun_tasks() > 1


def srun_tasks() -> int:
    """How many processes the step of this one has; 1 outside of a step: in a batch script, or a shell of salloc."""
    variable = os.environ.get
    if variable("SLURM_STEP_NUM_TASKS"):
        return int(variable("SLURM_STEP_NUM_TASKS"))
    in_step = variable("SLURM_STEP_ID") is not None or int(variable("SLURM_PROCID") or 0) > 0
    shell = variable("SLURM_JOB_NAME") in ("bash", "interactive")
    return int(variable("SLURM_NTASKS") or 1) if in_step and not shell else 1


def on_each_node() -> int | None:
    """How many of the started processes torchrun or srun put on each node; None where they do not say."""
    given = os.environ.get("SLURM_NTASKS_PER_NODE" if by_srun() else "LOCAL_WORLD_SIZE")
    if given:
        return int(given)
    return srun_tasks() if by_srun() and srun_nodes() == 1 else None


def srun_nodes() -> int:
    return int(os.environ.get("SLURM_NNODES") or 1)
