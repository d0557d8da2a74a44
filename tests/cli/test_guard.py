"""Before the first line of a command: what Hydra would call, and the folder that it makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from atelier.cli import guard
from atelier.core.errors import UserError
from tests.compose import composed
from tests.test_entry_points import cli
from tests.tiny import TINY

EVIL = {
    "callbacks": "callbacks: {x: {_target_: builtins.open, file: made, mode: w}}",
    "logging": "job_logging: {version: 1, handlers: {x: {'()': builtins.open, file: made, mode: w}}}",
    "file": "hydra_logging: {version: 1, handlers: {x: {class: logging.FileHandler, filename: made}}}",
    "looked_up": "job_logging: {version: 1, filters: {x: {name: 'ext://os.system'}}}",
    "sweeper": "sweeper: {params: {x: {_target_: builtins.open, file: made, mode: w}}}",
    "hidden": "callbacks: {x: '${model.net}'}",
}


@pytest.mark.parametrize("what", EVIL)
def test_a_page_has_hydra_call_nothing(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the way that a command goes, up to what Hydra would call first."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from tests.compose import CONF

    page = tmp_path / "pages" / "debug" / "mine.yaml"
    page.parent.mkdir(parents=True)
    page.write_text(f"# @package _global_\nhydra:\n  {EVIL[what]}\n")
    monkeypatch.chdir(tmp_path)
    composed()  # registers what pages ask for
    GlobalHydra.instance().clear()
    path = f"hydra.searchpath=[file://{tmp_path / 'pages'}]"
    with guard.guarded(), initialize_config_dir(str(CONF), version_base="1.3"):
        with pytest.raises(UserError, match=rf"hydra\.{what if what in ('callbacks', 'sweeper') else ''}"):
            compose("train", ["debug=mine", path], return_hydra_config=True)
        compose("train", ["debug=fast", path], return_hydra_config=True)
    assert not (tmp_path / "made").exists()


def test_a_page_from_another_folder_runs_nothing(tmp_path: Path) -> None:
    page = tmp_path / "pages" / "debug" / "mine.yaml"
    page.parent.mkdir(parents=True)
    page.write_text(f"# @package _global_\nhydra:\n  {EVIL['callbacks']}\n")
    done = cli(tmp_path, "train.py", "--config-dir", "pages", "debug=mine", *TINY["gan"], code=2)
    assert done.stderr.startswith("error: hydra.callbacks.x._target_=builtins.open: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("place", "why"), [("/proc/run", "cannot be made"), ("file/run", "Not a dir"), ("link", "link")]
)
def test_a_folder_that_cannot_be_made_is_one_line(place: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for many in ([], ["-m"]):
        done = cli(tmp_path, "train.py", *many, *TINY["gan"], f"run_dir={place}", code=2)
        assert done.stderr.startswith("error: run_dir=") and done.stderr.count("\n") == 1
        assert why in done.stderr and ". Fix: run_dir=" in done.stderr
