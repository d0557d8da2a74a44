"""What tiny runs of all families learn, as numbers that two commits can be compared by; no test, but a program.

    git worktree add ../before COMMIT && cp tests/same_weights.py ../before/tests
    for d in . ../before; do (cd $d && PYTHONPATH=src python -m tests.same_weights > told.json); done
    diff told.json ../before/told.json

In float32 on a CPU with one thread a change that only saves work leaves each line as it was. Of a run: a digest of the
weights, of all else in its checkpoint (buffers; averages, moments, counters), of the operations that were counted,
which such a change may lower, and of eight samples.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import torch

import train as entry
from atelier.checkpoints.store import load, newest
from atelier.core.rng import ImageRngs
from atelier.models.base import Generator, sampling_mode
from atelier.runs import folders
from tests.campaign import flat
from tests.compose import composed
from tests.tiny import TINY, tiny

PENALTIES = {"r1": ["model.r1_gamma=1"], "gp": ["model.gp_weight=10", "model.r1_gamma=0"]}
NO_NORM = ["model.discriminator.norm=none"]
VARIANTS: dict[str, tuple[str, list[str]]] = {  # name -> family, more words; ~WORD: without those that begin so
    "gan r1 in each step": ("gan", ["model.penalty_every=1"]),
    "gan r1 r2 in each step": ("gan", ["model.penalty_every=1", "model.r2_gamma=1"]),
    "gan r1 r2 now and then": ("gan", ["model.penalty_every=3", "model.r2_gamma=1"]),
    "gan gp in each step": ("gan", ["model.penalty_every=1", *PENALTIES["gp"]]),
    "gan gp now and then": ("gan", PENALTIES["gp"]),
    "gan relativistic": ("gan", ["adversarial@model.loss=relativistic", "model.penalty_every=1"]),
    "gan without augmentation": ("gan", ["~augment@", "~model.augment"]),
    "gan diffaugment": ("gan", ["~augment@", "~model.augment", "augment@model.augment=diffaugment"]),
    "stargan r1": ("stargan", ["model.gp_weight=0", *PENALTIES["r1"], "adversarial@model.loss=non_saturating"]),
    "progan r1": ("progan", ["model.gp_weight=0", *PENALTIES["r1"], "adversarial@model.loss=non_saturating"]),
    "stylegan gp": ("stylegan", [*PENALTIES["gp"], "adversarial@model.loss=wasserstein"]),
    "srgan r1 r2": ("srgan", [*NO_NORM, "model.r1_gamma=1", "model.r2_gamma=1"]),
    "srgan r1": ("srgan", [*NO_NORM, "model.r1_gamma=1"]),
    "ddpm ancestral": ("ddpm", ["sampler@model.sampler=ddpm", "model.sampler.steps=7"]),
    "ddpm heun with churn": ("ddpm", ["sampler@model.sampler=heun", "model.sampler.churn=20"]),
    "ddpm ddim with noise": ("ddpm", ["sampler@model.sampler=ddim", "model.sampler.eta=1"]),
}


def digest(values: dict[str, object]) -> str:
    said = hashlib.sha256()
    for name in sorted(values):
        value = values[name]
        said.update(name.encode())
        is_tensor = isinstance(value, torch.Tensor)
        said.update(value.contiguous().cpu().numpy().tobytes() if is_tensor else repr(value).encode())
    return said.hexdigest()[:12]


def told(folder: Path) -> dict[str, str]:
    """Digests of the newest checkpoint of a run and of what it samples."""
    checkpoint = load(newest(folder / "checkpoints"))
    loaded = folders.load(folder, ema=True)
    trained = set(loaded.model.trained())
    state = checkpoint["state_dict"]
    weights = {name: value for name, value in state.items() if name in trained}
    rest = flat({k: checkpoint[k] for k in ("callbacks", "optimizer_states")}, "")
    buffers = {name: value for name, value in state.items() if name not in trained}
    work = {name: rest.pop(name) for name in list(rest) if "Work" in name}
    found = {"weights": digest(weights), "buffers": digest(buffers), "rest": digest(rest), "work": digest(work)}
    if isinstance(loaded.model, Generator):
        model, batch = loaded.model.eval(), loaded.data.test_batch(0, 8)
        with sampling_mode(model, {}):
            samples = [model.sample(model.condition(batch, case), ImageRngs(0, 0, 8)) for case in model.cases]
        found["samples"] = digest({str(k): x for k, x in enumerate(samples)})
    return found


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    folders.register()
    runs = {family: (family, []) for family in TINY} | VARIANTS
    if names:
        runs = {name: one for name, one in runs.items() if any(word in name for word in names)}
    with tempfile.TemporaryDirectory() as root:
        for name, (family, words) in runs.items():
            folder = Path(root, family if not words else name.replace(" ", "_"))
            left_out = tuple(word[1:] for word in words if word.startswith("~"))
            kept = [word for word in tiny(family, root) if not (left_out and word.startswith(left_out))]
            more = ["eval.every_images=1000", "callbacks.table.every_images=1000"]
            more += [word for word in words if not word.startswith("~")]
            stdout, sys.stdout = sys.stdout, sys.stderr
            try:
                entry.train(composed(*kept, *more, run_dir=folder))
                found = told(folder)
            except Exception as error:
                found = {"error": repr(error)[:200]}
            sys.stdout = stdout
            print(json.dumps({name: found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
