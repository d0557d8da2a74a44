"""The line that a user reads, and the three scripts as a user calls them."""

from __future__ import annotations

import difflib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from atelier.cli import messages, sweeps
from atelier.core import errors
from atelier.core.errors import UserError
from atelier.runs import pages
from tests.programs import python

ROOT = Path(__file__).parents[2]


def script(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"} | variables
    return python(str(ROOT / words[0]), *words[1:], folder=folder, environment=environment)


def test_the_line() -> None:
    line = UserError("data.batch_size", 0, "it must be\n greater than 0", "data.batch_size=48").line()
    assert line == "error: data.batch_size=0: it must be greater than 0. Fix: data.batch_size=48"


@pytest.mark.parametrize(
    ("value", "problem", "fix"), [(9, 9, 9), (900, 9, 9), (9, 900, 9), (9, 9, 900), (900, 900, 900)]
)
def test_a_long_line_is_cut_and_keeps_key_and_fix(value: int, problem: int, fix: int) -> None:
    line = UserError("model.net.width", "v" * value, "p" * problem, "f" * fix).line()
    assert len(line) <= 200
    assert line.startswith("error: model.net.width=vvv") and "ppp" in line and ". Fix: fff" in line
    assert "..." not in line.partition("Fix: ")[2] or fix == 900


def test_a_long_value_that_stays_is_not_repeated() -> None:
    line = UserError("lable", "v" * 300, "there is no such key", f"label={'v' * 300}").line()
    assert len(line) <= 200 and line.endswith("v: there is no such key. Fix: label=...")
    assert UserError("lable", "v" * 30, "no", f"label={'v' * 30}").line().endswith(f"Fix: label={'v' * 30}")


def test_even_a_long_key_is_one_line() -> None:
    assert len(UserError("k" * 300, 1, "no", "seed=2").line()) == 200


def test_a_search_over_what_the_model_has_not_is_told_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "model=gan", "hparams_search=optuna"])
    line = messages._no_such_key("model.optimizer.lr", "0.002").line()
    told = "it searches model.optimizer.lr, which this model has not. Fix: leave hparams_search out"
    assert line == f"error: hparams_search=optuna: {told}"


def test_an_error_crosses_processes() -> None:
    error = UserError("seed", 1, "no", "seed=2")
    assert pickle.loads(pickle.dumps(error)).line() == error.line()


@pytest.mark.parametrize(("word", "known", "found"), [
    ("ddmp", ["ddpm", "vae", "gan"], "ddpm"),
    ("model.lrr", ["model.cond_dropout", "model.optimizer.lr", "model.net.width"], "model.optimizer.lr"),
    ("bach_size", ["data.batch_size", "eval.every_images"], "data.batch_size"),
    ("zzz", ["ddpm", "vae"], None),
    ("ddpm", [], None),
])  # fmt: skip
def test_the_nearest_word(word: str, known: list[str], found: str | None) -> None:
    assert errors.nearest(word, known) == found


@pytest.mark.parametrize("word", ["loggergroup", "model.genertor.n_blocks", "model.disciminator_b", "batchsize", "x.y"])
def test_the_nearest_of_all_keys_is_that_of_full_comparisons(word: str) -> None:
    def likeness(key: str) -> float:
        pairs = (key, word), (key.split(".")[-1], word.split(".")[-1])
        return sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    best = max(pages.known_keys("train"), key=likeness)
    assert errors.nearest(word, pages.known_keys("train")) == (best if likeness(best) >= 1.1 else None)


def test_known_keys_are_those_of_the_script() -> None:
    assert pages.known_keys()["data.batch_size"] and "evaluator.suite" in pages.known_keys()
    assert "model.optimizer.lr" in pages.known_keys("train") and "budget.images" in pages.known_keys("train")
    assert {"strength", "model", "data.batch_size", "budget.images"}.isdisjoint(pages.known_keys("evaluate"))
    assert {"sampler.steps", "n", "label"} <= pages.known_keys("sample").keys()


def raised(error: BaseException, cause: BaseException | None) -> BaseException:
    try:
        raise error from cause
    except BaseException as caught:
        return caught


def test_a_mistake_is_found_under_what_was_raised_from_it() -> None:
    mistake = UserError("seed", 1, "no", "seed=2")
    assert messages.user_error(mistake) is mistake
    assert messages.user_error(raised(RuntimeError("in call"), mistake)) is mistake


def test_key_and_fix_of_a_part_are_told_from_where_it_stands() -> None:
    told = raised(ValueError("in call\nfull_key: model.generator"), UserError(".width", 4, "too few", ".width=12"))
    assert messages.user_error(told).line() == "error: model.generator.width=4: too few. Fix: model.generator.width=12"


def test_a_group_in_a_fix_keeps_its_name() -> None:
    told = raised(ValueError("in call\nfull_key: model"), UserError(".target", "X0", "no", "target@.target=v"))
    assert messages.user_error(told).line() == "error: model.target=X0: no. Fix: target@model.target=v"


