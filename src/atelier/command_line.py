"""`--help` in half a second: what there is to choose, read from the first lines of the pages of conf/."""

from __future__ import annotations

import sys
from pathlib import Path

CONF = Path(__file__).parents[2] / "conf"
WORDS = """\
seed=0                        of everything random
run_dir=DIR                   where the run lives; the same command goes on with a run that was stopped
resume=auto|never             never refuses a folder that holds a run
budget.images=N               images shown to the model;    budget.minutes=M cuts the run short
eval.every_images=N           between evaluations;          eval.n_samples=N judged in each
checkpoint.every_images=N     between checkpoints;          checkpoint.best=METRIC keeps the best as well
trainer=auto|cpu|gpu|ddp      trainer.devices=N  trainer.precision=auto|32-true|bf16-mixed|16-mixed  compile=true
objective=METRIC              returned to a sweeper:        python train.py -m seed=0,1,2 model=flow,ddpm
check=true                    check the config and stop
--cfg job                     every key of a run; --help-hydra: Hydra's own options"""
EXAMPLES = """\
python train.py                                              conditional flow matching on the shapes world, minutes
python train.py experiment=shapes_ddpm                       32 px, a quarter of an hour
python train.py model=ddpm data=fashion_mnist data.root=DIR
python sample.py run=last n=64 guidance=3 label=5
python evaluate.py run=last eval.n_samples=1000"""


def answer_help() -> None:
    """Print the help and leave, if that is what was asked for; otherwise do nothing."""
    if sys.argv[1:] == ["--help-hydra"]:
        sys.argv[1:] = ["--hydra-help"]
    if not {"-h", "--help"} & set(sys.argv[1:]):
        return
    parts = ["usage: python train.py [GROUP=PAGE ...] [KEY=VALUE ...]\n"]
    for group in ("model", "data", "experiment", "logger", "metrics", "debug", "hparams_search"):
        parts.append(f"{group}=")
        parts += [f"  {page.stem:<22}{headline(page)}" for page in sorted((CONF / group).glob("*.yaml"))]
    parts += ["\nkeys", *("  " + line for line in WORDS.splitlines())]
    parts += ["\nexamples", *("  " + line for line in EXAMPLES.splitlines())]
    print("\n".join(parts))
    sys.exit(0)


def headline(page: Path) -> str:
    """The first comment line of a page that says something."""
    for line in page.read_text().splitlines():
        text = line.lstrip("# ").strip()
        if line.startswith("#") and text and not text.startswith("@package"):
            return text
    return ""
