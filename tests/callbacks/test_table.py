"""metrics.csv: appended, cut on resume, whole after a torn line or a full disk."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import CSVLogger

import train
from atelier.callbacks.table import Table, read_rows
from atelier.checkpoints.store import Manifest
from tests.compose import composed
from tests.conftest import overrides

TRAINER = SimpleNamespace(is_global_zero=True, loggers=[])


def table(folder: Path, images_seen: int = 0) -> Table:
    made = Table(8, str(folder / "metrics.csv"), SimpleNamespace(images_seen=images_seen), None)
    made.on_fit_start(TRAINER, None)
    return made


def add(made: Table, images_seen: int, **row: float) -> None:
    made.clock.images_seen = images_seen
    made.add(TRAINER, {name.replace("__", "/"): value for name, value in row.items()})


def lines(folder: Path) -> list[str]:
    return (folder / "metrics.csv").read_text().splitlines()


def test_rows_are_appended(tmp_path: Path) -> None:
    made = table(tmp_path)
    add(made, 8, train__loss=1.5)
    inode = (tmp_path / "metrics.csv").stat().st_ino
    add(made, 16, train__loss=1.25)
    assert lines(tmp_path) == ["images_seen,train/loss", "8,1.5", "16,1.25"]
    assert (tmp_path / "metrics.csv").stat().st_ino == inode


def test_columns_grow(tmp_path: Path) -> None:
    made = table(tmp_path)
    add(made, 8, train__loss=1.5)
    add(made, 8, val__fid=3.0)
    add(made, 16, train__loss=1.25)
    assert lines(tmp_path) == ["images_seen,train/loss,val/fid", "8,1.5,", "8,,3.0", "16,1.25,"]


def test_a_resumed_run_loses_the_rows_after_its_checkpoint_and_goes_on(tmp_path: Path) -> None:
    made = table(tmp_path)
    for images_seen in (8, 16, 24):
        add(made, images_seen, train__loss=float(images_seen))
    again = table(tmp_path, images_seen=16)
    assert lines(tmp_path) == ["images_seen,train/loss", "8,8.0", "16,16.0"]
    add(again, 24, train__loss=2.0)
    assert lines(tmp_path)[-1] == "24,2.0"


def test_lightnings_table_is_lost_on_resume(tmp_path: Path) -> None:
    """Why Table is there."""
    for images_seen in (8, 16):
        logger = CSVLogger(tmp_path, name="", version="")
        logger.log_metrics({"loss": 1.0}, step=images_seen)
        logger.save()
    assert [row["step"] for row in csv.DictReader((tmp_path / "metrics.csv").open())] == ["16"]


@pytest.mark.parametrize("cut", range(1, 11))
def test_a_torn_last_line_is_left_out(tmp_path: Path, cut: int) -> None:
    """Also where what is left still looks like a row: `24,2.12` of `24,2.125`, or `2` of it."""
    made = table(tmp_path)
    add(made, 16, train__loss=1.0)
    add(made, 24, train__loss=2.125)
    path = tmp_path / "metrics.csv"
    whole = path.read_bytes()
    assert whole.endswith(b"24,2.125\r\n")
    path.write_bytes(whole[:-cut])
    assert [row["images_seen"] for row in read_rows(path)] == [16]
    assert lines(tmp_path)[0] == "images_seen,train/loss"
    again = table(tmp_path, images_seen=24)
    add(again, 32, train__loss=3.0)
    assert lines(tmp_path) == ["images_seen,train/loss", "16,1.0", "32,3.0"]


def test_no_table_and_an_empty_one_have_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "none.csv") == []
    (tmp_path / "empty.csv").write_bytes(b"")
    assert read_rows(tmp_path / "empty.csv") == []
    (tmp_path / "other.csv").write_bytes(b"\xff\xfe\x00,1\nx,2\n")
    assert read_rows(tmp_path / "other.csv") == []


def test_has_evaluation(tmp_path: Path) -> None:
    made = table(tmp_path)
    add(made, 8, train__loss=1.0)
    add(made, 16, train__loss=1.0)
    add(made, 16, val__fid=1.0)
    assert [made.has_evaluation(n) for n in (8, 16, 24)] == [False, True, False]
    assert table(tmp_path, images_seen=16).has_evaluation(16)
    assert not table(tmp_path, images_seen=8).has_evaluation(16)


def test_a_full_disk_costs_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    made = table(tmp_path)
    add(made, 8, train__loss=1.0)

    def full(row: dict) -> None:
        with made.path.open("a") as file:
            file.write("16,")
        raise OSError(28, "No space left on device")

    append = made._append
    monkeypatch.setattr(made, "_append", full)
    add(made, 16, train__loss=2.0)
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.setattr(made, "_append", append)
    add(made, 24, train__loss=3.0)
    assert lines(tmp_path) == ["images_seen,train/loss", "8,1.0", "16,2.0", "24,3.0"]


def test_a_run_writes_curves_and_evaluations(finished: dict[str, Path]) -> None:
    rows = read_rows(finished["gan"] / "metrics.csv")
    curve = [row for row in rows if "train/lr" in row]
    assert [row["images_seen"] for row in curve] == list(range(8, 97, 8))
    health = "discriminator discriminator_gradient penalty_gradient real_logit fake_logit ada_p ada_sign"
    assert {f"train/{name}" for name in health.split()} <= set(curve[0]) and "train/generator_gradient" in curve[1]
    assert ["train/generator" in row for row in curve] == [False, True] * 6  # n_critic = 2: nothing sticks
    assert ["train/r1" in row for row in curve] == [True, False, False] * 4
    assert all(row["perf/images_per_second"] > 0 for row in curve)
    assert [row["images_seen"] for row in rows if "val/judge/valid" in row] == [32, 64, 96]


def test_a_finished_run_that_is_extended_keeps_its_table(tmp_path: Path, finished: dict[str, Path]) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished["gan"], folder)
    words = [*overrides("gan"), "callbacks.grids.every_images=32", "budget.images=128"]
    train.train(composed(*words, run_dir=folder))
    before = lines(finished["gan"])
    assert lines(folder)[: len(before)] == before
    rows = read_rows(folder / "metrics.csv")
    assert [row["images_seen"] for row in rows if "train/lr" in row] == list(range(8, 129, 8))
    assert Manifest(folder / "checkpoints").read()["files"][-1]["images_seen"] == 128
