"""A batch in pieces is the batch: gradients, clock, averages, clipping, resumed runs, ranks."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import train
from atelier.callbacks.ema import EMA
from atelier.callbacks.pieces import pieces
from atelier.checkpoints.store import load, newest
from atelier.core.errors import UserError
from atelier.models.base import Model
from tests.callbacks.pieces_ranks import trained
from tests.campaign import differences, flat
from tests.compose import composed
from tests.conftest import overrides, shared, train_once
from tests.programs import ROOT, Program
from tests.tiny import STANDS_ON, TINY

TAKING = {  # families, and what makes their training draw nothing
    "ddpm": ["model.net.dropout=0"],
    "ldm": ["model.net.dropout=0"],
    "vqprior": ["model.net.dropout=0"],
    "noisy_classifier": [],
}


def alike(a: dict[str, Tensor], b: dict[str, Tensor], share: float) -> None:
    """The same numbers, each tensor up to a share of its largest.

    The bias of keys adds the same to all scores: its gradient is rounding, which Adam takes for as much as any.
    """
    assert a.keys() == b.keys() and any("exp_avg" in name for name in a)
    for name, value in ((name, value) for name, value in a.items() if "keys_values.bias" not in name):
        torch.testing.assert_close(b[name], value, rtol=0, atol=share * max(1e-2, value.abs().max()), msg=name)


@pytest.fixture(scope="module")
def firsts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs that two of the families stand on."""
    root = shared(tmp_path_factory) / "finished"
    root.mkdir(exist_ok=True)
    for family in TAKING:
        if family in STANDS_ON:
            train_once(root, STANDS_ON[family], True)
    return root


@pytest.mark.parametrize("family", TAKING)
def test_pieces_train_as_the_whole(family: str, firsts: Path, tmp_path: Path) -> None:
    """Clipped so much that clipping piece by piece would differ."""
    words = [*TAKING[family], "model.grad_clip=0.01"] if family != "noisy_classifier" else TAKING[family]
    whole = trained(tmp_path / "whole", family, *words, root=firsts)
    alike(whole, trained(tmp_path / "pieces", family, *words, "accumulate=4", root=firsts), 1e-5)


def test_gradients_to_six_digits(tmp_path: Path) -> None:
    """Adam's first moments behind one batch are the gradient, a tenth of it."""
    one = "budget.images=8"
    whole = trained(tmp_path / "whole", "ddpm", "model.net.dropout=0", one)
    parts = trained(tmp_path / "pieces", "ddpm", "model.net.dropout=0", one, "accumulate=8")
    a, b = (
        torch.cat([value.flatten() for name, value in one.items() if name.endswith("exp_avg")])
        for one in (whole, parts)
    )
    assert len(a) > 1000 and (a - b).norm() < 1e-6 * a.norm()


def test_clock_and_averages_go_by_batches(tmp_path: Path) -> None:
    moved, shown = [], []
    with (
        patch.object(EMA, "update", lambda self, model: moved.append(self.clock.images_seen)),
        patch.object(Model, "report", lambda self, name, value: shown.append(self.images_seen)),
    ):
        trained(tmp_path / "run", "ddpm", "accumulate=2")
    assert moved == [8, 16, 24] and shown == [0, 0, 8, 8, 16, 16]


def test_what_is_reported_is_the_mean(tmp_path: Path) -> None:
    """The table of losses is that of whole batches."""
    rows = []
    for n in (1, 4):
        trained(tmp_path / str(n), "ddpm", "model.net.dropout=0", f"accumulate={n}")
        text = (tmp_path / str(n) / "metrics.csv").read_text().splitlines()
        named = [dict(zip(text[0].split(","), line.split(","), strict=True)) for line in text[1:]]
        rows.append([float(row["train/loss"]) for row in named if row.get("train/loss")])
    assert len(rows[0]) == 3 and rows[1] == pytest.approx(rows[0], rel=1e-5)


def states(folder: Path) -> dict[str, object]:
    held = load(newest(folder / "checkpoints"))
    return flat({key: held[key] for key in ("state_dict", "callbacks", "optimizer_states")}, "")


def test_a_run_in_pieces_goes_on_exactly_and_with_another_number(tmp_path: Path) -> None:
    words = [*overrides("ddpm"), "eval.every_images=1000", "eval.n_diagnosed=0"]
    train.train(composed(*words, "accumulate=2", run_dir=tmp_path / "run"))
    for name, n in (("again", 2), ("other", 4)):
        shutil.copytree(tmp_path / "run", tmp_path / name)
        newest(tmp_path / name / "checkpoints").unlink()
        assert load(newest(tmp_path / name / "checkpoints"))["callbacks"]["Clock"]["images_seen"] == 72
        train.train(composed(*words, f"accumulate={n}", run_dir=tmp_path / name))
    assert differences(states(tmp_path / "run"), states(tmp_path / "again")) == []
    other = states(tmp_path / "other")
    assert other["/callbacks/Clock/images_seen"] == 96
    assert differences(states(tmp_path / "run"), other)  # other noise, and so other weights


@pytest.mark.timeout(200)
def test_two_ranks_in_pieces_are_one_rank_and_exchange_once_a_batch(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        told = {"MASTER_PORT": str(free.getsockname()[1]), "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}
    environment = os.environ | told | {"NODE_RANK": "0", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = ["-m", "tests.callbacks.pieces_ranks", str(tmp_path / "two")]
    programs = [Program(words, ROOT, environment | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(2)]
    ended = [program.done(150) for program in programs]
    assert not any(end.returncode for end in ended), "".join(end.stderr[-3000:] for end in ended)
    one = trained(tmp_path / "one", "ddpm", "model.net.dropout=0")
    for rank in range(2):
        alike(one, torch.load(tmp_path / f"two/states_{rank}.pt", weights_only=True), 1e-4)
        exchanged = json.loads((tmp_path / f"two/exchanged_{rank}.json").read_text())
        assert exchanged.count(0) == 3  # the first bucket, once a batch


def test_a_batch_is_cut_in_order() -> None:
    batch = {"index": torch.arange(6), "text": list("abcdef"), "image": torch.zeros(6, 1, 2, 2)}
    cut = pieces(batch, 3)
    assert [piece["index"].tolist() for piece in cut] == [[0, 1], [2, 3], [4, 5]]
    assert cut[1]["text"] == ["c", "d"] and cut[2]["image"].shape == (2, 1, 2, 2)


@pytest.mark.parametrize("family", sorted(set(TINY) - set(TAKING)))
def test_families_that_take_a_batch_whole_say_so(family: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        train.train(composed(*overrides(family), "accumulate=2", run_dir=tmp_path / "run"))
    line = refused.value.line()
    assert "takes a batch whole; in pieces do DDPM, LDM, NoisyClassifier, VQPrior" in line
    assert "Fix: accumulate=1" in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["accumulate=3"], "8 images, a rank's share of a batch, do not divide by it. Fix: accumulate=2"),
        (["accumulate=8", "trainer.devices=2"], "4 images, a rank's share of a batch, do not divide by it"),
        (["accumulate=0"], "greater than 0"),
    ],
)
def test_pieces_that_do_not_divide_are_refused(words: list[str], problem: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        train.train(composed(*overrides("ddpm"), *words, run_dir=tmp_path / "run"))
    assert refused.value.key == "accumulate" and problem in refused.value.line()
