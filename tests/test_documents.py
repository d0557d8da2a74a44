"""The numbers of documents are those of the rows of results/ that they name, or are made of them; those of before are
listed. A number that is changed by hand is found, in the README, in the tables and in the rows themselves."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from atelier.runs.ledger import checksum
from studies import results

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FRONT = ({"flow_tiny"}, {"shapes_ddpm"}, {"shapes_ldm"}, {"shapes_text_to_image"})  # of three training seeds each
TIE = re.compile(r"(?:<!--|#) results/(\w+)\.jsonl:?([^\n]*?)(?:-->|\n|$)")
WORDS = re.compile(r"(?:judging )?seed \d+|[\w.@/]+=\S+|\w+")
UNITS = r"(?:M|min|s|h|GFLOP|MiB)\b"  # of numbers that no evaluation measures
METRIC = re.compile(rf"(?<![\w.,=-])(?:\d[\d,]*\.\d+|\d+ %)(?!\w|\.\d| {UNITS})")


class Claim(NamedTuple):
    """Printed numbers, and the file of results/ and the words that say which row they are of."""

    where: str
    numbers: list[str]
    file: str
    words: frozenset[str]
    one: bool  # a table's row is of one row there; a paragraph may speak of several seeds


def tied(text: str) -> tuple[str, frozenset[str], str]:
    """File and words of the first tie in a text, and what stands behind it; all of the text where it has none."""
    tie = TIE.search(text)
    return (tie[1], frozenset(WORDS.findall(tie[2])), text[tie.end() :]) if tie else ("", frozenset(), text)


def document(name: str, text: str) -> Iterator[Claim]:
    """The rows of all tables, each told apart by the code and the seed of its first cell, and the tied paragraphs.

    Of the README every paragraph. Blocks of code say nothing; tables that studies/results.py makes have their own test.
    """
    text = re.sub(r"```.*?```", "", results.TABLE.sub("", text), flags=re.DOTALL)
    for block in re.split(r"\n\s*\n", re.sub(r"-->\s*\n", "-->\n", text)):
        file, words, rest = tied(block)
        table = [re.split(r"\s*\|\s*", line.strip("| ")) for line in block.splitlines() if line.startswith("|")]
        for cells in table[2:]:
            where = f"{name}: {' | '.join(cells)}"
            if table[0][0] == "seed":
                cells[0] = f"seed {cells[0]}"
            own = WORDS.findall(" ".join(re.findall("`(.*?)`", cells[0]))) + re.findall(r"seed \d+", cells[0])
            yield Claim(where, numbers(cells), file, words | set(own), True)
        if not table and (file or name == "README.md"):
            yield Claim(f"{name}: {rest}", numbers([re.sub("`.*?`", "", rest)]), file, words, False)


def header(name: str, page: str) -> Claim:
    """The comment lines of a page."""
    file, words, rest = tied("\n".join(line for line in page.splitlines() if line.startswith("#")))
    return Claim(name, numbers([rest.replace("\n# ", " ")]), file, words, False)


def numbers(cells: list[str]) -> list[str]:
    """What looks like a metric: decimals and percentages without a unit of time or size; an integer that is a cell."""
    return [n for c in cells for n in ([c] if re.fullmatch(r"[\d,]+", c) else METRIC.findall(c))]


def fitting(words: frozenset[str], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that have all of the words, of these the ones with the fewest further words; seeds are told apart."""
    fit = []
    for row in rows:
        own = {w for w in [row["experiment"], *row["overrides"], *row["judged_with"]] if not w.startswith("seed=")}
        seeds = {f"seed {row['seeds']['training']}", f"judging seed {row['seeds']['judging']}"}
        fit += [(len(own), row)] if words <= own | seeds else []
    return [row for n, row in fit if n == min(n for n, _ in fit)]


def held(node: Any) -> Iterator[float]:
    """Every number of a row but its seeds, also those of its overrides."""
    if isinstance(node, dict):
        node = [child for key, child in node.items() if key not in ("seed", "seeds")]
    if isinstance(node, list):
        for child in node:
            yield from held(child)
    elif isinstance(node, str):
        yield from map(float, re.findall(r"=(\d+(?:\.\d+)?)$", node.replace("_", "")))
    elif node is not None:
        yield float(node)


def shows(number: str, rows: list[dict[str, Any]]) -> bool:
    """Whether a row has a value that is printed so, or in percent; an integer must be met exactly."""
    digits = number.strip(" %").replace(",", "")
    room = 0.5 * 10.0 ** -len(digits.partition(".")[2]) + 1e-9 if number != digits or "." in digits else 0.0
    return any(abs(scale * v - float(digits)) <= room for row in rows for v in held(row) for scale in (1, 100))


