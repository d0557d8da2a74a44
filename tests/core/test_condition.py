"""A condition of three fields: what is done to one is done to all, row by row."""

from __future__ import annotations

from dataclasses import astuple

import pytest
import torch

from atelier.core.condition import Condition, dropped_rows


def condition(value: float, n: int = 3) -> Condition:
    rows = value + torch.arange(float(n))
    tokens = rows.view(n, 1, 1).expand(n, 4, 2)
    mask = torch.arange(4) <= torch.arange(n)[:, None]
    return Condition(rows.view(n, 1).expand(n, 5), tokens, mask, rows.view(n, 1, 1, 1).expand(n, 2, 6, 6))


def first(condition: Condition) -> list[list[float]]:
    """The first number of each row, field by field."""
    return [value.flatten(1)[:, 0].tolist() for value in (condition.vector, condition.tokens, condition.planes)]


def test_rows_are_taken_from_every_field() -> None:
    taken = condition(10).rows([2, 0, 0])
    assert len(taken) == 3 and first(taken) == [[12, 10, 10]] * 3
    assert taken.mask.sum(1).tolist() == [3, 1, 1]
    assert first(condition(10).rows(slice(1, None))) == [[11, 12]] * 3


def test_dropped_rows_are_those_of_null_in_every_field() -> None:
    own, null = condition(10), condition(-10).rows([2, 2, 2])
    dropped = own.drop(torch.tensor([True, False, False]), null)
    assert first(dropped) == [[-8, 11, 12]] * 3
    assert dropped.mask.sum(1).tolist() == [3, 2, 3]


@pytest.mark.parametrize(
    ("names", "expected", "tokens_seen"),
    [
        (["tokens"], [[10, 11, 12], [-8, 11, 12], [10, 11, 12]], 3),
        (["planes"], [[10, 11, 12], [10, 11, 12], [-8, 11, 12]], 1),
        (["tokens", "planes"], [[10, 11, 12], [-8, 11, 12], [-8, 11, 12]], 3),
    ],
)
def test_fields_are_dropped_each_by_itself(names: list[str], expected: list, tokens_seen: int) -> None:
    """As text and image of a condition are (Brooks et al. 2023); the mask goes with the tokens."""
    own, null = condition(10), condition(-10).rows([2, 2, 2])
    dropped = own.drop(torch.tensor([True, False, False]), null, names)
    assert first(dropped) == expected and dropped.mask[0].sum() == tokens_seen


def test_tokens_without_a_mask_are_all_there() -> None:
    """And none of null: where it was dropped, guided or joined, a token must not come back."""
    own = Condition(tokens=torch.ones(3, 4, 2))
    assert own.mask.dtype == torch.bool and own.mask.all() and own.mask.shape == (3, 4)
    assert not own.null().mask.any()
    assert own.drop(torch.tensor([True, False, False]), own.null()).mask.sum(1).tolist() == [0, 4, 4]
    assert own.null().cat(own).mask.sum(1).tolist() == [0, 0, 0, 4, 4, 4]
    assert Condition(torch.ones(3, 5)).mask is None


def test_two_conditions_are_the_same_if_they_are_one() -> None:
    """Tensors have no one answer to ==."""
    one, other = condition(10), condition(10)
    assert one != other and len({one, other, one}) == 2


def test_rows_are_dropped_as_often_as_asked_by_one_draw() -> None:
    torch.manual_seed(3)
    rows = dropped_rows(4000, 0.3, torch.device("cpu"))
    torch.manual_seed(3)
    assert torch.equal(rows, torch.rand(4000) < 0.3) and rows.double().mean().item() == pytest.approx(0.3, abs=0.03)


def test_sizes_are_of_the_fields_that_are_there() -> None:
    assert condition(10).sizes() == {"vector": 5, "tokens": 2, "planes": 2}
    assert Condition(planes=torch.ones(3, 7, 4, 4)).sizes() == {"planes": 7}


def test_a_dropped_row_keeps_the_type_of_its_field() -> None:
    own = condition(10)
    low = Condition(*(value if value.dtype == torch.bool else value.bfloat16() for value in astuple(own)))
    dropped = low.drop(torch.tensor([True, False, False]), own)
    assert [value.dtype for value in astuple(dropped)] == [value.dtype for value in astuple(low)]


def test_two_conditions_stand_one_behind_the_other() -> None:
    both = condition(10).cat(condition(20, n=2))
    assert len(both) == 5 and first(both) == [[10, 11, 12, 20, 21]] * 3
    assert both.mask.shape == (5, 4)


def test_null_is_zero_and_shows_no_token() -> None:
    null = condition(10).null()
    assert not any(value.any() for value in astuple(null))
    assert [value.shape for value in astuple(null)] == [value.shape for value in astuple(condition(10))]


def test_all_fields_move_to_a_device() -> None:
    assert {value.device.type for value in astuple(condition(10).to("meta"))} == {"meta"}


def test_what_is_not_there_stays_away() -> None:
    planes = Condition(planes=torch.ones(2, 1, 4, 4))
    for made in (planes.null(), planes.rows([0]), planes.cat(planes), planes.drop(torch.tensor([True, False]), planes)):
        assert made.vector is made.tokens is made.mask is None and made.planes is not None


def test_conditions_of_other_fields_do_not_mix() -> None:
    with pytest.raises((AttributeError, TypeError)):
        condition(10).cat(Condition(torch.ones(2, 5)))
