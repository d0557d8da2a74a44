"""Accidents around a command: readers that leave, folders that go, file systems that lack something, two at once."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import DictConfig
from PIL import Image

import evaluate
import sample
from atelier.checkpoints import store
from atelier.cli import jobs
from atelier.core import lines
from atelier.core.errors import UserError
from atelier.runs import folders
from tests.compose import composed

ROOT = Path(__file__).parents[2]


def test_help_into_a_pipe_that_closes_says_nothing(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--help"], stdout=write, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")}, cwd=tmp_path, timeout=100,
    )  # fmt: skip
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_a_run_folder_that_was_removed_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()

    def removed(cfg: object) -> None:
        shutil.rmtree(folder)
        (folder / "metrics.csv").open("a")

    with pytest.raises(SystemExit) as leaving:
        jobs.job(removed, composed("model=gan", run_dir=folder))
    assert leaving.value.code == 2
    assert capsys.readouterr().err.startswith("error: run_dir=run: the folder was removed under the run.")


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("error", [UserError("model", "gan", "it diverged", "a lower lr"), ValueError("a bug")])
def test_an_error_is_the_last_line_of_the_log_of_what_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool, error: Exception
) -> None:
    monkeypatch.chdir(tmp_path)

    def failing(cfg: DictConfig) -> None:
        with folders.open_run(cfg) as folder:
            lines.say("a line")
            (folder / "metrics.csv" if begun else folder / "config.yaml").touch()
            raise error

    with pytest.raises(SystemExit if isinstance(error, UserError) else ValueError):
        jobs.job(failing, composed("model=gan", run_dir=tmp_path / "outputs" / "run"))
    if not begun:
        assert not (tmp_path / "outputs").exists()
        return
    kept = (tmp_path / "outputs/run/train.log").read_text().splitlines()
    line = str(error) if isinstance(error, UserError) else "ValueError: a bug"
    assert [one[20:] for one in kept] == ["a line", line]
    assert sorted(path.name for path in (tmp_path / "outputs/run").iterdir()) == ["metrics.csv", "train.log"]


def test_commands_of_one_second_take_names_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the other lives, and when it has ended and left its folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folders, "_HELD", [])
    assert [folders._free("now"), folders._free("now")] == ["now", "now_2"]
    for held in folders._HELD:
        held.close()
    assert folders._free("now") == "now"
    (tmp_path / "outputs" / "shapes_gan" / "then").mkdir(parents=True)
    assert folders._free("then") == "then_2"
    (tmp_path / "pictures" / "now").mkdir(parents=True)
    assert folders.unused(tmp_path / "pictures", "now").name == "now_2"
    assert folders.unused(tmp_path / "pictures", "then").name == "then"


def lacking(*given: object) -> None:
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")


def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(fcntl, "lockf", lacking)
    with folders.locked(tmp_path):
        assert not folders.is_running(tmp_path)
    assert capsys.readouterr().err.count("has no locks") == 1
    assert not (tmp_path / "lock").exists()


def test_a_lock_that_another_holds_is_still_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(*given: object) -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(fcntl, "lockf", taken)
    with pytest.raises(UserError, match="in use by"), folders.locked(tmp_path):
        pass


def test_a_file_system_without_fsync_is_warned_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    store._warn_once.cache_clear()
    monkeypatch.setattr(os, "fsync", lacking)
    for text in ("a", "b"):
        store.write_text(tmp_path / "file", text)
    assert (tmp_path / "file").read_text() == "b"
    assert capsys.readouterr().err.count("warning: ") == 1


def test_weights_are_for_whom_the_umask_says(finished: dict[str, Path]) -> None:
    os.umask(mask := os.umask(0))
    assert (finished["gan"] / "weights.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask


def test_figures_of_a_run_that_cannot_be_written_are_printed(
    finished: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = shutil.copytree(finished["vae"], tmp_path / "run")
    (run / "evaluations.jsonl").mkdir()  # as good as read-only, for root too
    few = ["eval.n_samples=8", "eval.batch_size=4", "eval.n_diagnosed=8", "eval.n_real=8", "metrics=none"]
    evaluate.evaluate(composed(f"run={run}", *few, config="evaluate"))
    told = capsys.readouterr()
    assert '"metrics": {' in told.out and "cannot be written (Is a directory)" in told.err


def test_a_bad_file_among_many_costs_itself_alone(
    finished: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pictures = tmp_path / "in"
    pictures.mkdir()
    for k in range(2):
        Image.new("RGB", (8, 8), (k, 9, 9)).save(pictures / f"{k}.png")
    (pictures / "bad.png").write_bytes(b"no image")
    words = [f"run={finished['ddpm']}", "do=edit", "sampler=ddim", "sampler.steps=2", f"out={tmp_path / 'out'}"]
    with pytest.raises(SystemExit) as leaving:
        sample.sample(composed(*words, f"source={pictures}", config="sample"))
    assert leaving.value.code == 1
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"0.png", "1.png", "grid.png"}
    told = capsys.readouterr().err
    assert f"error: source={pictures / 'bad.png'}: " in " ".join(told.split()) or "bad.png" in told
    assert "1 of 3 files could not be read" in told
    with pytest.raises(UserError, match="source"):
        sample.sample(composed(*words, f"source={pictures / 'bad.png'}", config="sample"))
