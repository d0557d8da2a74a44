"""What a machine can do: cores that this process may use, and how fast it convolves as training does."""

from __future__ import annotations

import math
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

QUOTAS = ("/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us /sys/fs/cgroup/cpu/cpu.cfs_period_us")
CPUINFO = "/proc/cpuinfo"
LAYER = {"cpu": (8, 64, 32), "cuda": (64, 256, 64)}  # images, channels and side of the convolution that is timed
KERNEL = 3
LEAST = 3  # calls that are timed, however long one takes


def cores() -> float:
    """Cores that this process may use: those that it may run on, or the share of them that its container has."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([float(mine), *_quotas()])


def _quotas() -> list[float]:
    """Cores that a container may use, as version 2 or 1 of control groups tells it; none where nothing limits it."""
    found = []
    for paths in QUOTAS:
        words = [word for path in map(Path, paths.split()) if path.exists() for word in path.read_text().split()]
        if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):
            found.append(int(words[0]) / int(words[1]))
    return found


def busy() -> float | None:
    """The load, where others take so much of the cores that what is measured is slower than alone."""
    load = os.getloadavg()[0]
    return load if load > cores() else None


def processor() -> str:
    """The name of the CPU; "" where the system does not say."""
    path = Path(CPUINFO)
    named = re.search(r"^model name\s*:\s*(.+)$", path.read_text() if path.exists() else "", re.MULTILINE)
    return named[1].strip() if named else platform.processor()


def rate(work: Callable[[], object], operations: int, seconds: float) -> float:
    """Operations a second of some work, done again and again for so long, once more before to warm up."""
    work()
    begun, n = time.perf_counter(), 0
    while n < LEAST or time.perf_counter() - begun < seconds:
        work()
        n += 1
    return n * operations / (time.perf_counter() - begun)


def convolution(device: torch.device, half: torch.dtype | None = None) -> tuple[Callable[[], None], int]:
    """A convolution forward and backward, as a training step does it, and the operations of that.

    It is 3 x 3 on as many channels as it gives: 2 K^2 C^2 operations for a place of an image, forward, for the gradient
    of the images and for that of the weights.

    Args:
        device: device that computes it.
        half: number format of autocast; None: float32.
    """
    n, channels, side = LAYER[device.type]
    layer = nn.Conv2d(channels, channels, KERNEL, padding=KERNEL // 2).to(device)
    x = torch.randn(n, channels, side, side, device=device, requires_grad=True)
    ahead: Tensor = torch.randn_like(x)

    def work() -> None:
        layer.zero_grad()
        x.grad = None
        with torch.autocast(device.type, dtype=half or torch.bfloat16, enabled=half is not None):
            y = layer(x)
        y.backward(ahead.to(y.dtype))
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return work, 3 * 2 * n * side**2 * KERNEL**2 * channels**2


def convolution_rates(device: torch.device, seconds: float) -> dict[str, float]:
    """Operations a second of that convolution in float32 and in bf16, measured for `seconds` together."""
    halves = {"float32": None, "bf16": torch.bfloat16}
    return {name: rate(*convolution(device, half), seconds / len(halves)) for name, half in halves.items()}


def threads_to_set(allowed: float, used: int, asked: bool) -> int | None:
    """OMP_NUM_THREADS for so many cores where torch uses more threads, or fewer since `asked`; None where that is well.

    Left to itself torch takes a thread for each physical core, and more of them seldom help.
    """
    wanted = max(1, math.floor(allowed))
    return wanted if used > wanted or (asked and used < wanted) else None
