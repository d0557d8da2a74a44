"""Command lines that are wrong: what was told badly once, and lines drawn at random (tests/fuzz_lines.py)."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import fuzz_lines
from tests.drawn_lines import Drawer, Line
from tests.programs import ROOT, python


@pytest.fixture(autouse=True)
def elsewhere() -> Iterator[None]:
    with fuzz_lines.somewhere(), fuzz_lines.in_haste():
        yield


@pytest.mark.parametrize(("given", "line"), {
    "train.py model=gan -m seed=-1,0": "error: seed=-1: it must be greater than or equal to 0. Fix: seed=0",
    "train.py --resolve": "error: --resolve=: it goes with --cfg job. Fix: python train.py --hydra-help",
    "train.py --cfg": "error: --cfg=: expected one argument. Fix: python train.py --hydra-help",
    "train.py seed=x --info=nope": "error: --info=: invalid choice: 'nope'",
    "train.py --config-name=sample": "error: --config-name=sample: a script has its own page in conf/.",
    "train.py --config-dir=nope": "error: --config-dir=nope: there is no such folder.",
    "train.py -seed=3": "error: -seed=3: keys are written without dashes. Fix: seed=3",
    "train.py 'seed = 3'": "error: seed=3: no space stands beside the =. Fix: seed=3",
    "train.py seed": "error: seed=: it cannot be parsed. Fix: seed=VALUE",
    "train.py ''": "error: KEY=: the key is missing. Fix: KEY=VALUE",
    "train.py budget=3": "error: budget=3: other keys stand beneath it. Fix: leave budget out",
    "train.py model.embedder=null": "error: model.embedder=null: model.net.cond_dim refers to model.embedder.dim",
    "train.py data=cifar10 data.task=edit": "no such key. Fix: leave data.task out, or data=shapes data.task=edit",
    "train.py data=cifar10 data.tasks=edit": "Fix: leave data.tasks out, or data=shapes data.task=edit",
    "train.py -m experiment=emoji_sketch model=vae": "experiment=emoji_sketch chooses first_stage@model.first_stage",
    "train.py model.net.run=x": "there is no such key. Fix: model=sdxl model.net.run=x",
    "train.py model=gan planes@model.loss=masked_image": "there is no such key. Fix: leave planes@model.loss out",
    "train.py model=gan sampler@model.sampler=heun": "Fix: leave sampler@model.sampler out, or model=",
    "train.py data.conditions._target_=x": "error: data.conditions._target_=x: there is no such key.",
    "train.py data._target_=!": "error: data._target_=!: there is no such key. Fix: leave data._target_ out",
    "train.py budget={a:1}": "error: budget={a:1}: there is no such key as budget.a. Fix: ",
    "train.py 'model=[4]'": "Fix: model=adm|ae|",
    "train.py lora=null": "error: lora=null: it is the name of a page in conf/lora. Fix: leave lora out, or lora=",
    "train.py model=gan lora=attention": "GAN takes no adapters, diffusion models do. Fix: leave lora out",
    "train.py weighting=a,b": "error: weighting=a,b: there is no such key. Fix: weighting@model.objective.weighting=",
    "train.py seed=choice(1,2)": "error: seed=choice(1,2): one value, or a sweep. Fix: python train.py -m 'seed=",
    "train.py -m 'seed=interval(0,1)'": "error: seed=interval(0,1): only a search takes an interval.",
    "train.py 'callbacks.grids.seed=${.batch_size}'": "key as batch_size there. Fix: callbacks.grids.seed=VALUE",
    "train.py 'callbacks.grids.seed=${data.batchsize}'": "Fix: 'callbacks.grids.seed=${data.batch_size}'",
    "train.py 'frozen_precision=${model.nte}'": "there is no such key. Fix: 'frozen_precision=\"32-true\"'",
    "train.py 'budget.images=${data}' data.conditions=3": "it refers to a section, a value is wanted. Fix: leave ",
    "train.py experiment=shapes_dcgan model=auto": "there is no such page in conf/model. Fix: leave model out",
    "train.py model=stargan data=cifar10": "needs attributes, and the set has none. Fix: data=celeba data.root=FOLDER",
    "train.py metrics=???": "error: metrics=???: it is the name of a page in conf/metrics. Fix: leave metrics out",
    "train.py 'callbacks.table.path=${seed}'": "error: callbacks.table.path=0: it must be a string.",
    "train.py callbacks.table._partial_=false": "clock is given to it later. Fix: callbacks.table._partial_=true",
    "train.py frozen_precision={a": "error: frozen_precision={a: it cannot be parsed. Fix: frozen_precision=VALUE",
    "train.py \"seed='0'\"": "error: seed=\"0\": it must be an integer. Fix: seed=0",
    "train.py choices.data=mnist 'data.x=}'": "it only says which page was chosen. Fix: data=mnist",
    "train.py experiment=shapes_cut model=vae": "VAE would get model.generator_optimizer, which it does not",
    "train.py hydra.job.chdir=true": "error: hydra.job.chdir=true: paths are told from where the command is given.",
    "train.py model=dcgan model.discriminator.image_size=cuda": "Fix: leave model.discriminator.image_size out",
    "train.py experiment=shapes_clip time_distribution@model.objective.time_distribution=log_normal": "leave it out",
    "train.py -m model=vae,gan likelihood@model.likelihood=learned": "Fix: leave likelihood@model.likelihood out",
    "train.py model=dit -mx": "error: -mx=: keys are written without dashes. Fix: leave -mx out",
    f"train.py run_dir={'x' * 300}": "the name is longer than this disk takes. Fix: run_dir=A_SHORTER_NAME",
    f"train.py model=ddpm run_dir=ddpm{'x' * 300}": "error: run_dir=ddpmxxx",
    "evaluate.py augment=ada": "error: augment=ada: there is no such key. Fix: leave augment out",
}.items())  # fmt: skip
def test_what_was_told_badly_is_one_line_and_its_fix_helps(given: str, line: str) -> None:
    script, *words = shlex.split(given)
    typed = Line(script.removesuffix(".py"), tuple(words))
    told, wrong = fuzz_lines.judged(typed)
    assert not wrong and line in told.err, f"{told.err}\n{wrong}"


def test_lines_that_are_wrong_somewhere_are_refused_in_one_line_whose_fix_passes() -> None:
    drawer = Drawer(3, None)
    for line in (drawer.line() for _ in range(12)):
        told, wrong = fuzz_lines.judged(line)
        assert not wrong, f"{line}\n{told.err}\n{wrong}"


@pytest.mark.slow
def test_2000_lines_of_all_scripts(finished: dict[str, Path]) -> None:
    words = ("-m", "tests.fuzz_lines", "2000", "1", str(finished["vae"].parent))
    done = python(*words, folder=ROOT, environment=os.environ, seconds=10_000)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
