"""A row of results/: what it holds, which one it takes the place of, and who gets none."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import evaluate
from atelier.core import provenance
from atelier.core.errors import UserError
from atelier.runs import ledger
from tests.compose import composed

KEYS = (
    "experiment overrides judged_with run seeds n values intervals protocol images tflop seconds device commit versions"
    " checksum"
)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ledger, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


@pytest.fixture
def run(finished: dict[str, Path], tmp_path: Path) -> Path:
    """A tiny run in a folder under outputs/, trained by a command with a path in it."""
    folder = tmp_path / "outputs" / "shapes_vae" / "one"
    shutil.copytree(finished["vae"], folder)
    command = f"train.py model=vae data.limit=null metrics.cache={tmp_path}/cache run_dir={folder}"
    change(folder, command=command, commit="abc-dirty")
    return folder


def change(folder: Path, **told: Any) -> None:
    path = folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | told))


def recorded(run: Path, *words: str) -> None:
    words = (f"run={run}", "metrics=none", "eval.record=true", *words)
    evaluate.evaluate(composed(*words, config="evaluate"))


def test_a_row_says_what_was_done_by_which_code_where(
    run: Path, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    recorded(run, "eval.n_samples=16", "seed=5")
    out, err = capsys.readouterr()
    (line,) = (results / "shapes.jsonl").read_text().splitlines()
    row, printed, trained = json.loads(line), json.loads(out), json.loads((run / "summary.json").read_text())
    assert list(row) == KEYS.split() and str(tmp_path) not in line and "recorded in results/shapes.jsonl" in err
    assert (row["experiment"], row["run"]) == ("vae", "shapes_vae/one")
    assert row["overrides"] == ["model=vae", "data.limit=null", "metrics.cache=cache"]
    assert row["judged_with"] == ["metrics=none", "eval.n_samples=16", "seed=5"]
    assert (row["seeds"], row["n"], row["images"]) == ({"training": 0, "judging": 5}, 16, 96)
    told = ("metrics", "intervals", "protocol")
    assert [row[name] for name in ("values", *told[1:])] == [printed[name] for name in told]
    assert row["tflop"] == trained["tflop"] > 0 and row["seconds"] == trained["seconds"] > 0
    assert row["commit"] == {"training": "abc-dirty", "judging": provenance.commit()}
    assert row["checksum"] == ledger.checksum(row) != ledger.checksum(row | {"n": 17})
    assert row["device"]["judging"].endswith(", 1 thread, 32-true") and row["device"]["training"]
    assert {"torch", "lightning", "torchmetrics", "atelier"} <= set(row["versions"]["judging"])


def test_the_row_of_the_same_commands_is_replaced(run: Path, results: Path) -> None:
    for seed, resumed_at in ((1, 0), (2, 0), (1, 32)):
        change(run, resumed_at=resumed_at)
        recorded(run, "eval.n_samples=16", f"seed={seed}")
    rows = [json.loads(line) for line in (results / "shapes.jsonl").read_text().splitlines()]
    assert [(row["seeds"]["judging"], row["seconds"] is None) for row in rows] == [(2, False), (1, True)]


def test_what_an_older_run_does_not_say_is_null(run: Path, results: Path) -> None:
    path = run / "summary.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in said.items() if k not in ("tflop", "seconds", "versions", "device")}))
    recorded(run, "eval.n_samples=16")
    row = json.loads((results / "shapes.jsonl").read_text())
    assert (row["tflop"], row["seconds"], row["versions"]["training"]) == (None, None, None)
    assert row["versions"]["judging"]["torch"]


@pytest.mark.parametrize(
    ("told", "words", "line"),
    [
        ({"images_seen": 64}, [], "not finished (64 of 96 images), no row of results/. Fix: its train.py"),
        ({}, ["eval.n_samples=15"], "eval.n_samples=15: too few for a row of results/. Fix: eval.n_samples=16"),
        ({}, ["eval.record=maybe"], "error: eval.record=maybe: it must be a boolean"),
    ],
)
def test_what_makes_no_row_is_refused_in_one_line_before_it_is_judged(
    run: Path, results: Path, told: dict[str, Any], words: list[str], line: str
) -> None:
    change(run, **told)
    with pytest.raises(UserError) as error:
        recorded(run, *words)
    assert line in error.value.line() and not results.exists() and not (run / "evaluations.jsonl").exists()


def test_a_job_of_a_sweep_has_its_own_overrides(run: Path) -> None:
    (run / "overrides.txt").write_text("seed=3\nmodel=vae\n")
    assert ledger.typed(run, "train.py -m seed=1,2,3 model=vae,gan") == ["seed=3", "model=vae"]


def test_the_commit_is_that_of_the_code_and_none_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def found(root: Path = tmp_path) -> str | None:
        monkeypatch.setattr(provenance, "ROOT", root)
        return provenance.commit.__wrapped__()

    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.py").write_text("a = 1\n")
    assert found() is None
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one", "--no-verify")
    head = git("rev-parse", "HEAD")
    (tmp_path / "README.md").write_text("a document")
    assert found() == head and found(tmp_path / "src") is None
    (tmp_path / "src" / "b.py").write_text("b = 1\n")
    assert found() == f"{head}-dirty"
