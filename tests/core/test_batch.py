"""What is asked of images, by name: tensors and texts, changed and taken together."""

from __future__ import annotations

import torch

from atelier.core.batch import each, rows_of

COND = {"label": torch.arange(3), "source": torch.arange(3.0).view(3, 1, 1, 1).expand(3, 2, 4, 4), "text": list("abc")}


def test_rows_of_tensors_and_texts_are_the_same() -> None:
    for index, expected in ((torch.tensor([2, 0, 0]), [2, 0, 0]), (slice(1, None), [1, 2])):
        taken = rows_of(COND, index)
        assert taken["label"].tolist() == taken["source"][:, 1, 3, 3].tolist() == expected
        assert taken["text"] == ["abc"[k] for k in expected]


def test_one_row_of_any_shape_comes_as_often_as_asked() -> None:
    given = rows_of(rows_of(COND, slice(1, 2)), torch.zeros(4, dtype=torch.int64))
    assert given["label"].tolist() == [1] * 4 and given["text"] == ["b"] * 4
    assert given["source"].shape == (4, 2, 4, 4)


def test_a_change_is_of_tensors_alone() -> None:
    moved = each(COND, lambda value: value.to("meta"))
    assert moved["label"].device.type == moved["source"].device.type == "meta" and moved["text"] == list("abc")
