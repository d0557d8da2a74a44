"""The tables of documents that are made of the ledger, results/*.jsonl: a line for each command that was judged.

    python studies/results.py

A table stands under a comment that says which rows it is of; its lines are written anew, all else stays:

    <!-- table of results/shapes.jsonl; rows: shapes_ddpm seed 21 or shapes_edm; columns: valid, recall -->

`rows` are words that each row has (experiment, overrides, name of the run, `seed 11`), `but` words of which it has
none. Training seeds of one command are one line, of the worst by the first column; `seeds: each` gives a line to each.
`base` are words that stand above the table and are not told again in it; a column `valid (95 %)` has intervals as well.
A row that no table shows is named at the end.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
TABLE = re.compile(r"(<!-- table of results/(\w+)\.jsonl; (.*) -->\n)((?:\|.*\n)*)")
UNTOLD = re.compile(  # words that say where and how often, or what another cell says
    r"(experiment|data|data\.root|data\.num_workers|budget\.images|eval\.\w+|metrics(\.\w+)*|"
    r"(callbacks\.grids|checkpoint)\.every_images)="
)
INTERVAL, NO_BREAK = " (95 %)", "\u00a0"  # the ends of an interval stay in one line
COLUMNS = {  # heading -> key of a row's values, digits behind the point
    "valid": ("judge/valid", 3),
    "loosely valid": ("judge/loose", 3),
    "asked label": ("judge/label", 3),
    "asked shape": ("judge/shape", 3),
    "asked colour": ("judge/colour", 3),
    "all as asked": ("judge/asked", 3),
    "coverage": ("judge/coverage", 2),
    "duplicates": ("judge/duplicates", 3),
    "recall": ("judge/recall", 3),
    "places": ("judge/places", 3),
    "combinations": ("judge/combinations", 2),
    "shape kept": ("answer/shape", 3),
    "colour kept": ("answer/colour", 3),
    "ground kept": ("answer/ground", 3),
    "place kept": ("answer/place", 3),
    "all kept": ("answer/all", 3),
    "PSNR": ("pair/psnr", 1),
    "SSIM": ("pair/ssim", 3),
    "PSNR given back": ("recon/psnr", 1),
    "valid given back": ("recon/valid", 3),
    "class recognised": ("label/accuracy", 3),
    "of real images": ("label/accuracy_real", 3),
    "fd_classifier": ("fd_classifier", 2),
    "fd_classifier of training images": ("real/fd_classifier", 2),
    "fd_mobilenet": ("fd_mobilenet", 1),
    "fd_mobilenet of training images": ("real/fd_mobilenet", 1),
    "memorisation": ("memorisation", 3),
    "held-out loss": ("heldout/loss", 3),
    "gap": ("gap", 3),
    "condition gain": ("condition_gain", 3),
    "bits/dim": ("bpd", 2),
}
SHORT_RUNS = "families"  # of studies/families.py, which docs/families.md shows whole
Row = dict[str, Any]
Ledger = dict[str, list[Row]]


class Table(NamedTuple):
    """What a comment asks for."""

    file: str
    rows: list[frozenset[str]]  # of each row all words of one of them
    but: frozenset[str]
    base: frozenset[str]
    columns: list[str]
    each: bool  # a line for each seed

    @classmethod
    def asked(cls, file: str, text: str) -> Table:
        """Of what stands within the comment: `key: words; key: words`."""
        said = dict(re.findall(r"(\w+): (.*?)(?:; |$)", text))
        rows = [_words(either) for either in said.get("rows", "").split(" or ")]
        columns = said.get("columns", "").split(", ")
        return cls(file, rows, _words(said.get("but", "")), _words(said.get("base", "")), columns, "seeds" in said)

    def chosen(self, ledger: Ledger) -> list[Row]:
        """Its rows of the ledger."""
        found = ((row, words(row)) for row in ledger.get(self.file, []))
        return [row for row, own in found if any(either <= own for either in self.rows) and not self.but & own]

    def lines(self, ledger: Ledger) -> list[str]:
        """The table in Markdown; a column that no row has a value of is left out.

        Raises:
            ValueError: there is no such column, or no row.
        """
        if unknown := [column for column in self.columns if column.removesuffix(INTERVAL) not in COLUMNS]:
            raise ValueError(f"no column {', '.join(unknown)}; there are {', '.join(COLUMNS)}")
        if not (chosen := self.chosen(ledger)):
            raise ValueError(f"results/{self.file}.jsonl has no row of this table: {self}")
        columns = [column for column in self.columns if any(figure(row, column) != "-" for row in chosen)]
        commands: dict[tuple[str, ...], list[Row]] = {}
        for row in chosen:
            seed = [str(row["seeds"]["training"])] if self.each else []
            commands.setdefault((told(row, self.base), *command(row), *seed), []).append(row)
        head = ["run", *columns, "images", "TFLOP", "seed"]
        cells = [[kind[0], *line(rows, columns)] for kind, rows in sorted(commands.items(), key=natural)]
        return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells)]


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"seed \d+|\S+", text))


def natural(item: tuple[tuple[str, ...], list[Row]]) -> list[list[Any]]:
    """The order of commands: by what is told of them, then by the rest, and numbers by their size."""
    told_first = [item[0][0].replace("`", ""), " ".join(item[0][1:])]
    return [[int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)] for text in told_first]


def command(row: Row) -> list[str]:
    """Experiment and overrides of a row, of training and then of judging, without its seeds."""
    return [row["experiment"], *(w for w in [*row["overrides"], *row["judged_with"]] if not w.startswith("seed="))]


def words(row: Row) -> frozenset[str]:
    """What a row can be chosen by."""
    return frozenset([*command(row), row["run"], f"seed {row['seeds']['training']}"])


def told(row: Row, base: frozenset[str]) -> str:
    """The command of a row but for the words of the base, and those that say where and how often."""
    experiment, *rest = command(row)
    own = [w for w in rest if w not in {*base, f"model={experiment}"} and not UNTOLD.match(w)]
    first = [] if experiment in base and own else [experiment]
    return " ".join(f"`{word}`" for word in [*first, *own])


def line(rows: list[Row], columns: list[str]) -> list[str]:
    """The cells of one command: figures of its worst row by the first column, small shares and large distances."""
    key, sign = COLUMNS[columns[0].removesuffix(INTERVAL)][0], -1 if columns[0].startswith("fd_") else 1
    worst = min(rows, key=lambda row: sign * (row["values"].get(key) or 0))
    of = f", worst of {len(rows)}" if len(rows) > 1 else ""
    tflop = "-" if worst["tflop"] is None else f"{worst['tflop']:.1f}"
    cells = [figure(worst, column) for column in columns]
    return [*cells, f"{worst['images']:,}", tflop, f"{worst['seeds']['training']}{of}"]


def figure(row: Row, column: str) -> str:
    """A value, with its interval where the column is one of intervals, or a dash."""
    key, digits = COLUMNS[column.removesuffix(INTERVAL)]
    value, interval = row["values"].get(key), row["intervals"].get(key) if column.endswith(INTERVAL) else None
    if value is None:
        return "-"
    between = f" ({interval[0]:.{digits}f}{NO_BREAK}..{NO_BREAK}{interval[1]:.{digits}f})" if interval else ""
    return f"{value:.{digits}f}{between}"


def tables(text: str) -> list[Table]:
    """Those that a document asks for."""
    return [Table.asked(found[2], found[3]) for found in TABLE.finditer(text)]


def written(text: str, ledger: Ledger) -> str:
    """A document with its tables made anew."""
    return TABLE.sub(lambda at: at[1] + "\n".join([*Table.asked(at[2], at[3]).lines(ledger), ""]), text)


def unseen(texts: list[str], ledger: Ledger) -> list[str]:
    """Rows that no table of these documents shows."""
    shown = [row for text in texts for table in tables(text) for row in table.chosen(ledger)]
    others = {file: rows for file, rows in ledger.items() if file != SHORT_RUNS}
    missing = ((file, row) for file, rows in others.items() for row in rows if row not in shown)
    return [f"results/{file}.jsonl: {told(row, frozenset())}" for file, row in missing]


def read() -> Ledger:
    """File name without its ending -> its rows."""
    files = sorted(ROOT.glob("results/*.jsonl"))
    return {path.stem: [json.loads(row) for row in path.read_text().splitlines()] for path in files}


def documents() -> dict[Path, str]:
    return {path: path.read_text() for path in sorted(ROOT.glob("docs/**/*.md"))}


def main() -> None:
    ledger, found = read(), documents()
    for path, text in found.items():
        name = path.relative_to(ROOT)
        try:
            new = written(text, ledger)
        except ValueError as error:
            sys.exit(f"{name}: {error}")
        if new != text:
            path.write_text(new)
            print(f"written: {name}")
    for row in unseen(list(found.values()), ledger):
        print(f"in no table: {row}", file=sys.stderr)


if __name__ == "__main__":
    main()
