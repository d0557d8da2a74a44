"""Tables of documents that studies/results.py makes: which rows, in which order, the worst of several seeds."""

from __future__ import annotations

from pathlib import Path

import pytest

from studies import results

HEAD = "| run | valid | fd_classifier | images | TFLOP | seed |\n| --- | --- | --- | --- | --- | --- |\n"


def row(seed: int, valid: float, *words: str, judged: tuple[str, ...] = (), tflop: float | None = 6.64) -> results.Row:
    return {
        "experiment": "shapes_ddpm",
        "run": f"run_{seed}",
        "overrides": ["experiment=shapes_ddpm", "data.root=shapes", f"seed={seed}", *words],
        "judged_with": ["seed=77", "eval.n_samples=1000", *judged],
        "seeds": {"training": seed, "judging": 77},
        "values": {"judge/valid": valid, "fd_classifier": None},
        "intervals": {"judge/valid": [valid - 0.0124, valid + 0.01]},
        "images": 96_000,
        "tflop": tflop,
    }


LEDGER = {
    "shapes": [
        row(3, 0.9124, "model.width=10"),
        row(1, 0.9, "model.width=9", judged=("guidance=3",)),
        row(2, 0.887, "model.width=10", tflop=None),
        row(1, 0.5),
    ]
}
PLAIN = "| `shapes_ddpm` | 0.500 (0.488\u00a0..\u00a00.510) | 96,000 | 6.6 | 1 |\n"
NINE = "| `shapes_ddpm` `model.width=9` `guidance=3` | 0.900 (0.888\u00a0..\u00a00.910) | 96,000 | 6.6 | 1 |\n"
WORST = "| `shapes_ddpm` `model.width=10` | 0.887 (0.875\u00a0..\u00a00.897) | 96,000 | - | 2, worst of 2 |\n"
TWO = "| `shapes_ddpm` `model.width=10` | 0.887 (0.875\u00a0..\u00a00.897) | 96,000 | - | 2 |\n"
THREE = "| `shapes_ddpm` `model.width=10` | 0.912 (0.900\u00a0..\u00a00.922) | 96,000 | 6.6 | 3 |\n"


def made(asked: str, ledger: results.Ledger = LEDGER) -> str:
    """The table that a comment asks for, as it is written into a document, without its first two lines."""
    comment = f"<!-- table of results/shapes.jsonl; {asked} -->\n"
    text = results.written(f"Before.\n\n{comment}| old |\n\nBehind: | kept |\n", ledger)
    assert text.startswith(f"Before.\n\n{comment}| run | ") and text.endswith("|\n\nBehind: | kept |\n")
    assert results.written(text, ledger) == text
    return text.split(comment)[1].split("\n\n")[0].split("\n", 2)[2] + "\n"


@pytest.mark.parametrize(
    ("asked", "lines"),
    [
        ("columns: valid (95 %), fd_classifier", PLAIN + NINE + WORST),
        ("seeds: each; columns: valid (95 %)", PLAIN + NINE + TWO + THREE),
        ("rows: seed 2 or guidance=3; columns: valid (95 %)", NINE + TWO),
        ("rows: shapes_ddpm; but: model.width=10 guidance=3; columns: valid (95 %)", PLAIN),
        ("rows: run_1; base: shapes_ddpm; columns: valid (95 %)", NINE.replace("`shapes_ddpm` ", "") + PLAIN),
        ("rows: run_3; base: model.width=10; columns: valid", "| `shapes_ddpm` | 0.912 | 96,000 | 6.6 | 3 |\n"),
    ],
)
def test_rows_columns_and_the_worst_of_seeds(asked: str, lines: str) -> None:
    """A column without values is left out; 9 stands before 10."""
    assert made(asked) == lines


def test_of_distances_the_largest_is_the_worst() -> None:
    rows = [row(seed, 0.9) | {"values": {"fd_classifier": fd}} for seed, fd in ((1, 0.126), (2, 0.5), (3, 0.3))]
    assert made("columns: fd_classifier", {"shapes": rows}) == (
        "| `shapes_ddpm` | 0.50 | 96,000 | 6.6 | 2, worst of 3 |\n"
    )


def test_words_that_say_where_and_how_often_are_not_told() -> None:
    """The model is, where it is another than that of the experiment."""
    words = ("data.root=a", "eval.every_images=8", "checkpoint.every_images=8", "metrics=none", "budget.images=96_000")
    assert results.told(row(1, 0.5, *words), frozenset()) == "`shapes_ddpm`"
    told = results.told(row(1, 0.5, "model=ddpm", "callbacks.ema.half_lives=[8]"), frozenset())
    assert told == "`shapes_ddpm` `model=ddpm` `callbacks.ema.half_lives=[8]`"
    assert results.told(row(1, 0.5, "model=ddpm") | {"experiment": "ddpm"}, frozenset()) == "`ddpm`"


def test_a_changed_value_changes_the_table() -> None:
    other = {"shapes": [*LEDGER["shapes"][:3], row(1, 0.501)]}
    assert made("rows: seed 1; columns: valid", other) != made("rows: seed 1; columns: valid")


def test_what_no_table_shows_is_named_and_documents_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    document = tmp_path / "docs" / "a.md"
    document.parent.mkdir()
    document.write_text("<!-- table of results/shapes.jsonl; rows: model.width=10; columns: valid (95 %) -->\n")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "read", lambda: LEDGER)
    results.main()
    told = capsys.readouterr()
    assert told.out == "written: docs/a.md\n" and WORST in document.read_text()
    assert told.err.splitlines() == [
        "in no table: results/shapes.jsonl: `shapes_ddpm` `model.width=9` `guidance=3`",
        "in no table: results/shapes.jsonl: `shapes_ddpm`",
    ]


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ("columns: vaild", "no column vaild; there are valid, "),
        ("rows: seed 1", "no column ; there are valid, "),
        ("rows: seed 9; columns: valid", "has no row of this"),
    ],
)
def test_a_table_of_nothing_is_refused(
    asked: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line with the document's name, which stays as it is."""
    document = tmp_path / "docs" / "a.md"
    document.parent.mkdir()
    document.write_text(text := f"<!-- table of results/shapes.jsonl; {asked} -->\n")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "read", lambda: LEDGER)
    with pytest.raises(SystemExit, match=f"docs/a.md: .*{problem}"):
        results.main()
    assert document.read_text() == text
