"""`--help` in half a second: what there is to choose, read from the first lines of the pages of conf/."""

from __future__ import annotations

import itertools
import re
import shutil
import sys
import textwrap
from pathlib import Path

from atelier.core.errors import UserError, nearest
from atelier.core.launchers import rank
from atelier.core.stopping import piped
from atelier.runs.pages import CONF, members, offered

GROUP, NAME = 21, 26  # columns for the name of a group, and of a page or key, with a blank behind it
ALL_KEYS = "keys"  # what is asked for as if it were a group
EVERY_KEY = {  # command -> where its own page begins to list them, and ends
    "train": ("\nseed:", "\nchoices:"),
    "evaluate": ("\nrun:", "\nevaluator:"),
    "sample": ("\nrun:", "\nhydra:"),
    "export": ("\nrun:", "\nhydra:"),
    "demo": ("\nrun:", "\nhydra:"),
}
MOST_USED = {
    "run_dir=DIR": "where the run lives; the same command goes on with one that was stopped",
    "budget.images=N": "images shown to the model; budget.minutes=M cuts the run short",
    "eval.every_images=N": "between evaluations; eval.n_samples=N judged in each",
    "checkpoint.best=METRIC": "keeps the best checkpoint beside the newest two",
    "trainer.devices=N": "trainer.precision=auto|32-true|bf16-mixed|16-mixed",
    "-m seed=0,1,2": "a sweep, a job for each of what stands between commas",
    "check=true": "checks every key, type and range, and stops",
    "doctor=true": "tells what this machine has, tries some batches, says how long the run takes; stops",
    "--cfg job": "prints every key of a run, its pages' too; --help-hydra: Hydra's own",
}
EXAMPLES = """\
python train.py                            flow matching on the shapes world, minutes
python train.py experiment=shapes_ddpm     32 px, a quarter of an hour
python train.py model=ddpm data=fashion_mnist data.root=DIR
python sample.py run=last n=64 guidance=3 label=5
python evaluate.py run=last eval.n_samples=1000
python export.py run=last layout=diffusers
python demo.py run=last"""


def answer_help() -> None:
    """Print the help and leave, if that is what was asked for; otherwise do nothing."""
    if sys.argv[1:] == ["--help-hydra"]:
        sys.argv[1:] = ["--hydra-help"]
    if not {"-h", "--help"} & set(sys.argv[1:]):
        return
    script = Path(sys.argv[0]).stem
    try:
        lines = help_lines(script, sys.argv[1:])
    except UserError as error:
        print(error.line(), file=sys.stderr)
        sys.exit(2)
    with piped():
        print("\n".join(lines))
        if script == "sample" and (run := [one.partition("=")[2] for one in sys.argv[1:] if one.startswith("run=")]):
            print("\n".join(names_of(run[-1].strip("\"'"))))
    sys.exit(0)


def say_loading() -> None:
    """A word at once, to whoever sits at a terminal: importing torch takes seconds."""
    if sys.stderr.isatty() and rank() == 0:
        print("loading...", file=sys.stderr, flush=True)


def listed_values(*keys: str) -> None:
    """`key=a,b` as typed is `key=[a,b]`, which Hydra would take for a sweep; where one is asked for, it is."""
    if {"-m", "--multirun"} & set(sys.argv):
        return
    for k, word in enumerate(sys.argv):
        key, _, value = word.partition("=")
        if key in keys and "," in value and "[" not in value:
            sys.argv[k] = f"{key}=[{value}]"


def help_lines(script: str, words: list[str]) -> list[str]:
    """What `--help` beside these words prints: of each group that is named, its pages, else what there is.

    Raises:
        UserError: a word is no group of this command; one with a value, as model=ddpm, is asked about where it is one.
    """
    groups = offered(script)
    lines: list[str] = []
    for word in words:
        name, value = re.match(r"([^@=]*)[^=]*(=?)", word).groups()
        if name in groups:
            lines += ["", *(f"{typed}=" for typed in groups[name]), *pages(name)]
        elif name == ALL_KEYS:
            lines += ["", *keys(script)]
        elif not (value or name.startswith("-")):
            raise _unknown(script, name, list(groups))
    return lines[1:] or (train_help() if script == "train" else other_help(script))


def _unknown(script: str, name: str, groups: list[str]) -> UserError:
    of_page = next((group for group in groups if name in members(group)), None)
    close = of_page or nearest(name, [*groups, ALL_KEYS])
    fix = " ".join(["python", f"{script}.py", "--help", *([close] if close else [])])
    return UserError("--help", name, "it is the name of no group of pages", fix)


