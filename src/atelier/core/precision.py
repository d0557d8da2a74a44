"""The precisions that a run may have, and arithmetic that is the same in all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch.backends import cudnn

Precision = Literal["auto", "32-true", "bf16-mixed", "16-mixed"]  # of a run, as Lightning names them


@contextmanager
def float32(device: torch.device, wanted: bool = True) -> Iterator[None]:
    """Inside, float32 is float32: no autocast, and no TF32 in convolutions, which PyTorch otherwise allows itself.

    Where it is not `wanted`, nothing changes.
    """
    if not wanted:
        yield
        return
    kept = {"benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}
    with torch.autocast(device.type, enabled=False), cudnn.flags(enabled=True, allow_tf32=False, **kept):
        yield
