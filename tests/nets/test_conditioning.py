"""Labels and attributes as one vector per image."""

import pytest
import torch

from atelier.core.errors import UserError
from atelier.nets import conditioning
from atelier.nets.conditioning import ConditionEmbedder, NoCondition

COND = {"label": torch.tensor([2, 0, 2]), "attributes": torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 0]])}
BOTH = ["label", "attributes"]


def condition(conditions):
    return ConditionEmbedder(dim=5, conditions=conditions, n_classes=4, label_factors=[], n_attributes=3)


@pytest.mark.parametrize("conditions", [["label"], ["attributes"], BOTH])
def test_sum_of_the_embeddings(conditions):
    embedder = condition(conditions)
    expected = torch.zeros(3, 5)
    for i in range(3):
        if "label" in conditions:
            expected[i] += embedder.label[0].weight[COND["label"][i]]
        if "attributes" in conditions:
            expected[i] += sum(COND["attributes"][i, k] * embedder.attributes[k] for k in range(3))
    if conditions == ["attributes"]:
        expected[1] = embedder.null_embedding  # it has none of them
    torch.testing.assert_close(embedder.vector(COND, 3), expected)


@pytest.fixture
def second_is_dropped(monkeypatch):
    """Of three images, whatever is drawn."""
    monkeypatch.setattr(conditioning, "dropped_rows", lambda n, drop, device: torch.arange(n) == 1)


def test_dropped_rows_are_the_null_vector(second_is_dropped):
    embedder = condition(BOTH)
    torch.nn.init.normal_(embedder.null_embedding)
    told, some = embedder.vector(COND, 3), embedder(COND, 3, 0.1).vector
    assert torch.equal(some[[0, 2]], told[[0, 2]])
    assert torch.equal(some[1:2], embedder.null(1).vector)
    assert embedder.null(4).vector.shape == (4, 5)
    assert not torch.equal(told[1], some[1])


@pytest.mark.parametrize("conditions", [[], ["label"], ["attributes"], BOTH])
def test_no_image_is_told_by_a_vector_without_length(conditions):
    """Nets divide it by its length."""
    assert condition(conditions).vector(COND, 3).norm(dim=1).min() > 0.1


def test_without_conditions_everything_is_null():
    embedder = condition([])
    torch.nn.init.normal_(embedder.null_embedding)
    assert torch.equal(embedder.vector({}, 2), embedder.null(2).vector)
    assert NoCondition().vector({}, 2).shape == (2, 0)


def test_null_vector_is_learned_from_dropped_rows_only(second_is_dropped):
    embedder = condition(["label"])
    embedder(COND, 3, 0.1).vector.sum().backward()
    assert embedder.null_embedding.grad.tolist() == [1] * 5
    assert embedder.label[0].weight.grad[0].tolist() == [0] * 5
    assert embedder.label[0].weight.grad[2].tolist() == [2] * 5


@pytest.mark.parametrize("conditions", [[], ["label"], BOTH])
def test_the_draw_of_what_is_dropped_is_one_and_only_in_training(conditions):
    """Also where nothing is embedded, so that a run's later noise does not hang on its conditions."""
    embedder, after = condition(conditions), []
    for drop in (None, 0.0, 0.5):
        torch.manual_seed(0)
        embedder(COND, 3, drop)
        after.append(torch.rand(()).item())
    torch.manual_seed(0)
    first, *_, fourth = torch.rand(4).tolist()
    assert after == [first, fourth, fourth]


def test_works_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert condition(BOTH)(COND, 3, 0.5).vector.shape == (3, 5)


def test_a_condition_that_the_set_lacks_is_refused():
    with pytest.raises(UserError, match="no label"):
        ConditionEmbedder(dim=5, conditions=["label"], n_classes=0, label_factors=[], n_attributes=3)


def test_a_label_of_two_parts_is_the_sum_of_their_embeddings():
    embedder = ConditionEmbedder(dim=5, conditions=["label"], n_classes=6, label_factors=[2, 3], n_attributes=0)
    first, second = embedder.label
    label = torch.arange(6)
    expected = first.weight[label // 3] + second.weight[label % 3]
    torch.testing.assert_close(embedder.vector({"label": label}, 6), expected)


def test_parts_that_do_not_make_the_classes_are_refused():
    with pytest.raises(UserError, match="data.label_factors"):
        ConditionEmbedder(dim=5, conditions=["label"], n_classes=6, label_factors=[2, 2], n_attributes=0)
