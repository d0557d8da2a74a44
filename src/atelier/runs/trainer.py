"""Lightning's Trainer as this project uses it: endless stream, no epochs, one clock, our own checkpoints."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import sys
import warnings
from datetime import timedelta
from typing import Literal

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import ClusterEnvironment, LightningEnvironment, SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy

from atelier.checkpoints.safe_io import SafeIO
from atelier.core.errors import UserError
from atelier.core.launchers import by_srun, on_each_node, srun_nodes, srun_tasks
from atelier.core.precision import Precision
from atelier.core.ranges import PositiveFloat, PositiveInt
from atelier.models.base import Model
from atelier.runs.meeting import slurm_place

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h, mallopt(3)


def make_trainer(
    *,
    accelerator: Literal["auto", "cpu", "gpu"],
    devices: PositiveInt,
    num_nodes: PositiveInt,
    precision: Precision,
    profiler: Literal["simple", "advanced"] | None,
    timeout_minutes: PositiveFloat,
    model: Model,
    callbacks: list[Callback],
    loggers: list[Logger],
    evaluate_every: int,
) -> Trainer:
    """A Trainer.

    Args:
        precision: auto = bf16-mixed where the device has bf16 instructions, else float32.
        timeout_minutes: patience of a rank with the others.
        evaluate_every: batches between evaluations.
    """
    quiet()
    on_gpu = accelerator == "gpu" or (accelerator == "auto" and torch.cuda.is_available())
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("trainer.accelerator", "gpu", "torch sees no GPU", "trainer=cpu")
    if on_gpu and devices > torch.cuda.device_count():
        n = torch.cuda.device_count()
        raise UserError("trainer.devices", devices, f"there are {n} GPUs", f"trainer.devices={n}")
    if precision == "16-mixed" and not on_gpu:
        raise UserError("trainer.precision", precision, "a CPU has no float16 training", "trainer.precision=bf16-mixed")
    if not on_gpu:
        keep_freed_memory()
    patience = timedelta(minutes=timeout_minutes)
    return Trainer(
        accelerator="gpu" if on_gpu else ("cpu" if accelerator == "auto" else accelerator),
        devices=devices,
        num_nodes=num_nodes,
        strategy=DDPStrategy(timeout=patience, **model.ddp_options) if devices * num_nodes > 1 else "auto",
        precision=resolved(precision, on_gpu),
        callbacks=callbacks,
        logger=loggers or False,
        plugins=[SafeIO(), *cluster()],
        profiler=profiler,
        benchmark=False,  # timed again, a run that goes on may find another convolution fastest, which rounds otherwise
        max_epochs=-1,
        max_steps=-1,
        val_check_interval=evaluate_every,
        check_val_every_n_epoch=None,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def cluster() -> list[ClusterEnvironment]:
    """How ranks find one another, where Lightning would be mistaken about it: in a SLURM job."""
    if by_srun():
        of_step = {"NTASKS": srun_tasks(), "NNODES": srun_nodes(), "NTASKS_PER_NODE": on_each_node()}
        os.environ.update({f"SLURM_{name}": str(value) for name, value in of_step.items()})  # it reads the job's
        address, port = slurm_place()
        os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
        return [SLURMEnvironment(auto_requeue=False)]
    if "SLURM_JOB_ID" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        return [LightningEnvironment()]
    return []


def keep_freed_memory() -> None:
    """Let this process keep what it frees, for the next step.

    glibc gives large blocks back to the system, and the next step waits until as many pages are zeroed again: 10,000 to
    20,000 in a step of StyleGAN2 at 64 px, 7 % of its time; two thirds of what MobileNet takes for the features of 50
    images. Keeping them takes 2 to 10 % more memory.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_MMAP_MAX, 0)


def give_back_memory() -> None:
    """Give the system back what this process has freed and kept, of a GPU too."""
    gc.collect()
    if sys.platform == "linux" and (malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        malloc_trim(0)
    torch.cuda.empty_cache()  # nothing where there is none


def resolved(asked: Precision, on_gpu: bool) -> str:
    """What `auto` is on this machine."""
    if asked != "auto":
        return asked
    if on_gpu:
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    return "bf16-mixed" if _cpu_has_bf16() else "32-true"


def _cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 numbers itself; torch offers no public way to ask."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, lambda: False)()) for name in names)


def device() -> torch.device:
    """Where sample.py and evaluate.py work; a process that works on a CPU keeps what it frees from here on."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    keep_freed_memory()
    return torch.device("cpu")


def autocast(model: Model, precision: Precision) -> torch.autocast:
    """The precision of a run outside of Lightning; to be entered for each use."""
    kind = model.device.type
    half = torch.float16 if precision == "16-mixed" else torch.bfloat16
    return torch.autocast(kind, dtype=half, enabled=resolved(precision, kind == "cuda") != "32-true")


def quiet() -> None:
    """Leave out the lines of the libraries that tell a user nothing."""
    for pattern in (
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*does not have many workers.*",
        ".*find_unused_parameters=True was specified.*",
        ".*anonymous setting has no effect.*",
        ".*You are trying to `self.log.*",
        ".*Checkpoint directory.*",
        ".*modules? in eval mode.*",
        ".*has no `val_dataloader`.*",
        ".*The number of training batches.*",
    ):
        warnings.filterwarnings("ignore", message=pattern)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
