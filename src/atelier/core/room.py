"""How much memory there is, how much this process has of it and what tensors take, in bytes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container, version 2 and 1


def held(device: torch.device) -> int:
    """What this process has of the device's memory; of a CPU's, 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _kilobytes(Path("/proc/self/status"), "VmRSS") or 0


def there(device: torch.device) -> int | None:
    """What this process has of the device's memory and what is free; None where the system does not say.

    Of a CPU's memory that is no more than its container may have.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    free = _kilobytes(Path("/proc/meminfo"), "MemAvailable")
    limits = [int(text) for path in map(Path, LIMITS) if path.exists() and (text := path.read_text().strip()).isdigit()]
    if free is None:
        return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *limits]) if limits else None
    return min([free + held(device), *limits])


def size(tensors: Iterable[Tensor]) -> int:
    """What tensors take together."""
    return sum(t.numel() * t.element_size() for t in tensors)


def _kilobytes(path: Path, name: str) -> int | None:
    """A line of the kernel's tables, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", path.read_text() if path.exists() else "", re.MULTILINE)
    return found and 1024 * int(found[1])
