"""The intervals of figures, and how many images stand behind them."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra.utils import instantiate

from atelier.data.base import MemoryImages
from atelier.evaluation import evaluator
from atelier.metrics.shapes import wilson
from atelier.models.cyclegan import CycleGAN
from atelier.models.gan import GAN
from atelier.runs import folders


def test_intervals_have_the_right_denominators() -> None:
    """Of all samples, of the valid ones, and of the test images that were given back, which are fewer."""
    values = {"judge/valid": 0.5, "judge/label": 1.0, "judge/fill": math.nan, "judge/coverage": 1.0, "fd_classifier": 2}
    values |= {"recon/valid": 0.75, "label/accuracy": 0.4, "recon/psnr": 30.0, "label/accuracy_real": 0.9}
    values |= {"judge/recall": 0.9, "judge/combinations": 0.9, "judge/places": 1.01, "a2b/judge/recall": math.nan}
    values |= {"a2b/judge/valid": 0.2, "a2b/judge/size": 0.5, "a2b/answer/all": 0.3}
    assert evaluator.intervals(values, {"n_samples": 100, "n_test": 16}) == {
        "judge/valid": wilson(50, 100), "judge/label": wilson(50, 50), "label/accuracy": wilson(40, 100),
        "recon/valid": wilson(12, 16), "a2b/judge/valid": wilson(20, 100), "a2b/judge/size": wilson(10, 20),
        "a2b/answer/all": wilson(30, 100), "judge/recall": wilson(90, 100),
    }  # fmt: skip
    assert evaluator.intervals({"recon/valid": 0.5}, {"n_samples": 20}) == {"recon/valid": wilson(10, 20)}


def test_a_count_is_of_different_images() -> None:
    """The smaller domain comes round again while the larger is read; a generator has new noise for each."""
    judges = evaluator.Evaluator(9, 4, 2, 0, SimpleNamespace(active=True, protocol=dict))
    counts = {"image": 3, "image_a": 5, "image_b": 3}
    data = SimpleNamespace(count=lambda split, field: counts[field], fingerprint=lambda split: "", choice=lambda _: "")
    told = judges.protocol(object.__new__(CycleGAN), data, {})
    assert told["n_samples"] == 3 and told["n_real"] == {"a2b": 3, "b2a": 4}
    generator = object.__new__(GAN)
    told = judges.protocol(generator, data, {})
    assert told["n_samples"] == 9 and told["n_real"] == 3


def test_the_set_of_a_classifier_is_never_all_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read in parts, which together are what one reading gives."""
    images = MemoryImages(torch.randint(0, 256, (23, 3, 8, 8), dtype=torch.uint8), {"label": torch.arange(23)}, False)
    data, sizes, read = SimpleNamespace(split=lambda _: images, order=lambda _: list(range(23))[::-1]), [], images.read
    monkeypatch.setattr(evaluator, "READ_AT_ONCE", 5)
    monkeypatch.setattr(images, "read", lambda chosen, rngs: (sizes.append(len(chosen)), read(chosen, rngs))[1])
    pixels, labels = evaluator.training_set(data)
    assert torch.equal(pixels, images.images) and torch.equal(labels, torch.arange(23)) and max(sizes) == 5
    images.fields.clear()
    assert evaluator.training_set(data)[1] is None


def test_large_images_are_taken_fewer_at_once_and_judged_alike(
    finished: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = folders.load(finished["vae"], ema=True)
    sizes, decode = [], loaded.model.decode
    monkeypatch.setattr(loaded.model, "decode", lambda z: sizes.append(len(z)) or decode(z))
    figures = []
    for pixels in (evaluator.PIXELS, 3 * 64):
        monkeypatch.setattr(evaluator, "PIXELS", pixels)
        one = instantiate(loaded.cfg.callbacks.evaluation.evaluator, _convert_="all")
        one.prepare(loaded.model, loaded.data, torch.device("cpu"))
        sizes.clear()
        figures.append(one(loaded.model, loaded.data, {}, nullcontext, lambda *_: None)[0])
        assert max(sizes) == (4 if pixels > 192 else 3)
    assert figures[1] == pytest.approx(figures[0], rel=1e-4, abs=1e-5, nan_ok=True)
