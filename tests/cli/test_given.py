"""Names that look like numbers, home folders, and the folder of the newest run: what was typed is what is meant."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from atelier.cli import given, sweeps
from atelier.core.errors import UserError
from atelier.runs import fitting, preflight
from tests.compose import composed
from tests.test_entry_points import cli, run_folders
from tests.tiny import TINY

SOURCE = Path(__file__).parents[2] / "src" / "atelier"


def value(word: str, config: str = "train", *words: str) -> object:
    (kept,) = given.meant([word], False)
    cfg = composed(*words, kept, config=config)
    for part in word.partition("=")[0].split("."):
        cfg = cfg[part]
    return cfg


@pytest.mark.parametrize(("word", "read"), {
    "run=2026_11_28": "2026_11_28",
    "run=1e3": "1e3",
    "run=2026-11-28": "2026-11-28",
    "run=.5": ".5",
    "run='7'": "7",
    "run=inf": "inf",
    "attributes=1": "1",
    "attributes=[1,2_0,a b]": ["1", "2_0", "a b"],
    "out=~/a": "/home/me/a",
    "source='~/my pics'": "/home/me/my pics",
    "adapters=[~/a,007,b]": ["/home/me/a", "007", "b"],
    "negative=7": "7",
    "prompt=2 cats": "2 cats",
    "root=null": None,
    "label=3": 3,
    "label=[cat,3,Ankle boot,c++ (x),1e3,true]": ["cat", 3, "Ankle boot", "c++ (x)", "1e3", "true"],
    "label='3'": "3",
    "label=null": None,
    "attributes=[+Smiling,-Male,+5_o_Clock_Shadow]": ["+Smiling", "-Male", "+5_o_Clock_Shadow"],
}.items())  # fmt: skip
def test_a_name_is_what_was_typed(word: str, read: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert value(word, "sample") == read


def test_names_within_a_section_are_too() -> None:
    assert value("data.root=2024_11_28", "train", "data=images") == "2024_11_28"
    assert value("data.columns.image=1", "train", "data=hugging_face") == "1"
    assert value("data.batch_size=1_6") == 16


def annotations() -> dict[str, set[str]]:
    """The annotations that arguments of each name have in the rooms that configs call."""
    found: dict[str, set[str]] = {}
    paths = [path for room in fitting.ALLOWED for path in (SOURCE / room.replace(".", "/")).rglob("*.py")]
    for path in paths + [(SOURCE / room.replace(".", "/")).with_suffix(".py") for room in fitting.ALLOWED]:
        for node in ast.walk(ast.parse(path.read_text() if path.exists() else "")):
            if isinstance(node, ast.arg) and node.annotation is not None:
                found.setdefault(node.arg, set()).add(ast.unparse(node.annotation))
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.setdefault(node.target.id, set()).add(ast.unparse(node.annotation))
    return found


def test_every_key_that_is_a_name_is_known() -> None:
    """By its annotation; but for those that are a number elsewhere, and those within `columns`."""
    found = annotations()
    names = {key for key, kinds in found.items() if any(re.search(r"\bNames?\b", kind) for kind in kinds)}
    names -= {key for key in names if any(re.search(r"Int\b|Float\b", kind) for kind in found[key])} | {"columns"}
    names |= {key for key, kind in (preflight.TYPES | preflight.PART).items() if re.search(r"\bstr\b", str(kind))}
    assert names - given.NAMES == set() and given.NAMES - names == set()


def test_last_is_the_newest_run_and_of_many_jobs_the_newest_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for many in ([], ["-m"]):
        with pytest.raises(UserError, match=r"run_dir=last: no (run|sweep)"):
            given.meant([*many, "run_dir=last"], True)
    monkeypatch.setattr("atelier.runs.folders.find", lambda run: Path("outputs/new (1)"))
    (tmp_path / "outputs" / "sweeps" / "2026").mkdir(parents=True)
    assert given.meant(["seed=1", "run_dir=last"], True) == ["seed=1", 'run_dir="outputs/new (1)"']
    assert given.meant(["-m", "run_dir=last"], True) == ["-m", "hydra.sweep.dir=outputs/sweeps/2026"]
    assert given.meant(["-m", "run_dir=2026_11"], True) == ["-m", 'hydra.sweep.dir="2026_11"']
    assert given.meant(["run_dir=./last"], True) == ["run_dir=./last"]
    with pytest.raises(UserError, match="folder of all jobs"):
        given.meant(["-m", "run_dir=a,b"], True)
    with pytest.raises(UserError, match=r"Fix: hydra.sweep.dir=here"):
        sweeps.its_folder(["run_dir=here"])


def test_a_folder_called_by_a_date_and_the_newest_of_them(tmp_path: Path) -> None:
    words = [*TINY["gan"], "budget.images=16", "callbacks.grids.every_images=16"]
    cli(tmp_path, "train.py", *words, "run_dir=2026_11_28")
    assert run_folders(tmp_path) == [Path("2026_11_28")]
    told = cli(tmp_path, "train.py", "-m", *words, "run_dir=7_7").stdout
    assert "7_7/table.md" in told and run_folders(tmp_path) == [Path("2026_11_28"), Path("7_7/0")]
