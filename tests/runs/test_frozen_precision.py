"""Runs whose frozen weights are bf16: what is, what is not, that they go on exactly; blocks computed again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import train
from atelier.checkpoints.store import load, newest
from atelier.core.errors import UserError
from atelier.runs import folders, keeping
from tests.campaign import differences, flat
from tests.compose import composed
from tests.conftest import overrides
from tests.models import test_diffusers_pipeline as pipeline
from tests.tiny import COMMON

SMALL = [word for word in COMMON if not word.startswith("data.image_size")]
STILL = ["eval.every_images=1000", "eval.n_diagnosed=0", "checkpoint.every_images=8", "model.sampler.steps=2"]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny Stable Diffusion, trained further on two batches."""
    told = pipeline.made_for("stable_diffusion", tmp_path_factory.mktemp("pipeline"))
    return [*SMALL, *STILL, "model=stable_diffusion", *told, "model.net.checkpointing=true", "budget.images=24"]


def states(folder: Path) -> dict[str, object]:
    held = load(newest(folder / "checkpoints"))
    return flat({key: held[key] for key in ("state_dict", "callbacks", "optimizer_states")}, "")


def test_the_text_encoder_is_halved_and_the_run_goes_on_exactly(words: list[str], tmp_path: Path) -> None:
    for name, frozen in (("half", "bf16-true"), ("whole", "32-true")):
        train.train(composed(*words, f"frozen_precision={frozen}", run_dir=tmp_path / name))
    shutil.copytree(tmp_path / "half", tmp_path / "again")
    newest(tmp_path / "again/checkpoints").unlink()
    train.train(composed(*words, "frozen_precision=bf16-true", run_dir=tmp_path / "again"))
    half, whole = states(tmp_path / "half"), states(tmp_path / "whole")
    assert differences(half, states(tmp_path / "again")) == []
    assert differences(half, whole) and half.keys() == whole.keys()
    model = folders.load(tmp_path / "half", ema=True).model  # as it is sampled
    reader = model.embedder.sources["text"]
    assert reader.encoder.blocks[0].qkv.weight.dtype == torch.bfloat16
    assert {p.dtype for part in (model.first_stage, model.net) for p in part.parameters()} == {torch.float32}
    assert model.net.checkpointing
    other = folders.load(tmp_path / "whole", ema=True).model.embedder.sources["text"]
    a, b = (one.encode(["a cab"]).tokens for one in (reader, other))
    assert a.dtype == torch.float32 and 0 < (a - b).norm() < 2e-2 * b.norm()
    assert keeping.net_hash(reader.encoder) != keeping.net_hash(other.encoder)  # a text cache tells them apart
    with pytest.raises(UserError, match="frozen_precision=32-true: .* started with bf16-true"):
        train.train(composed(*words, run_dir=tmp_path / "half"))


def test_where_nothing_is_frozen_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        train.train(composed(*overrides("ddpm"), "frozen_precision=bf16-true", run_dir=tmp_path / "run"))
    line = "DDPM has no frozen encoder of texts, and no adapters on frozen weights. Fix: frozen_precision=32-true"
    assert line in refused.value.line()


def test_what_computes_nothing_again_is_one_line(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        train.train(composed(*words, "+model.first_stage.checkpointing=true", run_dir=tmp_path / "run"))
    assert refused.value.line().startswith("error: model.first_stage.checkpointing=True: KLNet computes nothing again")
