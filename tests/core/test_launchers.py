"""However processes are started, they are one run, or one line says why not."""

from __future__ import annotations

import os

import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment

from atelier.core import launchers
from atelier.core.errors import UserError
from atelier.runs import folders, preflight
from atelier.runs.trainer import cluster

BATCH = {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "4", "SLURM_NNODES": "1", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "job"}
STEP = BATCH | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "3"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
SHELL = {"SLURM_JOB_NAME": "bash", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}
WAYS = {  # a launcher's variables -> rank, how many processes it started
    "alone": ({}, 0, None),
    "one of Lightning's": ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, 1, 2),
    "torchrun": (TORCHRUN, 1, 2),
    "torchrun in a batch script": (BATCH | TORCHRUN, 1, 2),
    "torchrun by srun, once a node": (STEP | TORCHRUN, 1, 2),
    "a batch script without srun": (BATCH, 0, None),
    "one of Lightning's in a batch script": (BATCH | {"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, 1, 2),
    "srun": (STEP, 3, 4),
    "srun of one task": (STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, 0, None),
    "srun from a shell of salloc": (STEP | {"SLURM_JOB_NAME": "interactive"}, 3, 4),
    "srun that says less": ({k: v for k, v in STEP.items() if "STEP" not in k}, 3, 4),
    "a shell of srun": (BATCH | SHELL | {"SLURM_NTASKS": "1"}, 0, None),
    "a shell of salloc, on a node": (BATCH | SHELL, 0, None),
    "a shell of salloc": ({"SLURM_JOB_ID": "17", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "interactive"}, 0, None),
}


@pytest.fixture
def started_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher, but the one whose variables a test sets."""
    for name in os.environ:
        if name.startswith(("SLURM_", "TORCHELASTIC_")) or name.endswith(("RANK", "WORLD_SIZE")):
            monkeypatch.delenv(name)


def put(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("way", WAYS)
def test_rank_and_number(started_by: None, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    variables, rank, n = WAYS[way]
    put(monkeypatch, variables)
    assert (launchers.rank(), launchers.started()) == (rank, n)
    assert launchers.rank is launchers.rank


@pytest.mark.parametrize("way", WAYS)
def test_lightning_sees_the_same(started_by: None, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """By the environment it is given, or else the one it finds by itself."""
    variables, _, n = WAYS[way]
    put(monkeypatch, variables)
    given = cluster()
    if "torchrun" in way:
        assert given == [] and torch.distributed.is_torchelastic_launched()
    elif n == 4:
        assert isinstance(given[0], SLURMEnvironment) and (given[0].world_size(), given[0].global_rank()) == (4, 3)
        given[0].validate_settings(4, 1)
    elif "SLURM_JOB_ID" in variables:
        assert isinstance(given[0], LightningEnvironment)
        assert given[0].creates_processes_externally == ("LOCAL_RANK" in variables)
    else:
        assert given == []


TWO_NODES = STEP | {"SLURM_NNODES": "2"}


@pytest.mark.parametrize(
    ("variables", "devices", "nodes", "fix"),
    [
        ({}, 2, 1, None),
        (BATCH, 1, 1, None),
        (BATCH, 2, 1, None),
        (BATCH | TORCHRUN, 2, 1, None),
        (BATCH | TORCHRUN, 1, 1, "trainer=ddp trainer.devices=2 trainer.num_nodes=1"),
        (TORCHRUN | {"WORLD_SIZE": "4"}, 4, 1, "trainer=ddp trainer.devices=2 trainer.num_nodes=2"),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "4"}, 2, 2, None),
        (STEP, 4, 1, None),
        (STEP, 1, 1, "trainer=ddp trainer.devices=4 trainer.num_nodes=1"),
        (STEP | {"SLURM_NTASKS_PER_NODE": "2"}, 4, 1, "srun --ntasks-per-node=4 python train.py ..."),
        (TWO_NODES, 2, 2, "srun --ntasks-per-node=2 python train.py ..."),
        (TWO_NODES | {"SLURM_NTASKS_PER_NODE": "2"}, 2, 2, None),
        (TWO_NODES | {"SLURM_NTASKS_PER_NODE": "2"}, 4, 1, "trainer=ddp trainer.devices=2 trainer.num_nodes=2"),
    ],
)
def test_devices_are_the_processes_that_were_started(
    started_by: None,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    devices: int,
    nodes: int,
    fix: str | None,
) -> None:
    put(monkeypatch, variables)
    if fix is None:
        return preflight.ranks(devices, nodes)
    with pytest.raises(UserError) as error:
        preflight.ranks(devices, nodes)
    line = error.value.line()
    assert line.startswith(f"error: trainer.devices={devices}: ") and line.endswith(f". Fix: {fix}")


def test_the_tasks_of_a_step_have_one_folder(started_by: None, monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, STEP)
    assert folders.stamp.__wrapped__() == "job_17_0"
