"""`--help` in half a second: what there is to choose, read from the first lines of the pages of conf/."""

from __future__ import annotations

import itertools
import re
import shutil
import sys
import textwrap
from pathlib import Path

from atelier.core.stopping import piped
from atelier.runs.pages import CONF, offered

NAME = 25  # columns for the name of a page
WORDS = """\
seed=0                        of everything random
run_dir=DIR                   where the run lives; the same command goes on with a run that was stopped;
                              last: the newest under outputs/; with -m the folder of all jobs
resume=auto|never             never refuses a folder that holds a run
budget.images=N               images shown to the model;    budget.minutes=M cuts the run short
budget.until=job_end          saves and leaves before the SLURM job ends, to be requeued (examples/slurm.sh)
eval.every_images=N           between evaluations;          eval.n_samples=N judged in each
checkpoint.every_images=N     between checkpoints;          checkpoint.best=METRIC keeps the best as well
accumulate=N                  batches in N pieces, for less memory; frozen_precision=bf16-true (docs/memory.md)
trainer=auto|cpu|gpu|ddp      trainer.devices=N  trainer.precision=auto|32-true|bf16-mixed|16-mixed  compile=true
trainer.timeout_minutes=M     after which a rank that does not answer is given up
objective=METRIC              returned to a sweeper:        python train.py -m seed=0,1,2 model=flow,ddpm
check=true                    check every key, type and range, build nothing, and stop
--cfg job                     every key of a run; --help-hydra: Hydra's own options"""
EXAMPLES = """\
python train.py                                              conditional flow matching on the shapes world, minutes
python train.py experiment=shapes_ddpm                       32 px, a quarter of an hour
python train.py model=ddpm data=fashion_mnist data.root=DIR
python sample.py run=last n=64 guidance=3 label=5
python evaluate.py run=last eval.n_samples=1000
python export.py run=last layout=diffusers"""


def answer_help() -> None:
    """Print the help and leave, if that is what was asked for; otherwise do nothing."""
    if sys.argv[1:] == ["--help-hydra"]:
        sys.argv[1:] = ["--hydra-help"]
    if not {"-h", "--help"} & set(sys.argv[1:]):
        return
    script = Path(sys.argv[0]).stem
    with piped():
        print("\n".join(train_help() if script == "train" else other_help(script)))
        if script == "sample" and (run := [one.partition("=")[2] for one in sys.argv[1:] if one.startswith("run=")]):
            print("\n".join(names_of(run[-1].strip("\"'"))))
    sys.exit(0)


def listed_values(*keys: str) -> None:
    """`key=a,b` as typed is `key=[a,b]`, which Hydra would take for a sweep; where one is asked for, it is."""
    if {"-m", "--multirun"} & set(sys.argv):
        return
    for k, word in enumerate(sys.argv):
        key, _, value = word.partition("=")
        if key in keys and "," in value and "[" not in value:
            sys.argv[k] = f"{key}=[{value}]"


def train_help() -> list[str]:
    lines = ["usage: python train.py [GROUP=PAGE ...] [KEY=VALUE ...]"]
    lines += choices("train")
    lines += ["", "keys", *("  " + line for line in WORDS.splitlines())]
    return lines + ["", "examples", *("  " + line for line in EXAMPLES.splitlines())]


def other_help(script: str) -> list[str]:
    """Every key of sample.py, evaluate.py or export.py is on its one page, with a comment."""
    text = (CONF / f"{script}.yaml").read_text()
    keys = re.split(r"\n(?:evaluator|hydra):", text[text.index("\nrun:") :])[0].strip().splitlines()
    lines = [f"usage: python {script}.py [KEY=VALUE ...]", "", "keys and defaults", *("  " + line for line in keys)]
    lines += choices(script)
    return lines + ["", "example", *("  " + line for line in EXAMPLES.splitlines() if f"{script}.py" in line)]


def names_of(run: str) -> list[str]:
    """The labels and attributes that a run can be asked for; or why there are none to show."""
    from atelier.core.errors import UserError
    from atelier.runs import ground

    folder = Path(run)
    if not (folder / ground.FILE).exists():
        from atelier.runs import folders  # which takes seconds

        try:
            folder = folders.find(run)
        except UserError as error:
            return ["", error.line()]
    names = ground.names(folder)
    lines = [line for key, text in (names.lines() if names else {}).items() for line in _entry(f"{key}=", text)]
    return ["", f"names in {folder}" if lines else f"{folder} keeps no names of labels or attributes", *lines]


def choices(script: str) -> list[str]:
    """Each group of which a page can be chosen, as it is typed, and its pages."""
    return [
        line
        for group, typed in offered(script).items()
        for line in ["", *(f"{word}=" for word in typed), *pages(group)]
    ]


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
    return _entry(page.stem, " ".join([first, *(f"[n{need[1:].rstrip('.')}]" for need in needs)]))


def _entry(name: str, text: str) -> list[str]:
    width = max(60, min(120, shutil.get_terminal_size().columns))
    indents = {"initial_indent": f"  {name:<{NAME}}", "subsequent_indent": " " * (NAME + 2)}
    return textwrap.wrap(text, width, **indents)
