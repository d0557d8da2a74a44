"""Noise that stands for a set has the fields, shapes and types of what it stands for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from atelier.data.shapes import EXTRA
from atelier.data.stand_in import stand_in
from atelier.runs import build
from tests.compose import composed

FEW = ("data.batch_size=4", "data.n_train_scenes=8", "data.n_test_scenes=8")


@pytest.mark.parametrize("task", sorted(EXTRA))
def test_a_batch_is_like_one_of_the_set(task: str) -> None:
    data = build.data(composed(f"data.task={task}", *FEW))
    if task == "low_resolution":
        data.scale_factor = 4
    noise = stand_in(data)
    true, made = (one.split("train").read([0, 1, 2, 3], None) for one in (data, noise))
    assert noise.provides == data.provides and made.keys() == true.keys() & made.keys() >= {"image", *data.provides}
    for name, value in made.items():
        if not isinstance(value, Tensor):
            assert len(value) == len(true[name]) == 4 and all(isinstance(text, str) for text in value)
        else:
            assert (value.shape, value.dtype) == (true[name].shape, true[name].dtype), name
    assert made["image"].min() >= -1 and made["image"].max() <= 1 and made["image"].std() > 0.4
    assert 0 <= made["label"].min() and made["label"].max() < data.n_classes


def test_no_file_is_looked_at(tmp_path: Path) -> None:
    data = build.data(composed("data=celeba", f"data.root={tmp_path}/nowhere", "data.batch_size=4"))
    made = stand_in(data).split("train").read([0, 1], [torch.Generator()] * 2)
    assert made["image"].shape == (2, 3, 64, 64) and made["attributes"].shape == made["target"].shape == (2, 40)
    assert set(made["target"].unique().tolist()) <= {0.0, 1.0} and not list(tmp_path.iterdir())
