"""What a process loads before it works."""

from __future__ import annotations

import subprocess
import sys

LOADED = """
import sys
from atelier.cli.start_up import load_torchmetrics
load_torchmetrics()
import lightning.pytorch, torchmetrics.image.fid
print([name for name in ("scipy", "transformers", "wandb") if name in sys.modules])
import scipy.signal
from transformers import AutoModel
print(scipy.signal.windows.hann(3).sum())
"""


def test_the_optional_libraries_of_torchmetrics_stay_outside_and_can_be_imported_later() -> None:
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, timeout=200)
    assert done.stdout.split() == ["[]", "1.0"], done.stderr[-3000:]