def test_where_nothing_was_built_a_part_is_the_commands() -> None:
    told = messages.user_error(UserError(".sampler.steps", 9, "too many", ".sampler.steps=8"))
    assert told.line() == "error: sampler.steps=9: too many. Fix: sampler.steps=8"


def test_a_part_that_a_part_builds_is_told_from_both() -> None:
    with pytest.raises(UserError) as caught, errors.within("model"), errors.within(".net"):
        raise UserError(".width", 4, "too few", ".width=12")
    assert messages.user_error(caught.value).line() == "error: model.net.width=4: too few. Fix: model.net.width=12"


def test_a_bug_is_none() -> None:
    assert messages.user_error(ValueError("bug")) is None
    hidden = raised(ValueError("bug"), None)
    hidden.__context__ = UserError("seed", 1, "no", "seed=2")
    assert messages.user_error(hidden) is None  # raised `from None`


def test_memory_is_the_users_business() -> None:
    short = RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 2000000 bytes"
    )
    assert messages.user_error(short).key == "data.batch_size"
    assert messages.user_error(raised(ValueError("in call\nfull_key: model.net"), short)).key == "model.net"


def test_one_rank_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    error = UserError("seed", 1, "no", "seed=2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    messages.report(error)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("LOCAL_RANK", "0")
    messages.report(error)
    assert capsys.readouterr().err == error.line() + "\n"


def left(main: object, monkeypatch: pytest.MonkeyPatch, *words: str) -> int | str | None:
    monkeypatch.setattr("sys.argv", ["train.py", *words])
    with pytest.raises(SystemExit) as caught:
        messages.run(main)
    return caught.value.code


def failing() -> None:
    raise UserError("seed", 1, "no", "seed=2")


def test_a_mistake_exits_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert left(failing, monkeypatch) == 2
    assert capsys.readouterr().err == "error: seed=1: no. Fix: seed=2\n"


def test_the_variable_that_lets_checkpoints_run_code_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    assert left(lambda: pytest.fail("started"), monkeypatch) == 2
    assert "Fix: unset TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" in capsys.readouterr().err


def test_a_word_is_checked_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for word in ("+data.typo=1", "~seed", "--batch-size=3", "=3", "run_dir=", "run_dir=null"):
        assert left(lambda: pytest.fail("started"), monkeypatch, word) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and ". Fix: " in line


def test_a_bug_stays_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py"])

    def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        messages.run(broken)


@pytest.mark.parametrize("second", ["done", "error.txt", "overrides.txt"])
def test_a_failed_or_lost_job_of_a_sweep_exits_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], second: str
) -> None:
    """Its line came when it failed: here it stands in the table alone."""
    for job, left_behind in (("0", "done"), ("1", second)):
        (tmp_path / job).mkdir()
        (tmp_path / job / left_behind).write_text("error: seed=1: no. Fix: seed=2\n")
    cfg = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})

    def main() -> None:
        sweeps.Summary().on_multirun_end(cfg, "train")

    if second == "done":
        return main()
    assert left(main, monkeypatch) == 1
    told = capsys.readouterr()
    assert told.err == "" and told.out.count("seed=1: no" if second == "error.txt" else "did not finish") == 1


@pytest.mark.parametrize(
    "words", [["train.py", "model=ddmp"], ["train.py", "data.batch_size=abc"], ["sample.py", "sampler.steps=5"]]
)
def test_a_script_says_one_line_and_leaves_nothing(words: list[str], tmp_path: Path) -> None:
    done = script(tmp_path, *words)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and ". Fix: " in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_failing_job_does_not_stop_the_others(tmp_path: Path) -> None:
    """One job that preflight refuses, one that a constructor refuses, one that is right."""
    done = script(
        tmp_path, "train.py", "-m", "model=vae", "model.net.width=-4,8", "data.image_size=8,10",
        "trainer=cpu", "metrics=none", "data.batch_size=4", "budget.images=8", "data.n_train_scenes=20", "resume=never",
        "data.n_test_scenes=8", "eval.n_samples=4", "eval.n_real=4", "callbacks.grids.n=4",
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.count("error: model.net.width=-4: it must be") >= 2
    assert "error: data.image_size=10: " in done.stderr and "2 halvings need a multiple of 4" in done.stderr
    sweep = next((tmp_path / "outputs" / "sweeps").iterdir())
    finished = [folder.parent.name for folder in sweep.glob("*/weights.safetensors")]
    assert finished == ["2"]
    table = (sweep / "table.md").read_text()
    assert table in done.stdout and table.count("\n") == 6 and table.count("error: ") == 3
    for job in ("0", "3"):
        assert {path.name for path in (sweep / job).iterdir()} == {"error.txt", "overrides.txt"}
