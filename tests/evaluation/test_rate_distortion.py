"""The curve of bits against error, against sums made here by hand."""

from __future__ import annotations

import math

import pytest
import torch

from atelier.evaluation.evaluator import Evaluator, intervals
from atelier.evaluation.naming import names
from atelier.evaluation.rate_distortion import curve
from atelier.metrics.suite import Suite
from atelier.runs import build
from tests.compose import composed
from tests.conftest import overrides

BITS = math.log(2)  # nats


def suite(rate_distortion: int | None) -> Suite:
    return Suite(
        net="none", weights=None, names=[], antialias=False, fetch=False, cache="", rate_distortion=rate_distortion
    )


def test_the_rate_at_a_level_is_what_the_levels_above_it_cost() -> None:
    """Two images of 10 numbers; parts of 1, 1 and 4 levels, the last drawn so that 3/8 of it stands above."""
    terms = {
        "prior": torch.tensor([0.0, 20.0]) * BITS,
        "image": torch.tensor([30.0, 10.0]) * BITS,
        "steps": torch.tensor([[40.0, 20.0, 80.0], [20.0, 20.0, 80.0]]) * BITS,
        "above": torch.tensor([[0.0, 0.0, 30.0], [0.0, 0.0, 30.0]]) * BITS,
        "time": torch.tensor([[0.1, 0.2, 0.3, 0.5], [0.1, 0.2, 0.3, 0.7]]),
        "error": torch.tensor([[1.0, 4.0, 16.0, 2500.0], [1.0, 4.0, 16.0, 2500.0]]),
    }
    found = curve({name: value.double() for name, value in terms.items()}, 10)
    told = {"bpd": 16.0, "bpd_prior": 1.0, "bpd_steps": 13.0, "bpd_image": 2.0, "nll": 160 * BITS}
    assert {name: found.values[name] for name in told} == pytest.approx(told)
    assert found.values["bpd_error"] == pytest.approx(1.0)  # images of 17 and 15 bits/dim: deviation sqrt 2 over sqrt 2
    rows = [(0.1, 2, 14, 1), (0.2, 3, 11, 2), (0.3, 2, 9, 4), (0.6, 8, 4, 50)]
    for row, expected in zip(found.rows(), rows, strict=True):
        assert row == pytest.approx(expected)
    assert found.csv().splitlines()[2] == "0.2,3,11,2"
    assert intervals(found.values, {"n_samples": 2})["bpd"] == pytest.approx((16 - 1.96, 16 + 1.96))


def test_one_image_has_no_interval() -> None:
    zeros = torch.zeros(1, 2).double()
    terms = {"prior": zeros[:, 0], "image": zeros[:, 0], "steps": zeros, "above": zeros, "time": zeros, "error": zeros}
    assert "bpd" not in intervals(curve(terms, 10).values, {"n_samples": 1})


@pytest.mark.parametrize(
    ("words", "asked", "measured"),
    [([], None, False), ([], 3, True), (["model=iddpm", "model.net.heads=1"], None, True)],
)
def test_the_bound_is_measured_where_it_is_trained_or_asked_for(
    words: list[str], asked: int | None, measured: bool
) -> None:
    """Samples are judged unless it is asked for; its names are known before anything is trained."""
    cfg = composed(*overrides("ddpm"), *words)
    model, data = build.model(cfg, ""), build.data(cfg)
    evaluator = Evaluator(2, 2, 2, 0, suite(asked))
    model.net.register_forward_hook(lambda *_: pytest.fail("asked"))
    found = names(evaluator, model, data)
    assert ("bpd_steps" in found) == measured and ("judge/valid" in found) == (asked is None)
    assert evaluator.protocol(model, data, {}).get("drawn_levels") == (
        asked or model.drawn_levels if measured else None
    )
