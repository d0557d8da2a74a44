"""Runs that are killed and go on, in children forked from one process that has imported everything.

Called by test_resume.py as a program of its own, because a process that has used several threads cannot be forked.
"""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)

import train as entry
from atelier.callbacks import clock
from atelier.callbacks.clock import Clock
from atelier.callbacks.ema import EMA
from atelier.callbacks.evaluation import Evaluation
from atelier.checkpoints.safe_io import SafeIO
from atelier.checkpoints.store import load, newest
from atelier.evaluation.evaluator import Evaluator
from tests import warm  # noqa: F401  (or each child would import as much)
from tests.compose import composed
from tests.models import test_diffusers_pipeline as pipeline
from tests.programs import forked
from tests.tiny import COMMON, FOUR, PICTURELESS, STANDS_ON, TINY, tiny

FEW = ["eval.n_diagnosed=2"]  # denoising many takes an eighth of the time
SHORT = ["budget.images=24", "eval.every_images=8", "checkpoint.every_images=6", "model.sampler.steps=2", *FEW]

KILL_POINTS = (
    (Clock, "on_train_batch_start"),
    (EMA, "on_before_optimizer_step"),
    (Evaluation, "on_train_batch_end"),
    (Evaluator, "_facts"),
    (SafeIO, "save_checkpoint"),
)


def run(folder: Path, words: list[str]) -> None:
    entry.train(composed(*words, run_dir=folder))


def words_of(root: Path, family: str) -> list[str]:
    return [*tiny(family, root / "first"), *FEW]


def killed_at(owner: type, name: str, count: int) -> Callable[[], None]:
    """Patch a hook so that its count-th call kills the process."""

    def patch() -> None:
        original, left = getattr(owner, name), [count]

        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0 and owner is SafeIO:
                torch.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # the temporary file is open and empty
            elif left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, *args, **kwargs)

        setattr(owner, name, wrapped)

    return patch


def kills(folder: Path, words: list[str], n: int, seed: int) -> int:
    """Start, kill at a random moment, start again, ... and let it finish; gives how often it was killed."""
    rng, done = random.Random(seed), 0
    judged = not {f"model={family}" for family in PICTURELESS} & set(words)
    points = [point for point in KILL_POINTS if judged or point[1] != "_facts"]
    for _ in range(n):
        owner, name = rng.choice(points)
        patch = killed_at(owner, name, rng.randint(1, 3))
        code = forked(lambda patch=patch: (patch(), run(folder, words)))
        done += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL), code
    code = forked(lambda: run(folder, words))
    assert code == 0, code
    return done


