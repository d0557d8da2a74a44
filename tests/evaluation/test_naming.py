"""A metric that no evaluation will give is told before anything is trained."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import train
from atelier.core.errors import UserError
from atelier.evaluation import naming
from atelier.evaluation.evaluator import Evaluator
from atelier.metrics.classifier import Classifier
from atelier.metrics.suite import Suite
from atelier.runs import folders
from tests.compose import composed
from tests.conftest import overrides
from tests.tiny import TINY


def evaluator(classifier: bool) -> Evaluator:
    """The judge, and distances by an untrained net that tells labels."""
    net, distances = ("classifier", ["fid", "precision", "recall"]) if classifier else ("none", [])
    suite = Suite(net=net, weights=None, names=distances, antialias=False, fetch=False, cache="")
    if classifier:
        suite.net = Classifier(Classifier.layers(36).state_dict(), "labels", 36)
        suite.real = lambda fingerprint, compute, agree: compute()  # nothing is kept
    return Evaluator(8, 8, 4, 0, suite, 8)


@pytest.mark.parametrize("classifier", [False, True])
@pytest.mark.parametrize("family", TINY)
def test_names_are_those_of_an_evaluation(finished: dict[str, Path], family: str, classifier: bool) -> None:
    if classifier and family not in ("vae", "ddpm", "cyclegan", "srgan"):
        return
    loaded, judge = folders.load(finished[family], ema=True), evaluator(classifier)
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    told = naming.names(judge, loaded.model, loaded.data)
    if classifier:
        values, _ = judge(loaded.model, loaded.data, {}, nullcontext, lambda *_: None)
    else:
        values = folders.summary(finished[family])["metrics"]
    assert told == list(values) and ("real/fd_classifier" in " ".join(told)) == classifier
    assert all(torch.equal(before[name], tensor) for name, tensor in loaded.model.state_dict().items())
    assert type(loaded.model).__name__ != "GivingBack" and type(judge.suite) is Suite


@pytest.mark.parametrize(
    ("word", "fix"),
    [
        ("objective=recon/psn", "objective=recon/psnr"),
        ("checkpoint.best=judge/loos", "checkpoint.best=judge/loose"),
        ("checkpoint.best=fdi", "checkpoint.best=judge/valid"),
    ],
)
def test_a_misspelt_metric_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, fix: str
) -> None:
    from atelier.models.vae import VAE

    monkeypatch.setattr(VAE, "training_step", lambda *_: pytest.fail("trained"))
    with pytest.raises(UserError) as error:
        train.train(composed(*overrides("vae"), word, run_dir=tmp_path))
    key, _, metric = word.partition("=")
    assert error.value.line() == f"error: {key}={metric}: no such metric of this run. Fix: {fix}"
