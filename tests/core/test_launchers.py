"""However processes are started, they are one run, or one line says why not."""

from __future__ import annotations

import os

import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment

from atelier.core import launchers
from atelier.core.errors import UserError
from atelier.runs import folders, preflight
from atelier.runs.meeting import slurm_place
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
        if name.startswith(("SLURM_", "TORCHELASTIC_", "MASTER_")) or name.endswith(("RANK", "WORLD_SIZE")):
            monkeypatch.delenv(name)
    for name in ("ENVIRONMENT", "MASTER_ADDR", "MASTER_PORT", "SLURM_NTASKS_PER_NODE"):  # `cluster` sets some of them
        monkeypatch.setenv(name, "")
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


TWO_NODES = STEP | {"SLURM_NNODES": "2", "SLURM_NODELIST": "n[1-2]"}


@pytest.mark.parametrize(
    ("variables", "devices", "nodes", "fix"),
    [
        ({}, 2, 1, None),
        (BATCH, 1, 1, None),
        (BATCH, 2, 1, None),
        ({}, 2, 3, "torchrun --nnodes=3 --nproc-per-node=2 ... train.py ..."),
        ({"NODE_RANK": "0"}, 2, 3, None),
        (BATCH, 2, 2, "srun -N2 -n4 --ntasks-per-node=2 python train.py ..."),
        (BATCH | TORCHRUN, 2, 1, None),
        (BATCH | TORCHRUN, 1, 1, "trainer=ddp trainer.devices=2 trainer.num_nodes=1"),
        (TORCHRUN | {"WORLD_SIZE": "4"}, 4, 1, "trainer=ddp trainer.devices=2 trainer.num_nodes=2"),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "4"}, 2, 2, None),
        (STEP, 4, 1, None),
        (STEP, 1, 1, "trainer=ddp trainer.devices=4 trainer.num_nodes=1"),
        (STEP | {"SLURM_NTASKS_PER_NODE": "2"}, 4, 1, None),  # of the job, of which this step is a part
        (
            TWO_NODES,
            2,
            2,
            "srun -N2 -n4 --ntasks-per-node=2 python train.py trainer=ddp trainer.devices=2 trainer.num_nodes=2",
        ),
        (TWO_NODES | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, 2, 2, None),
        (
            TWO_NODES | {"SLURM_STEP_TASKS_PER_NODE": "3,1"},
            2,
            2,
            "srun -N2 -n4 --ntasks-per-node=2 python train.py trainer=ddp trainer.devices=2 trainer.num_nodes=2",
        ),
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
        preflight.ranks(devices, nodes)
        if launchers.by_srun():
            (environment,) = cluster()
            environment.validate_settings(devices, nodes)
            assert environment.world_size() == devices * nodes
        return
    with pytest.raises(UserError) as error:
        preflight.ranks(devices, nodes)
    line = error.value.line()
    key = "trainer.devices" if launchers.started() else "trainer.num_nodes"
    assert line.startswith(f"error: {key}=") and line.endswith(f". Fix: {fix}")


SBATCH = BATCH | {"ENVIRONMENT": "BATCH"}
ARRAY = SBATCH | {"SLURM_JOB_ID": "19", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "2"}


def test_two_steps_of_a_job_meet_at_two_places(started_by: None, monkeypatch: pytest.MonkeyPatch) -> None:
    met = set()
    for step, nodes in ((0, "n[3-4]"), (0, "n[3-4]"), (1, "n5")):
        put(monkeypatch, STEP | {"SLURM_STEP_ID": str(step), "SLURM_STEP_NODELIST": nodes, "SLURM_NODELIST": "n[1-9]"})
        met.add(slurm_place())
    assert {address for address, _ in met} == {"n3", "n5"} and len({port for _, port in met}) == 2


@pytest.mark.parametrize(
    ("variables", "begins"),
    [
        (STEP, "job_17_0"),
        (SBATCH, "job_17_"),
        (STEP | SBATCH, "job_17_"),
        (SBATCH | TORCHRUN, "job_17_"),
        (ARRAY, "job_17_2_"),
        ({k: v for k, v in SBATCH.items() if k != "ENVIRONMENT"}, None),
        ({}, None),
    ],
)
def test_a_job_that_is_requeued_finds_the_folder_of_its_command(
    started_by: None, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], begins: str | None
) -> None:
    put(monkeypatch, variables)
    names = []
    for words in (["seed=1"], ["seed=1"], ["seed=2"]):
        monkeypatch.setattr("sys.argv", ["train.py", *words])
        names.append(folders.stamp.__wrapped__() if begins else folders.of_job())
    if begins is None or begins == "job_17_0":
        assert names == [begins] * 3
    else:
        assert names[0] == names[1] != names[2] and all(name.startswith(begins) for name in names)
