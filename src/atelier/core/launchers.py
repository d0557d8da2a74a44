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
    """How many of the started processes torchrun or srun put on each node; None where they do not say, or unevenly."""
    variable = os.environ.get
    if not by_srun():
        return int(variable("LOCAL_WORLD_SIZE") or 0) or None
    n, nodes = srun_tasks(), srun_nodes()
    if nodes == 1:
        return n
    if counts := variable("SLURM_STEP_TASKS_PER_NODE"):  # as 2(x3), or 2,1
        return n // nodes if counts == f"{n // nodes}(x{nodes})" else None
    each = int(variable("SLURM_NTASKS_PER_NODE") or 0)  # of the job, which a step need not follow
    return each if each * nodes == n else None


def srun_nodes() -> int:
    """How many nodes the step of this process has, or else its job."""
    return int(os.environ.get("SLURM_STEP_NUM_NODES") or os.environ.get("SLURM_NNODES") or 1)


def local_rank() -> int:
    """Which process of its node this is."""
    return int(os.environ.get("LOCAL_RANK") or (os.environ.get("SLURM_LOCALID") if by_srun() else None) or 0)


def node_is_named() -> bool:
    """Whether somebody starts a process on each node by hand and says which node this one is."""
    return "NODE_RANK" in os.environ or "GROUP_RANK" in os.environ


def slurm_job() -> str | None:
    """The number of the SLURM job that this process is part of, ARRAY_TASK of an array; None outside of any."""
    variable = os.environ.get
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{variable('SLURM_ARRAY_JOB_ID')}_{variable('SLURM_ARRAY_TASK_ID')}"
    return variable("SLURM_JOB_ID")
