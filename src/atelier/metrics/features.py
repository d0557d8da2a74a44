"""Nets that turn images into features: published Inception, MobileNet, a classifier of the set.

Each takes (B, C, H, W) uint8 and gives (B, n_features) float32 outside autocast; grey is repeated to RGB. The
nets are frozen and stay in eval mode. Hold them outside of what is trained, averaged or saved.
"""

from __future__ import annotations

import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atelier.core.errors import UserError
from atelier.core.precision import float32
from atelier.metrics import cache

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"  # the name ends with the sha256 the file starts with
INCEPTION_SHA = "6726825d"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"


class FeatureNet(nn.Module, ABC):
    """A frozen net that describes images.

    Attributes:
        name: the word in `fd_<name>`.
        n_features: width of the features.
        published: whether its Frechet distance is the one called FID.
        sorts: whether `logits` are those of exclusive classes, as the inception score wants.
        protocol: what of the net a printed number depends on.
    """

    name: ClassVar[str]
    n_features: int
    published: bool = False
    sorts: bool = True
    protocol: dict[str, Any]

    @abstractmethod
    def embed(self, rgb: Tensor) -> Tensor:
        """Features (B, n_features) of (B, 3, H, W) uint8."""

    @abstractmethod
    def logits(self, features: Tensor) -> Tensor:
        """Class logits (B, classes) of features, in their dtype."""

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, n_features) float32 of (B, 1 or 3, H, W) uint8."""
        rgb = images.expand(-1, 3, -1, -1)
        with torch.no_grad(), float32(images.device):
            return self.embed(rgb)

    def train(self, mode: bool = True) -> FeatureNet:
        return super().train(False)


class Inception(FeatureNet):
    """The published TF-Inception of 2015-12-05 (Heusel et al. 2017), 2048 features after global pooling.

    Args:
        weights: state dict in torch-fidelity's format (`find_inception`, `fetch_inception`).
        antialias: False resizes to 299 px as TensorFlow 1 did, for comparison with published figures.

    Raises:
        UserError: the file is absent, cut, or no such state dict.
    """

    name = "inception"

    def __init__(self, weights: str | Path, antialias: bool = False) -> None:
        super().__init__()
        from torchmetrics.image.fid import NoTrainInceptionV3

        data = _weight_bytes(weights)
        _state_dict(weights, data)  # refuses all but tensors, before the file is read a second time
        try:
            net = NoTrainInceptionV3("inception-v3-compat", ["2048"], io.BytesIO(data), antialias)
        except RuntimeError as error:
            raise _unreadable(weights, "it holds other layers than the published Inception") from error
        self.net = net.requires_grad_(False)
        self.n_features = 2048
        sha = hashlib.sha256(data).hexdigest()
        self.published = sha.startswith(INCEPTION_SHA)
        resize = "299 bilinear, antialias" if antialias else "299 bilinear, as TF 1"
        self.protocol = {"net": "TF-Inception 2015-12-05", "resize": resize, "weights": sha[:12]}

    def embed(self, rgb: Tensor) -> Tensor:
        return self.net(rgb)

    def logits(self, features: Tensor) -> Tensor:
        """Without bias, as the published inception scores."""
        return features @ self.net.fc.weight.T.to(features)


def find_inception() -> Path | None:
    """The published weights in torch's hub cache, where they lie there already."""
    path = _hub_file()
    return path if path.is_file() else None


def fetch_inception() -> Path:
    """Download the published weights (91 MB, checked by their sha256) into torch's hub cache, unless there.

    Raises:
        UserError: no network, or another file came.
    """
    path = _hub_file()
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix=INCEPTION_SHA, progress=False)
    except (OSError, RuntimeError) as error:
        fix = f"metrics.weights=PATH of {INCEPTION_FILE}"
        raise UserError("metrics.fetch", True, f"the download failed ({error})", fix) from error
    return path


def _hub_file() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE


class MobileNet(FeatureNet):
    """MobileNetV1 of width 0.75 (Howard et al. 2017), 768 features after global pooling.

    Args:
        weights: state dict with the keys conv1, dw.0-12, pw.0-12 (`.conv`, `.bn`) and fc, as trained by
            TensorFlow.

    Raises:
        UserError: the file is absent, cut, or no such state dict.
    """

    name = "mobilenet"
    STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)
    WIDTHS = (24, 48, 96, 96, 192, 192, 384, 384, 384, 384, 384, 384, 768, 768)
    SIZE = 224

    def __init__(self, weights: str | Path) -> None:
        super().__init__()
        pairs = [(a, b, s) for (a, b), s in zip(pairwise(self.WIDTHS), self.STRIDES, strict=True)]
        self.conv1 = _Convolution(3, 24, kernel=3, stride=2)
        self.dw = nn.ModuleList(_Convolution(a, a, kernel=3, stride=stride, groups=a) for a, _, stride in pairs)
        self.pw = nn.ModuleList(_Convolution(a, b, kernel=1) for a, b, _ in pairs)
        self.fc = nn.Linear(768, 1000)
        data = _weight_bytes(weights)
        try:
            self.load_state_dict(_state_dict(weights, data))
        except RuntimeError as error:
            raise _unreadable(weights, "it holds other layers than MobileNetV1 0.75") from error
        self.eval().requires_grad_(False)
        self.n_features = 768
        sha = hashlib.sha256(data).hexdigest()[:12]
        self.protocol = {"net": "MobileNetV1 0.75", "resize": "224 bilinear, antialias", "weights": sha}

    def embed(self, rgb: Tensor) -> Tensor:
        x = F.interpolate(rgb.float(), (self.SIZE, self.SIZE), mode="bilinear", antialias=True)
        x = self.conv1(x / 127.5 - 1)  # (B, 24, 112, 112)
        for depthwise, pointwise in zip(self.dw, self.pw, strict=True):
            x = pointwise(depthwise(x))  # (B, 48..768, 112..7, 112..7)
        return x.mean(dim=(2, 3))  # (B, 768)

    def logits(self, features: Tensor) -> Tensor:
        return F.linear(features, self.fc.weight.to(features), self.fc.bias.to(features))


class _Convolution(nn.Module):
    """Convolution, batch norm, ReLU6; padded as TensorFlow's `same` on even sizes: below and right first."""

    def __init__(self, n_in: int, n_out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        both, extra = (kernel - stride) // 2, (kernel - stride) % 2
        self.pad = nn.ZeroPad2d((both, both + extra, both, both + extra))
        self.conv = nn.Conv2d(n_in, n_out, kernel, stride, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(n_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(self.bn(self.conv(self.pad(x))))


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
    for step in range(steps):
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


def _weight_bytes(path: str | Path) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise _unreadable(path, f"there is no such file to read ({error.strerror})") from error


def _state_dict(path: str | Path, data: bytes) -> dict[str, Tensor]:
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch has a different one for each way in which a file is broken
        sha = hashlib.sha256(data).hexdigest()[:12]
        problem = f"it is cut or no state dict ({len(data)} bytes, sha256 {sha})"
        raise _unreadable(path, problem) from error


def _unreadable(path: str | Path, problem: str) -> UserError:
    return UserError("metrics.weights", path, problem, "give a whole file, or metrics=classifier")