def train_help() -> list[str]:
    groups = offered("train")
    parts = [group for group, typed in groups.items() if all("@model." in one for one in typed)]
    of_parts = "; ".join(f"{group}: {' '.join(members(group))}" for group in parts)
    return [
        "usage: python train.py [GROUP=PAGE ...] [KEY=VALUE ...]",
        "",
        "groups and their pages; python train.py --help GROUP says what each page is and needs",
        *choices({group: typed for group, typed in groups.items() if group not in parts}),
        "",
        "parts of a model, chosen as target@model.objective.target=v; --help GROUP says how each is typed",
        *wrapped("", of_parts, 0),
        "",
        "keys; python train.py --help keys lists all of them",
        *(line for key, text in MOST_USED.items() for line in wrapped(key, text, NAME)),
        "",
        "examples",
        *("  " + line for line in EXAMPLES.splitlines()),
    ]


def other_help(script: str) -> list[str]:
    lines = [f"usage: python {script}.py [KEY=VALUE ...]", "", "keys and defaults", *keys(script)]
    if groups := offered(script):
        lines += ["", f"groups and their pages; python {script}.py --help GROUP says what each is", *choices(groups)]
    return lines + ["", "example", *("  " + line for line in EXAMPLES.splitlines() if f"{script}.py" in line)]


def keys(script: str) -> list[str]:
    """Every key of the page of a command, with what it has there and its comment; as wide as the terminal."""
    first, last = EVERY_KEY[script]
    text = (CONF / f"{script}.yaml").read_text()
    entries: list[tuple[str, list[str]]] = []
    for line in text[text.index(first) : text.index(last)].strip().splitlines():
        key, _, comment = line.partition("# ")
        if key.strip():
            entries.append((key.rstrip(), []))
        entries[-1][1].append(comment.strip())
    return [line for key, comments in entries for line in wrapped(key, " ".join(comments), NAME)]


def choices(groups: dict[str, list[str]]) -> list[str]:
    """Each group as it is typed and the names of its pages; recipes of the same images beside one another."""
    rows: dict[str, list[str]] = {}
    for group, typed in groups.items():
        for page in members(group):
            images, sign, recipe = page.partition("_") if group == "experiment" else ("", "", page)
            rows.setdefault(f"{typed[0]}={images}{sign}", []).append(recipe)
    return [line for row, names in rows.items() for line in wrapped(row, " ".join(names), GROUP)]


def names_of(run: str) -> list[str]:
    """The labels and attributes that a run can be asked for; or why there are none to show."""
    from atelier.runs import ground

    folder = Path(run)
    if not (folder / ground.FILE).exists():
        from atelier.runs import folders  # which takes seconds

        try:
            folder = folders.find(run)
        except UserError as error:
            return ["", error.line()]
    names = ground.names(folder)
    lines = [line for key, text in (names.lines() if names else {}).items() for line in wrapped(f"{key}=", text, NAME)]
    return ["", f"names in {folder}" if lines else f"{folder} keeps no names of labels or attributes", *lines]


def pages(group: str) -> list[str]:
    return [line for page in sorted((CONF / group).glob("*.yaml")) for line in listed(page)]


def header(page: Path) -> list[str]:
    """The comment lines at the top of a page."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), page.read_text().splitlines())
    return [line.lstrip("# ") for line in lines]


def headline(page: Path) -> str:
    """The first sentence of a page's header."""
    text = " ".join(line for line in header(page) if not line.startswith(("@package", "Needs: ")))
    return re.split(r"(?<=\.) (?=[A-Z]|python |van )", text, maxsplit=1)[0]


def listed(page: Path) -> list[str]:
    """A page's name, the first sentence of its header, and what it says after `Needs:`; as wide as the terminal."""
    first, needs = headline(page), [line for line in header(page) if line.startswith("Needs: ")]
    return wrapped(page.stem, " ".join([first, *(f"[n{need[1:].rstrip('.')}]" for need in needs)]), NAME)


def wrapped(name: str, text: str, columns: int) -> list[str]:
    """A name in its columns and a text beside it, as wide as the terminal."""
    width = max(60, min(120, shutil.get_terminal_size().columns))
    first = f"  {name:<{columns - 1}} " if name else "  "
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=" " * (columns + 2)) or [first.rstrip()]
