"""Nets that turn images into features: the published Inception and MobileNet.

Each takes (B, C, H, W) uint8 and gives (B, n_features) float32 outside autocast; grey is repeated to RGB. The
nets are frozen and stay in eval mode. Hold them outside of what is trained, averaged or saved.
"""

from __future__ import annotations

import hashlib
import io
from abc import ABC, abstractmethod
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atelier.core.errors import UserError
from atelier.core.precision import float32

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
