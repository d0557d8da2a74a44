"""When a SLURM job ends, as squeue tells it, and what a run does then."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import train
from atelier.callbacks import clock
from atelier.checkpoints.store import load, newest
from atelier.core import job
from atelier.core.errors import UserError
from atelier.runs import preflight
from tests.compose import composed
from tests.conftest import overrides


@pytest.mark.parametrize(
    ("told", "seconds"),
    [("9", 9), ("5:00", 300), ("1:00:01", 3601), ("2-03:00:00", 183_600), ("UNLIMITED", math.inf), ("-0:07", 0)],
)
def test_time_as_squeue_writes_it(told: str, seconds: float) -> None:
    assert job.seconds(told) == seconds


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What squeue says is the text of this file; where there is none, it fails."""
    path, answer = tmp_path / "bin" / "squeue", tmp_path / "answer"
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\n[ "$2" = --jobs=17 ] && cat {answer}\n')
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    return answer


def test_squeue_is_asked_before_the_environment(squeue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="squeue does not say when job 17 ends. Fix: budget.minutes=N"):
        job.seconds_left()
    monkeypatch.setenv("SLURM_JOB_END_TIME", "0")
    assert job.seconds_left() == 0
    squeue.write_text("1:30\n")
    assert job.seconds_left() == 90


def test_outside_of_a_job_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(UserError, match="budget.until=job_end: this is no SLURM job"):
        preflight.check(composed("budget.until=job_end"))
    preflight.check(composed("budget.until=job_end", "check=true"))


def test_a_run_saves_before_its_job_ends_and_goes_on(
    tmp_path: Path, squeue: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Also where the job is given more time while it runs; the next job ends as the run that was never stopped."""
    words, folder = [*overrides("vae"), "budget.until=job_end"], tmp_path / "run"
    squeue.write_text("1:30")  # half a minute more than the margin
    asked: list[float] = []

    def longer() -> float:
        asked.append(told())
        squeue.write_text("1:00" if len(asked) > 2 else "1:30")  # asked by preflight, at the start and when time is up
        return asked[-1]

    told = job.seconds_left
    now = iter(range(0, 10**6, 7))
    monkeypatch.setattr(job, "seconds_left", longer)
    monkeypatch.setattr(clock.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(clock, "SAVES", 0.0)
    with pytest.raises(SystemExit) as leaving:
        train.train(composed(*words, run_dir=folder))
    monkeypatch.undo()
    seen = load(newest(folder / "checkpoints"))["callbacks"]["Clock"]["images_seen"]
    assert leaving.value.code == 138 and len(asked) == 4 and 8 < seen < 96
    assert f"the SLURM job ends: stopped at {seen} images, saved" in capsys.readouterr().out
    train.train(composed(*overrides("vae"), run_dir=folder))
    train.train(composed(*overrides("vae"), run_dir=tmp_path / "whole"))
    states = [load(newest(path / "checkpoints"))["state_dict"] for path in (folder, tmp_path / "whole")]
    assert all((states[0][name] == states[1][name]).all() for name in states[0])
