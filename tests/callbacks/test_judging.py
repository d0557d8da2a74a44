"""The intervals of figures, and how many images stand behind them."""

from __future__ import annotations

import math
from types import SimpleNamespace

from atelier.callbacks import judging
from atelier.metrics.shapes import wilson
from atelier.models.cyclegan import CycleGAN
from atelier.models.gan import GAN


def test_intervals_have_the_right_denominators() -> None:
    """Of the samples, of the valid among them, of the true draws; what is no share has none."""
    values = {"judge/valid": 0.5, "judge/label": 1.0, "judge/recall": 0.9}
    others = {"judge/coverage": 1.0, "judge/combinations": 0.9, "judge/places": 1.01, "fd_classifier": 2.0}
    found = judging.intervals(values | others | {"judge/size": math.nan, "a2b/judge/recall": math.nan}, 100)
    expected = {"judge/valid": wilson(50, 100), "judge/label": wilson(50, 50), "judge/recall": wilson(90, 100)}
    assert found == expected


def test_a_count_is_of_different_images() -> None:
    """The smaller domain comes round again while the larger is read; a generator has new noise for each."""
    judges = judging.Judging(9, 4, 2, 0, SimpleNamespace(active=True, protocol=dict))
    counts = {"image": 3, "image_a": 5, "image_b": 3}
    data = SimpleNamespace(count=lambda split, field: counts[field], fingerprint=lambda split: "")
    told = judges.protocol(object.__new__(CycleGAN), data, {})
    assert told["n_samples"] == 3 and told["n_real"] == {"a2b": 3, "b2a": 4}
    generator = object.__new__(GAN)
    told = judges.protocol(generator, data, {})
    assert told["n_samples"] == 9 and told["n_real"] == 3
