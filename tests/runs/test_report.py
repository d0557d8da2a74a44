"""What a run leaves at its end, and a disk that has no room for it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import train
from atelier.callbacks import evaluation
from atelier.checkpoints.store import load, newest
from atelier.runs import report
from tests.compose import composed
from tests.conftest import overrides

SHORT = [*overrides("vae"), "budget.images=16", "eval.every_images=16"]


def test_a_full_disk_costs_the_exported_weights_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    save_file = report.save_file

    def full(state: dict[str, Any], path: Path) -> None:
        path.write_bytes(b"some")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "save_file", full)
    train.train(composed(*SHORT, run_dir=tmp_path))
    told = capsys.readouterr()
    (line,) = [line for line in told.err.splitlines() if line.startswith("warning: ")]
    assert "no weights.safetensors written" in line and "No space left on device" in line
    assert "  psnr               nearness in decibels" in told.out and "judge/asked" not in told.out
    assert "after 16 images" in told.out and "recon/psnr" in told.out and " GFLOP an image; pictures in " in told.out
    assert load(newest(tmp_path / "checkpoints"))["callbacks"]["Clock"]["images_seen"] == 16
    assert not list(tmp_path.glob("weights.safetensors*"))
    monkeypatch.setattr(report, "save_file", save_file)
    train.train(composed(*SHORT, run_dir=tmp_path))  # as the line says
    assert (tmp_path / "weights.safetensors").exists()
    kept = (tmp_path / "train.log").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", one) for one in kept)
    said = [one[20:].strip() for one in kept]
    assert said.count(line) == 1 and said.count("after 16 images") == 2  # both runs
    for one in (told.out + capsys.readouterr().out).splitlines():
        assert one.strip() in said


def test_a_full_disk_costs_the_summary_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """What was measured is shown all the same."""

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluation, "write_text", full)
    assert train.train(composed(*SHORT, "objective=recon/psnr", run_dir=tmp_path)) > 0
    told = capsys.readouterr()
    (line,) = [line for line in told.err.splitlines() if line.startswith("warning: ")]
    assert "summary.json written (No space left on device)" in line
    assert "recon/psnr" in told.out and not (tmp_path / "summary.json").exists()
    assert load(newest(tmp_path / "checkpoints"))["callbacks"]["Clock"]["images_seen"] == 16