def complaints(claims: list[Claim], ledger: dict[str, list[dict[str, Any]]], before: list[str]) -> Iterator[str]:
    for where, told, file, words, one in claims:
        if not told or " ".join(told) in before:
            continue
        rows = fitting(words, ledger.get(file, [])) if words else []
        if not rows or one and len(rows) > 1:
            yield f"{where}: {told} must be of one row of results/, {len(rows)} fit {sorted(words)}"
            continue
        if wrong := [number for number in told if not shows(number, rows)]:
            yield f"{where}: {wrong} are not in the row of {sorted(words)}"
        front = frozenset(word for word in words if "seed " not in word)
        if front in FRONT and len({row["seeds"]["training"] for row in fitting(front, ledger.get(file, []))}) < 3:
            yield f"{where}: a front row needs three seeds of training"


def everything() -> list[Claim]:
    documents, pages = [ROOT / "README.md", *ROOT.glob("docs/**/*.md")], ROOT.glob("conf/experiment/*.yaml")
    found = [claim for path in documents for claim in document(path.name, path.read_text())]
    return found + [header(path.name, path.read_text()) for path in sorted(pages)]


def before() -> list[str]:
    return [line for line in (ROOT / "results" / "before.txt").read_text().splitlines() if not line.startswith("#")]


def test_every_number_is_of_a_row_or_of_before() -> None:
    assert not list(complaints(everything(), results.read(), before()))


def test_what_no_document_says_any_more_is_no_longer_listed() -> None:
    assert set(before()) == {" ".join(claim.numbers) for claim in everything()} & set(before())


def numbers_of_the_readme() -> list[re.Match[str]]:
    """What looks like a metric outside of code."""
    text = re.sub(r"```.*?```|`.*?`", lambda code: "x" * len(code[0]), README, flags=re.DOTALL)
    return list(METRIC.finditer(text))


@pytest.mark.parametrize("number", numbers_of_the_readme(), ids=lambda number: number[0])
def test_a_number_of_the_readme_that_is_changed_is_found(number: re.Match[str]) -> None:
    digit = README[: number.end()].rstrip(" %")[-1]
    at = README.rindex(digit, 0, number.end())
    changed = f"{README[:at]}{(int(digit) + 1) % 10}{README[at + 1 :]}"
    assert list(complaints(list(document("README.md", changed)), results.read(), before()))


def test_tables_are_those_of_the_ledger() -> None:
    ledger = results.read()
    stale = [path.name for path, text in results.documents().items() if results.written(text, ledger) != text]
    assert not stale, f"python studies/results.py writes {stale}"


def test_every_row_stands_in_a_table() -> None:
    assert not results.unseen(list(results.documents().values()), results.read())


def test_no_row_was_changed_by_hand() -> None:
    for file, rows in results.read().items():
        wrong = [row["run"] for row in rows if checksum(row) != row.get("checksum")]
        assert not wrong, f"results/{file}.jsonl is not as evaluate.py eval.record=true wrote it: {wrong}"


def leaves(node: Any) -> Iterator[tuple[Any, Any]]:
    """Where each number of a row stands."""
    for key in node if isinstance(node, dict) else range(len(node)):
        if isinstance(node[key], dict | list):
            yield from leaves(node[key])
        elif isinstance(node[key], float | int):
            yield node, key


def test_any_number_of_a_row_that_is_changed_is_found() -> None:
    """Those that no document shows too."""
    row = copy.deepcopy(results.read()["shapes"][0])
    found = list(leaves(row))
    assert len(found) > 30
    for node, key in found:
        kept, node[key] = node[key], node[key] + 0.001
        assert checksum(row) != row["checksum"]
        node[key] = kept
    assert checksum(row) == row["checksum"]


LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")


