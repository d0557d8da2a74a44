"""A small classifier that learns the set at hand, for a distance that needs no file of weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atelier.core.lines import paced, say
from atelier.metrics import cache
from atelier.metrics.features import FeatureNet

Task = Literal["labels", "attributes", "rotations"]


class Classifier(FeatureNet):
    """A small convolutional net that knows the set at hand; 128 features after global pooling.

    Args:
        state: weights of `Classifier.layers(n_logits)`.
        task: target of its training: exclusive labels, attributes, or by how many quarter turns it was
            rotated.
        n_logits: number of labels or attributes; 4 for rotations.
    """

    name = "classifier"
    SIZE = 32  # larger images are reduced to it

    def __init__(self, state: dict[str, Tensor], task: Task, n_logits: int) -> None:
        super().__init__()
        self.net = self.layers(n_logits)
        self.net.load_state_dict(state)
        self.eval().requires_grad_(False)
        self.n_features, self.task, self.n_logits = 128, task, n_logits
        self.sorts = task == "labels"
        resize = f"at most {self.SIZE}, bilinear, antialias"
        self.protocol = {"net": f"classifier of {task}", "resize": resize, "weights": _tensors_sha(state)}

    @staticmethod
    def layers(n_logits: int) -> nn.ModuleDict:
        """`body` from (B, 3, H, W) in [-1, 1] to (B, 128), `head` to (B, n_logits)."""
        blocks: list[nn.Module] = []
        for n_in, n_out, stride in ((3, 32, 1), (32, 64, 2), (64, 128, 2), (128, 128, 2)):
            convolution = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
            blocks += [convolution, nn.BatchNorm2d(n_out), nn.ReLU()]
        body = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return nn.ModuleDict({"body": body, "head": nn.Linear(128, n_logits)})

    def embed(self, rgb: Tensor) -> Tensor:
        return self.net["body"](_prepared(rgb))

    def logits(self, features: Tensor) -> Tensor:
        head = self.net["head"]
        return F.linear(features, head.weight.to(features), head.bias.to(features))


TrainingSet = Callable[[], tuple[Tensor, Tensor | None]]
_RECIPE = 1  # another number for another recipe below: older files are not used


def classifier_of(training_set: TrainingSet, fingerprint: str, folder: Path, steps: int = 400) -> Classifier:
    """The classifier of a set, trained on the CPU once and kept in `folder`; no default generator moves.

    Args:
        training_set: called only to train: images (N, C, H, W) uint8 (10,000 suffice) and with them labels
            (N,) int64, attributes (N, A) of 0 and 1, or None: then it learns by how much they were rotated.
        fingerprint: changes when the training set would.
        folder: folder of the kept files; a broken one is made again.
        steps: batches of 64.
    """
    path = folder / cache.name("classifier", _RECIPE, fingerprint, steps)
    kept = cache.read(path)
    if kept is None:
        say("distances: a small classifier of this set is trained first, once for all runs", error=True)
        images, targets = training_set()
        kept = train_classifier(images, targets, steps)
        cache.write(path, kept)
    return Classifier(kept["state"], kept["task"], kept["n_logits"])


def train_classifier(images: Tensor, targets: Tensor | None, steps: int, seed: int = 0) -> dict[str, Any]:
    """Arguments of `Classifier` for these images and targets (as `classifier_of` takes them)."""
    task, n_logits = _task(targets)
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        torch.manual_seed(seed)
        net = Classifier.layers(n_logits)
        _fit(net, images.cpu().expand(-1, 3, -1, -1), targets, steps)
    return {"state": net.state_dict(), "task": task, "n_logits": n_logits}


def _fit(net: nn.ModuleDict, rgb: Tensor, targets: Tensor | None, steps: int, peak: float = 3e-3) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), lr=peak)
    told = f"distances: the classifier has done {{}} of {steps} steps, {{}}"
    for step in paced(range(steps), steps, told.format):
        optimizer.param_groups[0]["lr"] = peak * (1 - step / steps)
        chosen = torch.randint(len(rgb), (64,))
        x = _prepared(rgb[chosen])
        x, asked = _rotated(x) if targets is None else (x, targets[chosen].cpu())
        logits = net["head"](net["body"](x))
        if asked.ndim == 1:
            loss = F.cross_entropy(logits, asked)
        else:
            loss = F.binary_cross_entropy_with_logits(logits, asked.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _rotated(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each image turned by 0 to 3 quarters, and by how many (Gidaris et al. 2018)."""
    turns = torch.randint(4, (len(x),))
    return torch.stack([image.rot90(int(k), (1, 2)) for image, k in zip(x, turns, strict=True)]), turns


def _prepared(rgb: Tensor) -> Tensor:
    """[-1, 1] and at most 32 px a side."""
    x = rgb.float() / 127.5 - 1
    if max(x.shape[-2:]) <= Classifier.SIZE:
        return x
    return F.interpolate(x, (Classifier.SIZE, Classifier.SIZE), mode="bilinear", antialias=True)


def _task(targets: Tensor | None) -> tuple[Task, int]:
    """What these targets teach, and how many logits that takes."""
    if targets is None:
        return "rotations", 4
    return ("labels", int(targets.max()) + 1) if targets.ndim == 1 else ("attributes", targets.shape[1])


def _tensors_sha(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + state[name].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
