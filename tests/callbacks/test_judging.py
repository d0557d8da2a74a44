"""How samples are shared among ranks, and the intervals of their figures."""

from __future__ import annotations

import pytest

from atelier.callbacks import judging
from atelier.errors import UserError
from atelier.metrics.shapes import wilson


def parts(monkeypatch: pytest.MonkeyPatch, n: int, batch: int, ranks: int) -> list[list[range]]:
    """What each rank gets."""
    monkeypatch.setattr(judging, "_many", lambda: ranks > 1)
    monkeypatch.setattr(judging.dist, "get_world_size", lambda: ranks)
    found = []
    for rank in range(ranks):
        monkeypatch.setattr(judging.dist, "get_rank", lambda rank=rank: rank)
        found.append(list(judging.shares(n, batch)))
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize(("n", "batch"), [(5, 4), (17, 8), (8, 250), (1001, 250), (9, 1)])
def test_every_image_once_and_no_empty_part(monkeypatch: pytest.MonkeyPatch, n: int, batch: int, ranks: int) -> None:
    if n < ranks:
        with pytest.raises(UserError, match=f"eval.n_samples={ranks}"):
            parts(monkeypatch, n, batch, ranks)
        return
    found = parts(monkeypatch, n, batch, ranks)
    assert sorted(k for rank in found for part in rank for k in part) == list(range(n))
    assert len({len(rank) for rank in found}) == 1  # as many meetings on every rank
    assert all(len(part) > 0 for rank in found for part in rank)


def test_intervals_have_the_right_denominators() -> None:
    values = {"judge/valid": 0.5, "judge/label": 1.0, "judge/coverage": 1.0, "fd_classifier": 2.0}
    found = judging.intervals(values, 100)
    assert found == {"judge/valid": wilson(50, 100), "judge/label": wilson(50, 50)}
