"""Conditions of a request: of test images in turn, with what was given in place of theirs."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from atelier.requests.request import Request


def test_what_is_given_comes_for_every_picture_whatever_its_shape() -> None:
    data = SimpleNamespace(test_batch=lambda first, n: {"index": torch.arange(first, first + n), "text": ["own"] * n})
    model = SimpleNamespace(condition=lambda batch, case: batch)
    given = {"target": torch.ones(1, 14), "source": torch.ones(1, 3, 4, 4), "text": ["asked"]}
    cond = Request(model, data, given=given).conditions(2, 3)
    assert cond["index"].tolist() == [2, 3, 4] and cond["text"] == ["asked"] * 3
    assert cond["target"].shape == (3, 14) and cond["source"].shape == (3, 3, 4, 4)
