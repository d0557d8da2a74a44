"""How images are shared among ranks, and how what was found comes together."""

from __future__ import annotations

import pytest
import torch

from atelier.core.errors import UserError
from atelier.core.rng import ImageRngs
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


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_facts_of_a_batch_that_does_not_fit_are_those_of_its_halves(error: Exception) -> None:
    """More than two at a time do not fit; the noise of the first try was drawn already."""
    sizes = []

    def facts(batch: dict, rngs: ImageRngs) -> dict[str, torch.Tensor]:
        sizes.append(len(rngs))
        noise = rngs.randn(3)
        if len(rngs) > 2:
            raise error
        return {"sum": noise.sum(1) + batch["index"]}

    found = gathering.in_halves(facts, {"index": torch.arange(7), "text": list("abcdefg")}, ImageRngs(3, 0, 7))
    assert torch.equal(found["sum"], ImageRngs(3, 0, 7).randn(3).sum(1) + torch.arange(7))
    assert sizes == [7, 3, 1, 2, 4, 2, 2]


def test_other_errors_and_one_image_that_does_not_fit_are_told() -> None:
    for error, n in ((RuntimeError("shapes differ"), 4), (MemoryError("even one"), 4)):
        with pytest.raises(type(error), match=str(error)):
            gathering.in_halves(lambda *_, error=error: exec("raise error", {"error": error}), {}, ImageRngs(0, 0, n))