def final(folder: Path) -> dict[str, Any]:
    """All that a run ends with: the checkpoint's entries and the rows of its table, wall-clock figures left out."""
    told = flat(load(newest(folder / "checkpoints")), "")
    told = {name: value for name, value in told.items() if "val_loop" not in name}
    with (folder / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            told |= {f"row {row['images_seen']} {k}": v for k, v in row.items() if v and not k.startswith("perf/")}
    return told


def flat(node: Any, name: str) -> dict[str, Any]:
    if isinstance(node, dict):
        return {k: v for key, child in node.items() for k, v in flat(child, f"{name}/{key}").items()}
    if isinstance(node, (list, tuple)):
        return {k: v for i, child in enumerate(node) for k, v in flat(child, f"{name}/{i}").items()}
    return {name: node}


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    def same(x: Any, y: Any) -> bool:
        if isinstance(x, torch.Tensor):
            return isinstance(y, torch.Tensor) and torch.equal(x, y)
        return x == y or (x != x and y != y)

    return [name for name in sorted(set(a) | set(b)) if name not in a or name not in b or not same(a[name], b[name])]


AT_THE_START = (Clock, "on_train_batch_start", 8)
IN_THE_LAST_JUDGING = (Evaluator, "_facts", 5)  # the same batch saved a checkpoint
DROPS: dict[str, tuple[tuple[type, str, int], Callable[[], None]]] = {
    "position and clock": (AT_THE_START, lambda: setattr(Clock, "load_state_dict", lambda self, state: None)),
    "averages": (AT_THE_START, lambda: setattr(EMA, "load_state_dict", lambda self, state: None)),
    "reseeding": (AT_THE_START, lambda: setattr(clock, "reseed", lambda seed, device: None)),
    "evaluation due": (IN_THE_LAST_JUDGING, lambda: setattr(Evaluation, "on_train_start", lambda *_: None)),
}


def prepare(root: Path, family: str) -> None:
    """Its config is composed once for all children, and what it stands on is trained first."""
    composed(*words_of(root, family))
    first = STANDS_ON.get(family)
    if first and not (root / "first" / first / "weights.safetensors").exists():
        code = forked(lambda: run(root / "first" / first, words_of(root, first)))
        assert code == 0


def campaign(root: Path, name: str, words: list[str], chains: int, per_chain: int, seed: int) -> dict[str, Any]:
    """Chains of kills of a run, where the seed has them, beside the same run without kills."""
    assert forked(lambda: run(root / name, words)) == 0
    straight = final(root / name)
    told: dict[str, Any] = {"entries": len(straight), "kills": 0, "differ": []}
    for chain in range(chains):
        folder = root / f"{name}_{chain}"
        told["kills"] += kills(folder, words, per_chain, seed + chain)
        told["differ"] += differences(straight, final(folder))
    return told


def dropped(root: Path, family: str) -> dict[str, int]:
    """How many entries differ when one saved item is not restored."""
    prepare(root, family)
    words = words_of(root, family)
    forked(lambda: run(root / family, words))
    straight, told = final(root / family), {}
    for name, (where, drop) in DROPS.items():
        folder = root / f"dropped_{name.split()[0]}"
        forked(lambda folder=folder, where=where: (killed_at(*where)(), run(folder, words)))
        forked(lambda folder=folder, drop=drop: (drop(), run(folder, words)))
        told[name] = len(differences(straight, final(folder)))
    return told


def stopped(root: Path, family: str, where: tuple[type, str], number: int) -> dict[str, Any]:
    """A signal at a hook: how it ended, how fast, and what differs after going on."""
    prepare(root, family)
    words = words_of(root, family)
    forked(lambda: run(root / family, words))
    folder = root / f"stopped_{where[1]}"
    mark = root / "signalled"

    def patch() -> None:
        original, left = getattr(*where), [3]

        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                mark.touch()
                os.kill(os.getpid(), number)
            return original(self, *args, **kwargs)

        setattr(*where, wrapped)

    code = forked(lambda: (patch(), run(folder, words)))
    seconds = time.time() - mark.stat().st_mtime
    forked(lambda: run(folder, words))
    return {"code": code, "seconds": seconds, "differ": differences(final(root / family), final(folder))}


def on_others(root: Path) -> dict[str, list[str]]:
    """Runs that train what others have: adapters of a run, a published pipeline, adapters of that."""
    written = root / "pipeline"
    assert forked(lambda: pipeline.written(written, "SD1", pipeline.CASES["SD1 DDIM"].scheduler)) == 0
    published = ["model=stable_diffusion", f"model.net.run={written}", "model.embedder.sources.text.cut=true"]
    published = [*COMMON, *published, "data.image_size=64", "data.batch_size=2", *SHORT]
    return {
        "adapters": [*words_of(root, "ldm"), "lora=blocks", f"start_from={root}/ldm"],
        "stable_diffusion": published,
        "stable_diffusion_adapters": [*published, "lora=attention", "lora.text_targets=[qkv]"],
    }


def main() -> None:
    root, (chains, kills_each, fewer) = Path(sys.argv[1]), map(int, sys.argv[2:])
    told: dict[str, Any] = {}
    for seed, family in enumerate(TINY):
        prepare(root, family)
        how = (chains, kills_each) if family in FOUR else (1, fewer)
        told[family] = campaign(root, family, words_of(root, family), *how, seed)
    for seed, (name, words) in enumerate(on_others(root).items()):
        told[name] = campaign(root, name, words, 1, fewer, seed)
    told["dropped"] = dropped(root / "drops", "ddpm")
    told["sigterm"] = stopped(root / "term", "ddpm", (Clock, "on_train_batch_start"), signal.SIGTERM)
    told["sigterm while judging"] = stopped(root / "judging", "gan", (Evaluator, "_facts"), signal.SIGTERM)
    told["sigint"] = stopped(root / "int", "vae", (Clock, "on_train_batch_start"), signal.SIGINT)
    (root / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