def anchors(path: Path) -> set[str]:
    """Of the headings of a document, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))], ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for file, anchor in LINK.findall(path.read_text()):
        if not file.startswith("http"):
            target = path.parent / file if file else path
            assert target.exists() and (not anchor or anchor in anchors(target)), f"{path.name}: {file}#{anchor}"


def row(seed: int, valid: float, *overrides: str) -> dict[str, Any]:
    seeds, interval = {"training": seed, "judging": 7}, {"judge/valid": [0.8001, 0.9496]}
    told = {"experiment": "shapes_ddpm", "overrides": [*overrides, f"seed={seed}"], "judged_with": ["seed=7"]}
    return told | {
        "seeds": seeds,
        "values": {"judge/valid": valid, "fd": None},
        "intervals": interval,
        "images": 96_000,
    }


ROWS = [row(1, 0.9124), row(2, 0.887), row(3, 0.9), row(1, 0.004, "model=ddpm")]
HEAD = "| run | valid | images |\n| --- | --- | --- |\n"
TIED = f"<!-- results/shapes.jsonl: shapes_ddpm -->\n{HEAD}"


@pytest.mark.parametrize(
    ("text", "rows", "found"),
    [
        (
            f"{TIED}| seed 1 | 0.912 (0.800 .. 0.950), 12 min | 96,000 |\n| `model=ddpm` seed 1 | 0.4 % | 96,000 |",
            ROWS,
            "",
        ),
        (f"{TIED}| seed 1 | 0.913 | 96,000 |", ROWS, "['0.913'] are not in the row"),
        (f"{TIED}| seed 1 | 0.912 | 95,999 |", ROWS, "['95,999'] are not in the row"),
        (f"{TIED}| seed 4 | 0.912 | 96,000 |", ROWS, "0 fit"),
        (f"{TIED}| as it is | 0.912 | 96,000 |", ROWS, "3 fit"),
        (f"{TIED}| as it is | 0.5 | 7 |", ROWS, ""),
        (f"{TIED}| seed 1 | 0.912 | 96,000 |", ROWS[1:2] + ROWS[:1], "three seeds"),
        (f"{HEAD}| `shapes_ddpm` seed 1 | 0.912 | 96,000 |", ROWS, "0 fit"),
        ("Said without a table, 0.5 is nobody's business.", ROWS, ""),
        ("<!-- results/shapes.jsonl: shapes_ddpm -->\n\n91.2 % are valid, 88.7 % with the worst of three.", ROWS, ""),
        ("<!-- results/shapes.jsonl: shapes_ddpm -->\n91.3 % are valid.", ROWS, "['91.3'] are not in the row"),
    ],
)
def test_a_document_is_held_to_the_rows_that_it_names(text: str, rows: list[dict[str, Any]], found: str) -> None:
    told = list(complaints(list(document("a.md", text)), {"shapes": rows}, ["0.5 7"]))
    assert len(told) == bool(found) and found in "".join(told)


def test_of_the_readme_every_paragraph_counts_and_code_does_not() -> None:
    tied = "<!-- results/shapes.jsonl: shapes_ddpm -->\n91.2 %.\n"
    text = f"Said `x 0.4` without a row, 0.5 is found.\n\n```\n0.6\n```\n\n{tied}"
    told = [list(complaints(list(document(name, text)), {"shapes": ROWS}, [])) for name in ("README.md", "a.md")]
    assert len(told[0]) == 1 and "['0.5'] must be of one row" in told[0][0] and not told[1]


def test_a_header_is_held_to_the_row_that_it_names() -> None:
    page = "# @package _global_\n# R1 0.3, at a rate of 2e-3.\n{}# 12 min of one core: {} %\n# of samples.\nlr: 0.7\n"
    tie = "# results/shapes.jsonl: shapes_ddpm model=ddpm seed 1\n"
    told = [header("page", page.format(*words)) for words in ((tie, "0.4"), (tie, "0.5"), ("", "0.4"))]
    assert [claim.numbers for claim in told] == [["0.4"], ["0.5"], ["0.3", "0.4"]]
    assert [len(list(complaints([claim], {"shapes": ROWS}, []))) for claim in told] == [0, 1, 1]


SHORT = ROOT / "results" / "families.jsonl"


def short_runs() -> list[dict[str, Any]]:
    """Rows of studies/families.py, each with its parameters in millions too, as they are printed."""
    rows = [json.loads(line) for line in SHORT.read_text().splitlines()]
    return [row | {"millions": [n / 1e6 for n in held(row["facts"]) if n >= 1e4]} for row in rows]


def test_every_number_of_the_short_runs_is_of_one_of_them() -> None:
    """Also those with units, and those of the parts of a model: in the row of its run, or of any for parts."""
    rows, lines = short_runs(), (ROOT / "docs" / "families.md").read_text().splitlines()
    told = [re.sub(r"`[^`]*`", "", line) for line in lines if line.startswith(("| `", "  - `"))]
    numbers = [number for line in told for number in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e-\d+)?", line)]
    assert len(numbers) > 10 * len(rows)
    assert not [number for number in numbers if not shows(number, rows)]


def test_short_runs_are_of_one_stated_work_and_stay_out_of_the_readme() -> None:
    rows, text = short_runs(), (ROOT / "docs" / "families.md").read_text()
    work = float(re.search(r"each trained with ([\d.]+) TFLOP", text)[1])
    assert all(row["tflop"] == pytest.approx(work, rel=0.15) for row in rows)
    assert sum(row["tflop"] for row in rows) <= 250
    assert "families.jsonl" not in (ROOT / "README.md").read_text()
