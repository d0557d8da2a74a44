"""Labels and attributes as one vector per image."""

import pytest
import torch

from atelier.core.errors import UserError
from atelier.nets.conditioning import Condition

COND = {"label": torch.tensor([2, 0, 2]), "attributes": torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 0]])}
BOTH = ["label", "attributes"]


def condition(conditions):
    return Condition(dim=5, conditions=conditions, n_classes=4, label_factors=[], n_attributes=3)


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
        expected[1] = embedder.nothing  # it has none of them
    torch.testing.assert_close(embedder(COND, 3), expected)


def test_dropped_rows_are_the_null_vector():
    embedder = condition(BOTH)
    torch.nn.init.normal_(embedder.nothing)
    told, some = embedder(COND, 3), embedder(COND, 3, torch.tensor([False, True, False]))
    assert torch.equal(some[[0, 2]], told[[0, 2]])
    assert torch.equal(some[1:2], embedder.null(1))
    assert embedder.null(4).shape == (4, 5)
    assert not torch.equal(told[1], some[1])


@pytest.mark.parametrize("conditions", [[], ["label"], ["attributes"], BOTH])
def test_no_image_is_told_by_a_vector_without_length(conditions):
    """Nets divide it by its length."""
    assert condition(conditions)(COND, 3).norm(dim=1).min() > 0.1


def test_without_conditions_everything_is_null():
    embedder = condition([])
    torch.nn.init.normal_(embedder.nothing)
    assert torch.equal(embedder({}, 2), embedder.null(2))


def test_null_vector_is_learned_from_dropped_rows_only():
    embedder = condition(["label"])
    embedder(COND, 3, torch.tensor([False, True, False])).sum().backward()
    assert embedder.nothing.grad.tolist() == [1] * 5
    assert embedder.label[0].weight.grad[0].tolist() == [0] * 5
    assert embedder.label[0].weight.grad[2].tolist() == [2] * 5


def test_works_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert condition(BOTH)(COND, 3, torch.tensor([True, True, False])).shape == (3, 5)


def test_a_condition_that_the_set_lacks_is_refused():
    with pytest.raises(UserError, match="no label"):
        Condition(dim=5, conditions=["label"], n_classes=0, label_factors=[], n_attributes=3)


def test_a_label_of_two_parts_is_the_sum_of_their_embeddings():
    embedder = Condition(dim=5, conditions=["label"], n_classes=6, label_factors=[2, 3], n_attributes=0)
    first, second = embedder.label
    label = torch.arange(6)
    expected = first.weight[label // 3] + second.weight[label % 3]
    torch.testing.assert_close(embedder({"label": label}, 6), expected)


def test_parts_that_do_not_make_the_classes_are_refused():
    with pytest.raises(UserError, match="data.label_factors"):
        Condition(dim=5, conditions=["label"], n_classes=6, label_factors=[2, 2], n_attributes=0)
