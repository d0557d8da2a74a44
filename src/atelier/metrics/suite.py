"""Which distances are measured with which net, and how they are called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from atelier.core.errors import UserError
from atelier.core.ranges import Name, PositiveInt
from atelier.images.pixels import to_float
from atelier.metrics import cache, distances
from atelier.metrics import clip_score as clips
from atelier.metrics.classifier import Classifier, TrainingSet, classifier_of
from atelier.metrics.features import (
    INCEPTION_FILE,
    FeatureNet,
    Inception,
    MobileNet,
    fetch_inception,
    find_inception,
)
from atelier.nets.contracts import ImageEncoder

NetName = Literal["auto", "inception", "classifier", "mobilenet", "none"]
Distance = Literal["fid", "kid", "is", "precision", "recall"]


class Suite:
    """The distances between real and generated images of one run.

    Use: `check()` before anything starts; `prepare()` once, on rank 0 first; on every rank `features()` of
    chunks of uint8 images; gather, sort by image number; `compare()`.

    Args:
        net: net that describes the images; auto takes the published Inception where its file is at hand
            (`weights`, or torch's hub cache), else a classifier of the set, which it does not train for a world
            that a judge knows. none measures no distances.
        weights: file for inception or mobilenet; None looks for Inception in torch's hub cache.
        names: distances that are measured.
        antialias: smoothing in Inception's resize to 299 px; False for comparison with published figures.
        fetch: may download Inception's weights (91 MB).
        cache: folder of classifiers and of features of real images.
        lpips: learned distance of pairs of images (B, C, H, W) in [-1, 1], to (B,); None = not measured.
        rate_distortion: noise levels of each test image at which a diffusion model's bound is measured, in place of
            samples; None = it is not asked for.
        clip: encoders of images and texts (`clip_score`), of a model that is conditional on text; None = not measured.
    """

    def __init__(
        self,
        *,
        net: NetName,
        weights: Name | None,
        names: list[Distance],
        antialias: bool,
        fetch: bool,
        cache: Name,
        lpips: nn.Module | None = None,
        rate_distortion: PositiveInt | None = None,
        clip: ImageEncoder | None = None,
    ) -> None:
        self.kind, self.weights, self.names = net, weights, names if net != "none" else []
        self.antialias, self.fetch, self.cache = antialias, fetch, Path(cache).expanduser()
        self.net: FeatureNet | None = None
        self.lpips, self.rate_distortion, self.clip = lpips, rate_distortion, clip

    @property
    def active(self) -> bool:
        """Whether any distance is measured; if not, nothing below is to be called but `clip_score` and `protocol`."""
        return bool(self.names)

    def check(self) -> None:
        """Refuse what is missing, in no time and without reading or downloading anything.

        Raises:
            UserError: a weight file is missing.
        """
        if self.weights is not None and self.active and not Path(self.weights).expanduser().is_file():
            raise UserError("metrics.weights", self.weights, "there is no such file", "metrics=classifier")
        if self.kind == "mobilenet" and self.weights is None and self.active:
            raise UserError("metrics.weights", None, "mobilenet needs its weight file", "metrics.weights=PATH")
        if self.kind == "inception" and not (self.weights or self.fetch or find_inception()) and self.active:
            problem = f"the published Inception ({INCEPTION_FILE}) is not in torch's hub cache"
            raise UserError("metrics.weights", None, problem, "metrics.fetch=true downloads it (91 MB)")

    def prepare(
        self,
        fingerprint: str,
        training_set: TrainingSet,
        device: torch.device | str = "cpu",
        judged: bool = False,
    ) -> str | None:
        """Choose, load and if need be train the net.

        Args:
            fingerprint: text that tells the training images from others.
            training_set: the training images, as `classifier.classifier_of` takes them; called only if a classifier is
                needed and not yet kept.
            device: device on which `features` will be computed.
            judged: whether a judge knows this world.

        Returns:
            One line to tell the user, or None.

        Raises:
            UserError: weights are missing or broken, or a distance does not suit the net.
        """
        for net in (self.lpips, self.clip):
            if net is not None:
                net.to(device)
        if not self.active:
            return None
        self.check()
        if self.kind == "auto" and judged and not (self.weights or self.fetch or find_inception()):
            self.names = []
            return (
                "no distance is measured, since the judge knows this world: metrics=classifier measures fd_classifier, "
                "metrics=inception metrics.fetch=true FID (91 MB)"
            )
        net = self._load(fingerprint, training_set)
        if "is" in self.names and not net.sorts:
            problem = "the inception score needs a net that tells classes, and this set has no labels"
            raise UserError("metrics.names", "is", problem, "metrics.names=[fid]")
        self.net = net.to(device)
        if self.kind == "auto" and net.name != "inception":
            return (
                f"distances are {self.named('fid')}, by a classifier of this set, not FID: the published "
                "Inception is not in torch's hub cache (metrics=inception metrics.fetch=true downloads it, 91 MB)"
            )
        return None

    def named(self, name: Distance) -> str:
        """`fid` for the published Inception, `fd_<net>` for any other net; the other names alike."""
        net = self._net
        if net.published:
            return name
        return f"{'fd' if name == 'fid' else name}_{net.name}"

    def features(self, images: Tensor) -> Tensor:
        """(B, D) float32 on the net's device, of images (B, 1 or 3, H, W) uint8 on any."""
        return self._net(images.to(next(self._net.parameters()).device))

    def real(
        self, fingerprint: str, compute: Callable[[], dict[str, Tensor]], agree: Callable[[bool], bool] = bool
    ) -> dict[str, Tensor]:
        """What is known of the real images, gathered and sorted, kept for this fingerprint and protocol.

        Args:
            fingerprint: changes when the images would: data, split, case, number, preprocessing.
            compute: function that gives `features` (N, D), and `label` (N,) where there are any, where they are not
                kept.
            agree: whether all ranks say True, so that all compute or none does.

        Returns:
            what `compute` gave, on the CPU.
        """
        path = self.cache / cache.name("real", fingerprint, self._net.protocol)
        kept = cache.read(path)
        if agree(kept is not None):
            return kept
        facts = {name: tensor.cpu() for name, tensor in compute().items()}
        cache.write(path, facts)
        return facts

    def clip_score(self, images: Tensor, texts: list[str]) -> Tensor:
        """How well images (B, C, H, W) uint8 fit their texts, (B,), by `clip` (`metrics/clip_score.py`)."""
        device = next(self.clip.parameters()).device
        return clips.clip_score(to_float(images).to(device), texts, self.clip)

    @property
    def knows_labels(self) -> bool:
        """Whether the net was trained to tell the labels of this set."""
        return isinstance(self._net, Classifier) and self._net.task == "labels"

    def recognised(self, features: Tensor, labels: Tensor) -> float:
        """Share of images (by their features (N, D)) in which the classifier of the set sees the label (N,)."""
        seen = self._net.logits(features.to(next(self._net.parameters()).device)).argmax(1).cpu()
        return (seen == labels.cpu()).double().mean().item()

    def compare(self, real: Tensor, fake: Tensor) -> dict[str, float]:
        """Each distance that is `measurable` under its name, of features (N, D) and (M, D) of all images."""
        values: dict[str, float] = {}
        names = self.measurable(len(real), len(fake))
        if "fid" in names:
            values["fid"] = distances.fid(real, fake)
        if "kid" in names:
            values["kid"] = distances.kid(real, fake)
        if "is" in names:
            values["is"] = distances.inception_score(self._net.logits(fake.to(next(self._net.parameters()).device)))
        if "precision" in names or "recall" in names:
            values["precision"], values["recall"] = distances.precision_recall(real, fake)
        return {self.named(name): values[name] for name in names}

    def measurable(self, n_real: int, n_fake: int) -> list[Distance]:
        """What of the distances can be measured between so many images."""
        pairs = min(n_real, n_fake)
        return [name for name in self.names if distances.LEAST[name] <= (n_fake if name == "is" else pairs)]

    def protocol(self) -> dict[str, Any]:
        """What of the net and the distances a printed value depends on."""
        details = {
            "kid": {"kid_subsets": distances.KID_SUBSETS, "kid_subset_size": distances.KID_SUBSET_SIZE},
            "is": {"is_splits": distances.IS_SPLITS},
            "precision": {"neighbours": distances.NEIGHBOURS},
            "recall": {"neighbours": distances.NEIGHBOURS},
        }
        protocol = {} if self.clip is None else {"clip": clips.named(self.clip)}
        if not self.active:
            return protocol
        protocol |= self._net.protocol
        for name in self.names:
            protocol |= details.get(name, {})
        return protocol

    @property
    def _net(self) -> FeatureNet:
        assert self.net is not None, "prepare() comes first"
        return self.net

    def _load(self, fingerprint: str, training_set: TrainingSet) -> FeatureNet:
        if self.kind == "mobilenet":
            return MobileNet(self.weights)
        weights = None if self.kind == "classifier" else self.weights or find_inception()
        if weights is None and self.kind != "classifier" and self.fetch:
            weights = fetch_inception()
        if weights is not None:
            return Inception(weights, self.antialias)
        return classifier_of(training_set, fingerprint, self.cache)
