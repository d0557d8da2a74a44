"""The intervals of figures."""

from __future__ import annotations

from atelier.callbacks import judging
from atelier.metrics.shapes import wilson


def test_intervals_have_the_right_denominators() -> None:
    values = {"judge/valid": 0.5, "judge/label": 1.0, "judge/coverage": 1.0, "fd_classifier": 2.0}
    found = judging.intervals(values, 100)
    assert found == {"judge/valid": wilson(50, 100), "judge/label": wilson(50, 50)}
