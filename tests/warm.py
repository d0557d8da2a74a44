"""What a run imports on its way, imported: for processes that others are forked from.

Only backward is left out: a process that has threads of its own for it, as where there is a GPU, cannot be forked.
"""

from __future__ import annotations

import importlib
import os
import pkgutil

os.environ["OMP_NUM_THREADS"] = "1"
os.fsync = lambda handle: None  # no machine goes down here, and a tiny run would wait for its disk 36 times

import torch
from PIL import Image

torch.set_num_threads(1)

import atelier
from atelier.runs import preflight
from tests.compose import composed
from tests.tiny import tiny

for module in pkgutil.walk_packages(atelier.__path__, "atelier."):
    if module.name == "atelier.demo.page":
        continue  # Gradio, which need not be there and has threads of its own
    importlib.import_module(module.name)
Image.init()
preflight.check(composed(*tiny("vae", "unused")))  # builds the checks and reads the grammars
