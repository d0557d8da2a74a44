"""How images are shared among ranks, and how what was found comes together."""

from __future__ import annotations

import pytest
import torch

from atelier.core.errors import UserError
from atelier.evaluation import gathering


def parts(monkeypatch: pytest.MonkeyPatch, n: int, batch: int, ranks: int) -> list[list[range]]:
    """What each rank gets."""
    monkeypatch.setattr(gathering, "many", lambda: ranks > 1)
    monkeypatch.setattr(gathering.dist, "get_world_size", lambda: ranks)
    found = []
    for rank in range(ranks):
        monkeypatch.setattr(gathering.dist, "get_rank", lambda rank=rank: rank)
        found.append(list(gathering.shares(n, batch)))
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


def test_facts_come_in_the_order_of_their_numbers() -> None:
    parts = gathering.Parts()
    parts.add(range(3, 5), {"a": torch.tensor([30.0, 40.0]), "b": torch.zeros(2, 2)})
    parts.add(range(0, 3), {"a": torch.tensor([0.0, 10.0, 20.0]), "b": torch.ones(3, 2)})
    facts = parts.gathered()
    assert facts["a"].tolist() == [0, 10, 20, 30, 40] and facts["b"].sum(1).tolist() == [2, 2, 2, 0, 0]
