"""One rank of two: walks over the families and tells what it saw. Started twice by test_two_ranks.py.

The same program on one rank gives what the two are compared with.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)

from hydra.utils import instantiate

import train as entry
from atelier.callbacks.clock import Clock
from atelier.checkpoints.store import load, newest
from atelier.metrics import classifier
from atelier.nets.equalized import MinibatchStd
from atelier.runs import folders
from tests.campaign import differences, flat
from tests.compose import composed
from tests.tiny import FOUR, TINY, tiny

MEASURED = ["metrics=classifier", f"metrics.cache={sys.argv[-1]}/cache", "eval.n_samples=10", "eval.n_real=13"]
MEASURED += ["eval.every_images=96"]  # once
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


ADAPTERS = "adapters"  # of the run of ldm, beside the families
WHOLE = (*FOUR, "cyclegan", ADAPTERS)  # train whole and go on: each shape of module, and what keeps images by rank


def run(folder: Path, family: str, *more: str) -> None:
    words = tiny(family.replace(ADAPTERS, "ldm"), folder.parent)
    words += [f"start_from={folder.parent / 'ldm'}", "lora=blocks", "lora.targets=['.*']"] if family == ADAPTERS else []
    entry.train(composed(*words, f"trainer.devices={RANKS}", *MEASURED, *more, run_dir=folder))


def brief_classifiers() -> None:
    """Sets have classifiers of 10 steps, not of 400, which took a fifth of the walk; nothing here asks more of them."""
    fit = classifier._fit
    classifier._fit = lambda net, rgb, targets, steps: fit(net, rgb, targets, 10)


def noise_of_batches(seen: list[float]) -> None:
    """Note the first random number after each batch's seeding."""
    original = Clock.on_train_batch_start

    def wrapped(self: Clock, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        state = torch.get_rng_state()
        seen.append(float(torch.rand(())))
        torch.set_rng_state(state)

    Clock.on_train_batch_start = wrapped


def whole_runs(root: Path) -> dict[str, Any]:
    """Figures of their samples, and what differs where they were stopped and went on."""
    told: dict[str, Any] = {}
    noise: list[float] = []
    noise_of_batches(noise)
    for family in WHOLE:
        run(root / family, family)
        if RANK == 0:  # as if it had ended after its last checkpoint but one
            shutil.copytree(root / family, root / f"{family}_again")
            newest(root / f"{family}_again/checkpoints").unlink()
        torch.distributed.barrier()
        told[family] = folders.summary(root / family)["metrics"]
        begun = len(noise)
        run(root / f"{family}_again", family, "metrics=none")
        told[f"{family} batches"] = len(noise) - begun
        told[f"{family} resumed"] = differences(*(states(root / name) for name in (family, f"{family}_again")))
    told["noise"] = list(noise)
    return told


def states(folder: Path) -> dict[str, Any]:
    """Weights, averages and optimizers of the newest checkpoint."""
    checkpoint = load(newest(folder / "checkpoints"))
    return flat({k: checkpoint[k] for k in ("state_dict", "callbacks", "optimizer_states")}, "")


def constant(value: float) -> Any:
    """A stand-in for torch.randn and torch.rand."""

    def full(*shape: Any, dtype: Any = None, device: Any = None, generator: Any = None) -> torch.Tensor:
        size = shape[0] if shape and isinstance(shape[0], (tuple, torch.Size)) else shape
        return torch.full(size, value, dtype=dtype, device=device)

    return full


class Same(torch.nn.Module):
    """In place of a norm."""

    def __init__(self, channels: int, affine: bool = True) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def first_batches(root: Path) -> dict[str, Any]:
    """The first batch's gradients (as Adam's first moments) where nothing is drawn in it and no batch is normed.

    And the figures of the samples that are drawn behind it; one rank judges the runs that two have trained.
    """
    norm, layers = torch.nn.BatchNorm2d, classifier.Classifier.layers

    def with_norms(n_logits: int) -> torch.nn.ModuleDict:
        torch.nn.BatchNorm2d = norm  # of the net that judges
        net = layers(n_logits)
        torch.nn.BatchNorm2d = Same
        return net

    classifier.Classifier.layers, torch.nn.BatchNorm2d = staticmethod(with_norms), Same
    MinibatchStd.forward = lambda self, x: torch.cat([x, 0 * x[:, :1]], dim=1)  # compares the images of a rank
    drawn = torch.randn, torch.randn_like, torch.rand
    start, end = Clock.on_train_batch_start, Clock.on_train_batch_end

    def started(self: Clock, *args: Any) -> None:
        start(self, *args)
        torch.randn, torch.randn_like, torch.rand = constant(0.3), torch.zeros_like, constant(0.5)

    def ended(self: Clock, *args: Any) -> None:
        torch.randn, torch.randn_like, torch.rand = drawn  # for judging
        end(self, *args)

    Clock.on_train_batch_start, Clock.on_train_batch_end = started, ended
    told: dict[str, Any] = {"gradients": {}}
    for family in [*TINY, ADAPTERS]:
        judged = RANKS > 1 and family not in WHOLE
        folder = root / (family if judged else f"{family}_begun_by_{RANKS}")
        run(folder, family, "budget.images=8", *GRADIENTS.get(family, []), *[] if judged else ["metrics=none"])
        if RANKS > 1:
            torch.distributed.barrier()  # the first writes the summary
        moments = {k: v for k, v in states(folder).items() if k.endswith("exp_avg")}
        told["gradients"][family] = [float(x) for k in sorted(moments) for x in moments[k].flatten()]
        if family not in WHOLE:
            told[family] = folders.summary(folder)["metrics"] if judged else judged_again(root / family)
    return told


GRADIENTS = {
    "ddpm": ["model.net.dropout=0"],
    "gan": ["model.n_critic=1", "model.penalty_every=1"],
    "stylegan2": ["model.r1_gamma=0", "model.path_weight=0"],
    "vqvae": ["model.net.quantizer.kmeans_init=false", "model.net.quantizer.dead_code_threshold=0"],
    "vqprior": ["model.net.dropout=0"],
    "stargan": ["model.n_critic=1"],
    "first_stage": [
        "model.discriminator.norm=instance",
        "model.discriminator_start=0",
        "model.adversarial_start=0",
        "model.net.quantizer.kmeans_init=false",
        "model.net.quantizer.dead_code_threshold=0",
    ],
}


def judged_again(folder: Path) -> dict[str, float]:
    """What one rank says of the samples of a run that two ranks trained."""
    from contextlib import nullcontext

    loaded = folders.load(folder, ema=True)
    evaluator = instantiate(loaded.cfg.callbacks.evaluation.evaluator, _convert_="all")
    evaluator.prepare(loaded.model, loaded.data, torch.device("cpu"))
    return evaluator(loaded.model, loaded.data, {}, nullcontext, lambda *_: None)[0]


def main() -> None:
    folders.register()
    brief_classifiers()
    root = Path(sys.argv[1])
    told = whole_runs(root) if RANKS > 1 else {family: judged_again(root / family) for family in WHOLE}
    told |= first_batches(root)
    (root / f"told_{RANK}_of_{RANKS}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
