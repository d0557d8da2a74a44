"""examples/first_look.ipynb runs from its top to its end, and is committed as it is written: without outputs."""

from __future__ import annotations

import importlib.util
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from IPython import display
from nbclient import NotebookClient
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from atelier import load
from atelier.images.pictures import grid
from tests.programs import python
from tests.tiny import TINY

ROOT = Path(__file__).parents[1]
PATH = ROOT / "examples" / "first_look.ipynb"
LONGEST = 60  # words of a text cell


def written() -> nbformat.NotebookNode:
    return nbformat.read(PATH, as_version=4)


def source(cell: str) -> str:
    return next(one.source for one in written().cells if one.id == cell)


def test_it_has_no_outputs_and_no_places_of_a_machine() -> None:
    notebook = written()
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, cell.id
        else:
            assert len(cell.source.split()) <= LONGEST, cell.id
        assert not absolute(cell.source), cell.id
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}


def absolute(text: str) -> list[str]:
    """The absolute paths in a text, of the home folder too."""
    return re.findall(r"(?:^|[\s\"'=(])((?:/|~/|[A-Za-z]:\\)\w[^\s\"']*)", text)


def test_an_absolute_path_is_seen() -> None:
    assert absolute('root="/home/me/x" or ~/y, C:\\z and /content') == ["/home/me/x", "~/y,", "C:\\z", "/content"]
    assert not absolute("16 / 4, outputs/first_look, (16, C, H, W), and/or, PROJECT / script")


@pytest.fixture
def not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A folder in which the project is not importable; gives the commands that a cell runs there."""
    commands: list[list[str]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda words, check: commands.append(words))
    return commands


def test_without_the_project_it_is_cloned_and_installed(not_installed: list[list[str]], tmp_path: Path) -> None:
    exec(source("install"), {"REPOSITORY": "https://example.org/copy.git"})
    clone, install = not_installed
    assert clone == ["git", "clone", "--depth=1", "https://example.org/copy.git", "workshop"]
    assert install[1:] == ["-m", "pip", "install", "--quiet", "--editable", "workshop"]
    assert sys.path[0] == str(tmp_path / "workshop" / "src")
    (tmp_path / "workshop").mkdir()
    exec(source("install"), {"REPOSITORY": "ADDRESS OF YOUR COPY"})  # in a kernel that was started anew
    assert len(not_installed) == 2


def test_without_an_address_it_says_what_to_write(not_installed: list[list[str]]) -> None:
    names: dict[str, object] = {}
    exec(source("parameters"), names)
    with pytest.raises(SystemExit, match="Write the address of your copy of the project into REPOSITORY"):
        exec(source("install"), names)
    assert not_installed == []


def test_where_the_project_is_there_nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda words, check: pytest.fail("it runs something"))
    before = [*sys.path]
    exec(source("install"), {"REPOSITORY": "ADDRESS OF YOUR COPY"})
    assert sys.path == before


@pytest.mark.slow
def test_it_runs_in_a_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = short(written())
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    (judged,) = [cell.outputs for cell in notebook.cells if cell.id == "judge"]
    assert "pictures are valid scenes" in judged[-1].text


def short(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    for cell in notebook.cells:
        if cell.id == "parameters":
            cell.source = f"IMAGES, JUDGED, MORE = 16, 8, {[*TINY['ddpm'], 'data.n_test_scenes=400']}"
    return notebook


def done(typed: list[str]) -> subprocess.CompletedProcess[str]:
    """A program that has ended, forked from a process that has imported everything."""
    return python(*typed[1:], folder=Path.cwd(), environment=os.environ | {"OMP_NUM_THREADS": "1"})


class Begun:
    """As subprocess.Popen, by the same processes."""

    def __init__(self, typed: list[str], **_: Any) -> None:
        ended = done(typed)
        self.stdout, self.returncode = io.StringIO(ended.stdout + ended.stderr), ended.returncode

    def __enter__(self) -> Begun:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def run(words: list[str], stdout: int, text: bool, check: bool) -> subprocess.CompletedProcess[str]:
    """As subprocess.run, by the same processes."""
    ended = done(words)
    assert ended.returncode == 0, ended.stderr
    return ended


def test_it_runs_and_shows_what_the_run_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Its cells, one after the other, in this process."""
    shown: list[Any] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(display, "display", shown.append)
    monkeypatch.setattr(subprocess, "Popen", Begun)
    monkeypatch.setattr(subprocess, "run", run)
    names: dict[str, Any] = {}
    outputs: dict[str, list[Any]] = {}
    for cell in short(written()).cells:
        if cell.cell_type == "code":
            exec(cell.source, names)
            outputs[cell.id] = [shown.copy(), capsys.readouterr().out]
            shown.clear()
    run_again = load(tmp_path / "outputs" / "first_look")
    ((drawn,), _) = outputs["draw"]
    assert torch.equal(pil_to_tensor(drawn), grid(run_again.sample(n=16, seed=1), 8))
    by_name = [grid(run_again.sample(n=8, seed=1, label=label), 8) for label in ("red circle", "cyan star")]
    assert all(map(torch.equal, map(pil_to_tensor, outputs["name"][0]), by_name)) and not torch.equal(*by_name)
    ways = torch.cat([part.images for part in run_again.ask("interpolate", n=32, seed=3)])
    assert torch.equal(pil_to_tensor(outputs["interpolate"][0][0]), grid(ways, 8))
    (animated,) = outputs["animate"][0]
    assert Image.open(io.BytesIO(animated.data)).n_frames > 8
    pattern = r"^[\d.]+% of 8 pictures are valid scenes \(95 % interval "
    assert re.search(pattern, outputs["judge"][1], re.MULTILINE)
