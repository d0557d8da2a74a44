"""Every page of conf/: it fits its constructors, every leaf of it refuses nonsense in one line, and it trains."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import train as entry
from atelier.checkpoints import renamed
from atelier.cli import messages, offers
from atelier.core.errors import UserError
from atelier.core.rng import ImageRngs
from atelier.models.base import sampling_mode
from atelier.runs import build, preflight, pretrained
from atelier.runs.pages import chosen as chosen_keys
from atelier.runs.pages import places
from tests import fixes
from tests.compose import CONF, a_finished_run, composed
from tests.data.test_hugging_face import saved
from tests.data.test_published import write_celeba, write_cifar10, write_mnist
from tests.models import test_diffusers_pipeline as pipeline
from tests.nets.test_taesd import small, written
from tests.tiny import task

LINE = re.compile(r"error: (\S+?)=(.*?): .+\. Fix: .+")


def pages(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def error_of(work: Callable[[], object], about: object = "") -> UserError:
    """The mistake that a user reads in one line of what `work` raises."""
    try:
        work()
    except Exception as caught:
        error = messages.user_error(caught)
        assert error is not None, repr(caught)
    else:
        pytest.fail(f"accepted {about}")
    line = error.line()
    assert len(line) <= 200 and "\n" not in line and LINE.fullmatch(line), line
    return error


def line_of(work: Callable[[], object], about: object = "") -> str:
    return error_of(work, about).line()


def refused(*overrides: str, config: str = "train") -> str:
    """The line; what it offers passes."""
    error = error_of(lambda: preflight.check(composed(*overrides, config=config)))
    fixes.typed(error, *overrides, config=config)
    return error.line()


# Every page fits, and no leaf of it takes nonsense

SCOPES = {  # group -> the parts of a config that a page of it refers to, which keeps the thousands of checks short
    "data": ["seed", "data"],
    "model": ["seed", "data", "budget", "model"],
    "trainer": ["trainer"],
    "logger": ["run_dir", "logger"],
    "metrics": ["metrics"],
    "lora": ["seed", "data", "budget", "model", "lora", "start_from", "text_cache", "choices"],
}
PUBLISHED = [
    page for page in pages("model") if page.startswith(("stable_diffusion", "sdxl"))
]  # on pipelines of diffusers
WHOLE = ("experiment", "debug", "hparams_search")  # pages that change other pages
PAGES = [
    *(("train", group, page) for group in SCOPES for page in pages(group)),
    *(("train", group, page) for group in (*WHOLE, "callbacks") for page in pages(group)),
    *(("sample", group, page) for group in ("sampler", "guider") for page in pages(group)),
    ("train", "", ""), ("sample", "", ""), ("evaluate", "", ""), ("export", "", ""), ("demo", "", ""),
]  # fmt: skip
RIGHT = {  # (key, value): values that look wrong and are not
    ("adapter_weights", "-1"): "away from what an adapter has learned",
    ("model.objective.time_distribution.logit_mean", "-1"): "a logit has either sign",
    ("model.objective.time_distribution.logit_mean_end", "-1"): "a logit has either sign",
    ("model.codec.shift", "-1"): "a shift has either sign",
    ("model.first_stage.shift", "-1"): "the same",
    ("prompt", ""): "the empty prompt",
    ("negative", ""): "the same",
    ("model.objective.time_distribution.log_mean", "-1"): "a logarithm has either sign",
}


def required(group: str, page: str) -> list[str]:
    """A word for what a page leaves to be said: where published files lie, what adapters are of."""
    if page in PUBLISHED:
        return ["model.net.run=FOLDER"]
    if group == "lora" or group == "experiment" and "/lora:" in (CONF / group / f"{page}.yaml").read_text():
        return [f"start_from={a_finished_run()}"]
    published = group == "experiment" and "first_stage: taef2" in (CONF / group / f"{page}.yaml").read_text()
    return ["model.first_stage.run=FOLDER"] if published else []


def scope(config: str, group: str, page: str) -> tuple[DictConfig, list[str]]:
    """A page in a config, and the dotted keys of its leaves (interpolations and lists are leaves)."""
    cfg = composed(*([f"{group}={page}"] if group else []), *required(group, page), config=config)
    if group in SCOPES:
        cfg = OmegaConf.masked_copy(cfg, SCOPES[group])
    OmegaConf.set_struct(cfg, True)
    raw = OmegaConf.to_container(cfg)
    if group in WHOLE:
        own = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{page}.yaml"))
        return cfg, list(leaves({k: v for k, v in own.items() if k not in ("defaults", "hydra")}))
    if group:
        return cfg, [f"{group}.{key}" for key in leaves(raw[group])]
    groups = {path.name for path in CONF.iterdir()}
    return cfg, list(leaves({key: value for key, value in raw.items() if key not in groups}))


def leaves(node: dict[str, Any]) -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from (f"{key}.{inner}" for inner in leaves(value))
        else:
            yield key


@pytest.fixture(scope="module")
def seen() -> dict[str, set[tuple]]:
    """What each test has looked at, of all pages."""
    return defaultdict(set)


def unseen(cfg: DictConfig, keys: list[str], seen: set[tuple]) -> Iterator[str]:
    """Those of which no page before had the same argument of the same object with such a value."""
    for key in keys:
        parent, name = parent_of(cfg, key)
        values = OmegaConf.to_container(parent)
        one = values.get("_target_", key), name, type(values[name]), OmegaConf.is_interpolation(parent, name)
        if one not in seen:
            yield key
        seen.add(one)


def wrongs(value: Any) -> Iterator[Any]:
    """Of another type, negative, empty."""
    yield ""
    if isinstance(value, dict):
        yield "abc"
    elif isinstance(value, list):
        yield from ("abc", [-1], [""])
    elif isinstance(value, str):
        yield 3.5
    elif value is None:
        yield from (-1, True)
    elif isinstance(value, bool):
        yield from ("abc", -1)
    else:
        yield from ("abc", -1, True if isinstance(value, int) else float("nan"))


@pytest.mark.parametrize(("config", "group", "page"), PAGES, ids=lambda part: part or "-")
def test_a_page_fits_and_no_leaf_of_it_takes_nonsense(
    config: str, group: str, page: str, seen: dict[str, set[tuple]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atelier.core.job.seconds_left", lambda: 60.0)  # of budget.until=job_end, in a SLURM job
    cfg, keys = scope(config, group, page)
    preflight.check(cfg)
    assert keys or page == "shapes_flow"  # another page by another name
    words = [*([f"{group}={page}"] if group else []), *required(group, page)]
    for key in unseen(cfg, keys, seen["nonsense"]):
        parent, name = parent_of(cfg, key)
        old, offered = OmegaConf.to_container(parent)[name], {}
        for wrong in wrongs(OmegaConf.to_container(OmegaConf.create([parent[name]]))[0]):
            parent[name] = wrong
            if (key, str(wrong)) in RIGHT:
                preflight.check(cfg)
            else:
                error = error_of(lambda: preflight.check(cfg), (key, wrong))
                assert error.line().startswith(f"error: {key}"), (key, wrong, error.line())
                offered.setdefault(error.fix, error)
        parent[name] = old
        for error in offered.values():
            fixes.changed(error, cfg, *words, config=config)
    preflight.check(cfg)


@pytest.mark.parametrize(("config", "group", "page"), [page for page in PAGES if page[1] not in WHOLE])
def test_a_misspelt_key_is_named(config: str, group: str, page: str, seen: dict[str, set[tuple]]) -> None:
    """On the command line, where Hydra complains, and in a page, where nothing but preflight does."""
    cfg, keys = scope(config, group, page)
    parser = OverridesParser.create()
    for key in unseen(cfg, keys, seen["misspelt"]):
        if ".dropped." in key:  # whose keys are names of sources: the embedder knows them
            continue
        given = parser.parse_overrides([f"{key}x=1"])
        line = line_of(partial(ConfigLoaderImpl._apply_overrides_to_config, given, cfg))
        assert line.startswith(f"error: {key}x=1: "), line
        parent, name = parent_of(cfg, key)
        OmegaConf.set_struct(cfg, False)
        old = OmegaConf.to_container(parent)[name]
        parent[f"{name}x"] = old
        line = line_of(lambda: preflight.check(cfg))
        assert line.startswith(f"error: {key}x="), line
        del parent[f"{name}x"]
        OmegaConf.set_struct(cfg, True)


@pytest.mark.parametrize(
    "key", ["evall.n_samples", "eval.n_sample", "model.optimizer.lrr", "callbacks.emma.ramp", "metrics.netx"]
)
def test_a_misspelt_key_in_an_experiment_is_named(key: str) -> None:
    """Such a page may add keys, and Hydra lets it."""
    cfg = composed()
    OmegaConf.set_struct(cfg, False)
    OmegaConf.update(cfg, key, 3)
    assert line_of(lambda: preflight.check(cfg)).startswith(f"error: {key.partition('.')[0]}")


def parent_of(cfg: DictConfig, key: str) -> tuple[DictConfig, str]:
    *path, name = key.split(".")
    for part in path:
        cfg = cfg[part]
    return cfg, name


# What is wrong with a command line


@pytest.mark.parametrize(("given", "line"), {
    "model=ddmp": "error: model=ddmp: there is no such page in conf/model. Fix: model=ddpm",
    "data=mnsit": "error: data=mnsit: there is no such page in conf/data. Fix: data=mnist",
    "experiment=shapes_ddmp": "there is no such page in conf/experiment. Fix: experiment=shapes_ddpm",
    "model=": "Fix: model=adm|ae|autoencoder_kl|cgan|",
    "model=null": "Fix: model=adm|ae|autoencoder_kl|cgan|",
    "modle=vae": "error: modle=vae: there is no such key. Fix: model=vae",
    "model.lrr=1": "error: model.lrr=1: there is no such key. Fix: model.optimizer.lr=1",
    "data.bach_size=8": "Fix: data.batch_size=8",
    "trainer.gradient_clip_val=1": "Fix: model.grad_clip=",
    "trainer.accumulate_grad_batches=2": "Fix: data.batch_size=",
    "hydra.run.dri=x": "error: hydra.run.dri=x: there is no such key.",
    "data.image_size=1,2": "Fix: python train.py -m data.image_size=1,2",
    "data.batch_size=[1,": "error: data.batch_size=[1,: it cannot be parsed.",
    "data.seed=???": "error: data.seed=???: it has no value. Fix: data.seed=VALUE",
    "data.seed=${oc.env:NOPE}": "error: data.seed=${oc.env:NOPE}: NOPE is not set. Fix: export NOPE=VALUE",
    "data.seed=${data.limt}": "error: data.seed=${data.limt}: there is no such key. Fix: data.seed=VALUE",
    "data.seed=${data.seed}": "recursive interpolation",
    "choices.model=vae": "Fix: model=vae",
    "model.net.multipliers=[1,-2]": "item 1: it must be greater than 0",
    "model.net.multipliers=[]": "error: model.net.multipliers=[]: ",
    "model.net.attention=[x]": "item 0: it must be an integer",
    "model.net.width=5": "error: model.net.width=5: it must be a multiple of 2",
    "seed=4294967296": "it must be less than 4294967296",
    "model.optimizer.betas=[0.9]": "error: model.optimizer.betas=[0.9]: ",
    "model.optimizer.betas=[0.9,1]": "item 1: it must be less than 1",
    "model.optimizer.lr=1e-3x": "it must be a number",
    "data.image_size=63.5": "it must be an integer",
    "data.batch_size={a: 1}": "it must be an integer",
    "data.image_channels=true": "it must be one of [3]",
    "budget.minutes=inf": "it must be a finite number",
    "data.batch_size=0": "it must be greater than 0",
    "data.n_classes=10": "error: data.n_classes=10: it must be 36. Fix: data.n_classes=36",
    "data.conditions=[labl]": "it must be 'label', 'attributes' or 'text'",
    "start_from=outputs/nothing": "start_from=outputs/nothing: no finished run lies there. Fix: start_from=DIR",
    "model.net=abc": "error: model.net=abc: it must be an instance of DenoisingNet",
    "model.net._target_=atelier.nets.vae.VAENet": "VAENet: it makes no DenoisingNet. Fix: model=dit net@model.net=",
    "model.embedder._target_=atelier.nets.unet.UNet": "unet.UNet: it makes no Embedder. Fix: model=ldm embedder@",
    "model.objective.target=v": "it must be an instance of Target. Fix: target@model.objective.target=v",
    "model.sampler=heun": "model.sampler=heun: it must be built: a Sampler. Fix: sampler@model.sampler=heun",
    "model.sampler=huen": "Fix: sampler@model.sampler=heun",
    "model.guider=none": "Fix: guider@model.guider=none",
    "model.objective.weighting=zzz": "Fix: weighting@model.objective.weighting=edm|flow_error|learned|min_snr|pla",
    "model=stylegan2 model.augment=ada": "Fix: augment@model.augment=ada",
    "model=stylegan2 model.augment=zzz": "Fix: model.augment=null",
    "model.sampler._target_=atelier.nets.unet.UNet": "it makes no Sampler. Fix: sampler@model.sampler=ddim|ddpm|",
    "model.objective.density=uniform": "Fix: time_distribution@model.objective.time_distribution=uniform",
    "model.objective.space=flow": "Fix: weighting@model.objective.weighting=flow_error",
    "model.objective.floor=0.2": "Fix: model.objective.weighting.time_floor=0.2",
    "model.objective.mean=1": "Fix: model.objective.time_distribution.logit_mean=1",
    "model.guidance=3": "model.guidance=3: it is called model.guider.guidance now. Fix: model.guider.guidance=3",
    "model.drop=0.1": "model.drop=0.1: it is called model.cond_dropout now. Fix: model.cond_dropout=0.1",
    "model.optimizer._partial_=false": "error: model.optimizer._partial_=False: it makes no Callable",
    "metrics.names=[fdi]": "Fix: metrics.names=[fid]",
    "budget.images=-1": "error: budget.images=-1: ",
    "data.budget=-1": "error: data.budget=-1: ",
}.items())  # fmt: skip
def test_a_mistake_is_one_line(given: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [given] if "{" in given else given.split()
    monkeypatch.setattr("sys.argv", ["train.py", *words])
    monkeypatch.delenv("NOPE", raising=False)
    assert line in refused(*words)


# Names of before

CLASSES = sorted({name for names in renamed.KEYS for name in names.split()})


@functools.cache
def nodes() -> dict[str, tuple[str, str]]:
    """Class or function that the pages of models and sets call -> a word and the key where it stands."""
    words = ["data=superres", *(f"model={page}" for page in pages("model"))]
    found = [(word, key, value) for word in words for key, value in chosen_keys("train", (word,)).items()]
    return {
        value.rpartition(".")[2]: (word, key.removesuffix("._target_"))
        for word, key, value in found
        if key.endswith("._target_")
    }


@pytest.mark.parametrize("name", CLASSES)
def test_an_argument_of_before_is_told_its_name_of_today(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    word, place = nodes()[name]
    keys = next(keys for names, keys in renamed.KEYS.items() if name in names.split())
    monkeypatch.setattr("sys.argv", ["train.py", word])
    for old, new in keys.items():
        assert offers.renamed(f"{place}.{old}", "3") == (f"{place}.{new}", f"{place}.{new}=3")
        assert f"{place}.{new}" in chosen_keys("train", (word,))  # so that the fix composes
        assert f"{place}.{old}" not in chosen_keys("train", (word,))


def test_the_channels_of_every_set_are_told_their_name_of_today(monkeypatch: pytest.MonkeyPatch) -> None:
    for page in pages("data"):
        monkeypatch.setattr("sys.argv", ["train.py", f"data={page}"])
        assert offers.renamed("data.channels", "3") == ("data.image_channels", "data.image_channels=3")


@pytest.mark.parametrize("key", offers.RENAMED)
def test_what_does_the_same_now_composes(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py"])
    value = "uniform" if key.endswith("density") else "2"
    today, fix = offers.renamed(key, value)
    assert fix in (today, f"{today}={value}") and composed(fix)


@pytest.mark.parametrize("given", [
    "logger.group=x", "callbacks.ema.decay=0.9", "model.net.drop=0.1", "model=ddpm model.base=3",
    "model=gan model.objective.floor=1", "model=ddpm model.objective.mean=1", "model=vae model.penalty_weight=1",
    "model=gan,vae model.drop=0.1",
])  # fmt: skip
def test_a_key_that_never_was_has_no_name_of_today(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", *given.split()])
    assert offers.renamed(*given.split()[-1].split("=")) is None


@pytest.mark.parametrize(("given", "line"), {
    "model=autoencoder_kl model.penalty_weight=1": "it is called model.kl_weight now. Fix: model.kl_weight=1",
    "model=vqgan model.penalty_weight=1": "it is called model.codebook_weight now. Fix: model.codebook_weight=1",
    "experiment=shapes_vqgan model.penalty_weight=1": "Fix: model.codebook_weight=1",
    "model=vqvae model.net.quantizer.decay=0.9": "Fix: model.net.quantizer.ema_decay=0.9",
    "model=cgan model.discriminator.spectral=true": "Fix: model.discriminator.norm=spectral",
    "model=cgan model.discriminator.norm=true": "true: it is called spectral now. Fix: model.discriminator.norm=sp",
    "model=cgan model.discriminator.spectral=False": "Fix: model.discriminator.norm=none",
    "model=srresnet model.net.batch_norm=true": "Fix: model.net.norm=batch",
    "data.task=recast": "data.task=recast: it is called attribute_transfer now. Fix: data.task=attribute_transfer",
}.items())  # fmt: skip
def test_a_command_of_before_is_told_in_the_words_of_today(
    given: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = given.split()
    monkeypatch.setattr("sys.argv", ["train.py", *words])
    told = refused(*words)
    assert line in told
    preflight.check(composed(*words[:-1], told.partition("Fix: ")[2]))


@pytest.mark.parametrize(("word", "line"), {
    "+data.typo=1": "error: +data.typo=1: keys are neither added nor removed.",
    "++seed=1": "Fix: seed=1",
    "~seed": "error: ~seed=: keys are neither added nor removed. Fix: seed=VALUE",
    "~model.grad_clip": "Fix: model.grad_clip=VALUE",
    "--seed=3": "error: --seed=3: keys are written without dashes. Fix: seed=3",
    "--batch-size": "Fix: data.batch_size=VALUE",
    "hydra.callbacks.summary._target_=builtins.open": "error: hydra.callbacks.summary._target_=builtins.open",
}.items())  # fmt: skip
def test_a_word_that_hydra_would_take_is_refused(word: str, line: str) -> None:
    assert line in line_of(lambda: messages.check_words([word]))


@pytest.mark.parametrize("word", ["--cfg", "--multirun", "-m", "--info=all", "seed=3", "hydra.run.dir=x", "model=vae"])
def test_a_word_that_is_right_passes(word: str) -> None:
    messages.check_words([word])


DANGEROUS = """
os.system os.popen os.remove os.execv os.kill os.environ.get posix.system subprocess.run subprocess.Popen
subprocess.check_output shutil.rmtree shutil.move builtins.open builtins.eval builtins.exec builtins.__import__
builtins.compile builtins.getattr pickle.load pickle.loads marshal.loads shelve.open pty.spawn socket.socket
urllib.request.urlopen urllib.request.urlretrieve http.server.test webbrowser.open code.interact runpy.run_path
importlib.import_module ctypes.CDLL tempfile.mktemp pathlib.Path torch.load torch.save torch.hub.load torch.jit.load
torch.hub.download_url_to_file torch.utils.cpp_extension.load_inline torch.nn.Linear numpy.load pandas.read_pickle
hydra.utils.instantiate hydra.utils.call omegaconf.OmegaConf.load yaml.unsafe_load lightning.pytorch.Trainer
lightning.fabric.utilities.cloud_io._load wandb.init atelier.runs.pretrained.subprocess.run atelier.runs.folders.os
atelier.runs.build.instantiate atelier.runs.pretrained.require
atelier.cli.messages.run atelier.data.published.shutil.rmtree atelier.data.cifar10.pickle
atelier.data.cifar10.pickle.load atelier.data.base.DataLoader atelier.checkpoints.store.write_text
atelier.checkpoints.store.os.remove atelier.metrics.features.torch.load atelier.models.base.LightningModule
atelier.optim.torch.load atelier..os.system builtins atelier
""".split()


@pytest.mark.parametrize("place", ["model.net", "model", "logger", "callbacks.ema"])
def test_a_config_calls_nothing_dangerous(place: str) -> None:
    """At a place that takes a class, and at places where anything might be built."""
    cfg = composed()
    assert len(DANGEROUS) > 40
    node = OmegaConf.select(cfg, place)
    for path in DANGEROUS:
        node._target_ = path
        line = line_of(lambda: preflight.check(cfg))
        assert line.startswith(f"error: {place}."), line


def test_arguments_by_place_are_refused() -> None:
    """_args_ would pass values that no annotation is checked against."""
    cfg = composed()
    OmegaConf.set_struct(cfg, False)
    cfg.model.net._args_ = [1]
    assert "error: model.net._args_=" in line_of(lambda: preflight.check(cfg))


def test_an_object_behind_an_interpolation_is_checked() -> None:
    cfg = composed()
    OmegaConf.set_struct(cfg, False)
    cfg.model.net = "${budget.net}"
    cfg.budget.net = {"_target_": "builtins.open", "file": "x"}
    assert "error: budget.net" in line_of(lambda: preflight.check(cfg))


class Other(nn.Module):
    """A net of another name, with other names for its arguments."""

    def forward(self, noisy: torch.Tensor, t: torch.Tensor, c: object) -> torch.Tensor:
        return noisy


class NoNet(nn.Module):
    """Of one argument, as an autoencoder has."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize(("kind", "fits"), [(Other, True), (NoNet, False)])
def test_a_net_is_known_by_what_it_takes(kind: type, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kind, "__module__", "atelier.nets.unet")
    monkeypatch.setattr("atelier.nets.unet.Mine", kind, raising=False)
    cfg = composed("model=flow")
    OmegaConf.set_struct(cfg, False)
    cfg.model.net = {"_target_": "atelier.nets.unet.Mine"}
    if fits:
        return preflight.check(cfg)
    assert "Mine: it makes no DenoisingNet. Fix: model=dit net@model.net=" in line_of(lambda: preflight.check(cfg))


@pytest.mark.parametrize("key", ["model", "trainer", "logger", "metrics", "callbacks", "callbacks.clock"])
def test_a_page_without_an_object_is_refused(key: str) -> None:
    cfg = composed()
    parent, name = parent_of(cfg, key)
    parent[name] = None
    assert line_of(lambda: preflight.check(cfg)).startswith(f"error: {key}.")


# Training: every page, every choice that a page offers

BRIEF = [
    "trainer=cpu", "metrics=none", "data.batch_size=4", "budget.images=8", "eval.n_samples=4", "eval.n_real=4",
    "eval.batch_size=4", "eval.every_images=1000", "callbacks.grids.n=4", "trainer.precision=32-true",
]  # fmt: skip
FEW = ["data.n_train_scenes=20", "data.n_test_scenes=8"]
SMALL = {
    "width": 4,
    "cond_dim": 8,
    "dim": 8,
    "noise_dim": 40,
    "multipliers": [1, 2],
    "steps": 2,
    "n_blocks": 1,
    "attention": [],
    "head_width": 4,
}


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs set signal handlers and a variable that the next test must not see."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    os.environ.pop("PL_GLOBAL_SEED", None)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def shrunk(node: Any, prefix: str, kept: set[str]) -> None:
    """The nets of a config at a few thousand weights, whatever family."""
    for key in list(node) if isinstance(node, DictConfig) else ():
        if isinstance(node[key], DictConfig):
            shrunk(node[key], f"{prefix}.{key}", kept)
        elif key in SMALL and f"{prefix}.{key}" not in kept and (key, node[key]) != ("cond_dim", None):
            node[key] = SMALL[key]


def trained(folder: Path, *overrides: str) -> dict[str, Any]:
    """Two steps of a config with small nets; gives summary.json."""
    cfg = composed(*overrides, run_dir=folder)
    OmegaConf.set_struct(cfg, False)
    shrunk(cfg.model, "model", {word.split("=")[0] for word in overrides})
    entry.train(cfg)
    assert (folder / "weights.safetensors").exists() and list((folder / "checkpoints").glob("*.ckpt"))
    return json.loads((folder / "summary.json").read_text())


def test_channels_last_is_another_memory_format_of_the_same_net(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats, weights = [], []
    original = preflight.match

    def watched(model: nn.Module, data: Any) -> None:
        original(model, data)
        layers = [layer.weight for layer in model.modules() if isinstance(layer, nn.Conv2d)]
        formats.append(all(w.is_contiguous(memory_format=torch.channels_last) for w in layers))

    monkeypatch.setattr(preflight, "match", watched)
    for last in ("false", "true"):
        trained(tmp_path / last, "model=cgan", *BRIEF, *FEW, f"channels_last={last}")
        weights.append(load_file(tmp_path / last / "weights.safetensors"))
    assert formats == [False, True]
    apart = torch.cat([(weights[1][name] - value).abs().flatten() for name, value in weights[0].items()])
    assert apart.median() < 1e-6 and apart.max() < 5e-3  # two steps of 1e-3 to either side where a gradient is nothing


@pytest.fixture(scope="session")
def stands_on(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Names the runs that a model of these words stands on, each of which is trained at the first need of it."""
    made: dict[tuple, Path] = {}

    def name(*words: str) -> list[str]:
        cfg = composed(*words)
        if cfg.choices.model in PUBLISHED:
            return pipeline.made_for(cfg.choices.model, tmp_path_factory.mktemp("pipeline"))
        plain = [f"model={cfg.choices.model}", f"data={cfg.choices.data}", f"data.image_size={cfg.data.image_size}"]
        choices = HydraConfig.get().runtime.choices.items()
        plain += [f"{group}={page}" for group, page in choices if page and "@model.objective." in group]
        sections = {part: build.section(cfg, part) for part in build.parts(cfg)}
        parts = {part: section.experiment for part, section in sections.items() if "experiment" in section}
        same = [word for word in words if word.startswith("data.")]
        for experiment in parts.values():
            key = (experiment, cfg.choices.data, cfg.data.image_size)
            if key not in made:
                made[key] = tmp_path_factory.mktemp("part")
                recipe = pretrained._recipe(CONF / "experiment" / f"{experiment}.yaml", key[1])[1]
                own = (recipe, f"data={key[1]}", *BRIEF, *same, f"data.image_size={key[2]}")
                trained(made[key], *own)
        size = cfg.choices.data, cfg.data.image_size
        files = [written(tmp_path_factory.mktemp(part), small()) for part in sections if part not in parts]  # of taef2
        found = [f"model.first_stage.run={folder}" for folder in files]
        found += [f"model.{part}.run={made[(experiment, *size)]}" for part, experiment in parts.items()]
        if "lora" not in cfg:
            return found
        base = tmp_path_factory.mktemp("base")
        few = FEW if cfg.choices.data == "shapes" else same
        trained(base, *plain, *few, *BRIEF, *found)
        return [*found, f"start_from={base}"]

    return name


@pytest.mark.parametrize("page", pages("model"))
def test_a_model_trains(page: str, tmp_path: Path, stands_on: Callable) -> None:
    given = [f"model={page}", *FEW, *task(CONF / "model" / f"{page}.yaml")]
    told = trained(tmp_path, *given, *BRIEF, *stands_on(*given))
    assert told["images_seen"] == 8 and any("judge/valid" in name or "accuracy" in name for name in told["metrics"])


@pytest.mark.parametrize("page", pages("net"))
def test_a_net_trains(page: str, tmp_path: Path) -> None:
    words = ["model=dit", f"net@model.net={page}"]
    small = [f"model.net.width={4 * composed(*words).model.net.heads}", "model.net.n_layers=2"]
    assert trained(tmp_path, *words, *small, *FEW, *BRIEF)["images_seen"] == 8


@pytest.mark.parametrize("page", pages("lora"))
def test_adapters_train(page: str, tmp_path: Path, stands_on: Callable) -> None:
    words = ["model=ldm", *FEW, f"lora={page}"]
    assert trained(tmp_path, *words, *BRIEF, *stands_on(*words))["images_seen"] == 8
    assert (tmp_path / "lora.safetensors").exists()


DIFFUSION = ("ddpm", "iddpm", "edm", "flow", "flow_tiny", "ldm")
CHOICES = {  # a group that every page of diffusion can swap -> where it stands
    **{group: f"objective.{group}" for group in ("schedule", "target", "weighting", "time_distribution")},
    "sampler": "sampler",
    "guider": "guider",
}


def chosen(**pages: str) -> list[str]:
    return [f"{group}@model.{CHOICES[group]}={page}" for group, page in pages.items()]


@pytest.fixture(scope="module")
def lent() -> dict[str, nn.Module]:
    """Part of a model of 8 px -> what an untrained run lends."""
    small = ["data.image_size=8", "model.net.width=4"]
    pages = {"first_stage": ["model=vae", "model.net.n_downs=1"]}
    pages["guider.classifier"] = ["model=noisy_classifier", "model.net.multipliers=[1]", "model.net.attention=[]"]
    return {part: build.untrained_part(composed(*words, *small), {}) for part, words in pages.items()}


@pytest.mark.parametrize("group", CHOICES)
@pytest.mark.parametrize("page", DIFFUSION)
def test_every_page_of_diffusion_takes_every_page_of_a_group(page: str, group: str, lent: dict[str, nn.Module]) -> None:
    """It composes, builds, has a loss with gradients and samples; or one line says what will do."""
    for choice in pages(group):
        words = [f"model={page}", *FEW, "data.image_size=8", *chosen(**{group: choice})]
        cfg = composed(*words)
        preflight.check(cfg)
        OmegaConf.set_struct(cfg, False)
        shrunk(cfg.model, "model", set())
        parts = {part: lent[part] for part in build.parts(cfg)}
        ends_in_noise = any(name in cfg.model.objective.schedule._target_ for name in ("Flow", "ZeroTerminal"))
        if cfg.model.objective.target._target_.endswith("Epsilon") and ends_in_noise:
            line = line_of(lambda cfg=cfg, parts=parts: build.on_parts(cfg, parts), words)
            assert line.endswith("Fix: target@model.objective.target=flow")
            continue
        loss = cfg.model.objective.get("loss", "simple")  # latents have no bound
        if loss != "simple" and not cfg.model.objective.time_distribution._target_.endswith("Uniform"):
            line = line_of(lambda cfg=cfg, parts=parts: build.on_parts(cfg, parts), words)
            assert line.endswith("Fix: time_distribution@model.objective.time_distribution=uniform")
            continue
        if page == "ldm" and choice == "classifier":
            line = line_of(lambda cfg=cfg, parts=parts: build.on_parts(cfg, parts), words)
            assert line.startswith("error: model.guider.classifier=3x8x8: it was trained on images 3x8x8, the model de")
            continue
        if choice == "dual":  # which wants an image beside what is denoised
            line = line_of(lambda cfg=cfg, parts=parts: build.on_parts(cfg, parts), words)
            assert line.startswith("error: model.guider.image_guidance=1.5: UNet of this run sees no image beside what")
            continue
        model, batch = build.on_parts(cfg, parts), build.data(cfg).test_batch(0, 3)
        model.training_step(batch).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        assert any(p.grad is not None and p.grad.any() for p in model.net.parameters())
        with sampling_mode(model, {}):
            images = model.sample(model.condition(batch, ""), ImageRngs(0, 0, 3))
        assert images.shape == (3, 3, 8, 8) and images.isfinite().all()


def test_what_the_pages_of_diffusion_choose() -> None:
    """A group that a page does not choose would be tested above by its own page alone."""
    for page in DIFFUSION:
        found = {(group, place) for group, place, at in places() if at == page}
        own = {(group, f"model.{group}") for group in ("first_stage", "embedder", "planes") if page == "ldm"}
        assert found == own | {(group, f"model.{place}") for group, place in CHOICES.items()}


@pytest.mark.parametrize(("page", "choices", "options"), [
    ("flow", {"target": "eps", "weighting": "plain", "time_distribution": "uniform", "schedule": "linear",
              "sampler": "ddpm"}, []),
    ("ddpm", {"target": "x0", "weighting": "min_snr", "time_distribution": "logit_normal", "schedule": "cosine",
              "sampler": "ddpm"}, ["model.sampler.variance=large", "model.sampler.spacing=leading"]),
    ("flow_tiny", {"target": "v", "weighting": "min_snr", "time_distribution": "uniform", "schedule": "scaled_linear",
                   "sampler": "ddim"}, ["model.sampler.eta=1.0", "model.sampler.spacing=linspace"]),
    ("ddpm", {"target": "flow", "weighting": "min_snr", "time_distribution": "logit_normal", "schedule": "flow",
              "sampler": "heun"}, ["model.sampler.grid=karras"]),
    ("flow", {"target": "x0", "weighting": "plain", "time_distribution": "uniform", "schedule": "flow",
              "sampler": "heun"}, ["model.sampler.grid=uniform"]),
    ("ldm", {"target": "v", "weighting": "plain", "sampler": "euler"}, ["model.sampler.grid=uniform"]),
    ("ddpm", {"schedule": "sigmoid", "target": "v", "weighting": "soft_min_snr",
              "time_distribution": "log_normal"}, []),
    ("ddpm", {"schedule": "edm", "target": "edm", "weighting": "learned", "time_distribution": "log_normal",
              "sampler": "heun"}, []),
    ("ddpm", {"schedule": "zero_terminal", "target": "v", "weighting": "edm", "sampler": "ddpm"},
     ["model.sampler.steps=5"]),
    ("ddpm", {"schedule": "cosine"}, ["model.objective.loss=vlb"]),
    ("flow", {"schedule": "cosine", "sampler": "ddim"}, []),
    ("ldm", {"schedule": "cosine", "sampler": "ddim", "guider": "none"}, []),
], ids=lambda part: "-".join(part) if isinstance(part, dict) else str(part))  # fmt: skip
def test_the_choices_of_diffusion_train(
    page: str, choices: dict[str, str], options: list[str], tmp_path: Path, stands_on: Callable
) -> None:
    words = [f"model={page}", *FEW, *chosen(**choices), *options]
    assert trained(tmp_path, *words, *BRIEF, *stands_on(f"model={page}", *FEW))["images_seen"] == 8


@pytest.mark.parametrize("overrides", [
    ["model=ddpm", "sampler@model.sampler=heun", "model.net.heads=2", "model.net.attention=[8]",
     "model.net.checkpointing=true"],
    ["model=flow", "model.optimizer.decay=linear", "model.grad_clip=null", "data.conditions=[]",
     "guider@model.guider=none"],
    ["model=flow", "model.optimizer.decay=constant", "model.cond_dropout=0", "data.conditions=[label]",
     "model.guider.guidance=0"],
    ["model=cgan", "model.r1_gamma=0", "model.n_critic=2", "model.generator_optimizer.decay=cosine"],
    ["model=cgan", "model.generator.conditioning=norm", "model.discriminator.conditioning=classifier",
     "augment@model.augment=ada"],
    ["model=cgan", "model.discriminator.conditioning=concatenation", "model.discriminator.norm=spectral",
     "adversarial@model.loss=hinge", "model.penalty_every=1"],
    ["model=cgan", "adversarial@model.loss=wasserstein", "model.gp_weight=10", "model.penalty_every=2"],
    ["model=cgan", "adversarial@model.loss=least_squares", "data.conditions=[]", "augment@model.augment=diffaugment"],
    ["model=dcgan", "model.discriminator.norm=spectral", "model.r1_gamma=1", "adversarial@model.loss=relativistic"],
    ["model=dcgan", "model.discriminator.norm=none", "model.r2_gamma=1", "model.penalty_every=1"],
    ["model=stylegan2", "data.conditions=[]", "model.style_mixing_prob=0", "model.path_weight=0",
     "augment@model.augment=ada"],
    ["model=stylegan2", "adversarial@model.loss=relativistic", "model.path_every=1", "model.r1_every=1"],
    ["model=progan", "data.conditions=[]", "model.microbatches=[1,2]", "model.stable_images=4", "model.fade_images=4"],
    ["model=progan", "adversarial@model.loss=relativistic", "model.gp_weight=0", "model.r1_gamma=1"],
    ["model=stylegan", "data.conditions=[]", "model.style_mixing_prob=0", "model.stable_images=4",
     "model.fade_images=0"],
    ["model=r3gan", "data.conditions=[]", "model.generator.n_blocks=2", "augment@model.augment=ada"],
    ["model=vae", "model.beta=0", "logger=tensorboard", "callbacks.ema.half_lives=[]"],
    ["model=vae", "data.test_split=unseen", "data.task=inpaint", "data.flip=true", "checkpoint.best=recon/psnr"],
    ["model=vae", "data.limit=3", "data.num_workers=1", "objective=recon/psnr", "trainer.profiler=simple"],
    ["model=vae", "model.beta_warmup_images=8", "likelihood@model.likelihood=bernoulli", "model.free_bits=0.5"],
    ["model=ae", "likelihood@model.likelihood=learned", "model.net.patch_size=2"],
    ["model=vqvae", "quantizer@model.net.quantizer=fsq", "model.net.n_downs=0"],
    ["model=vqvae", "model.net.quantizer.update=gradient", "model.net.quantizer.kmeans_init=false"],
    ["model=vqvae", "model.net.quantizer.dead_code_threshold=0", "model.net.quantizer.n_codes=4"],
    ["model=autoencoder_kl", "model.discriminator.norm=instance", "model.discriminator_start=0",
     "model.adversarial_start=4"],
    ["model=autoencoder_kl", "model.perceptual=null", "model.net.attention=[8]", "model.net.middle_attention=false"],
    ["model=vqgan", "quantizer@model.net.quantizer=fsq", "model.discriminator_start=0", "model.adversarial_start=0"],
    ["model=vqgan", "model.net.quantizer.update=gradient", "model.net.norm_groups=1", "model.net.dropout=0.1"],
    ["model=glow", "data.conditions=[]", "model.temperature=0"],
    ["model=realnvp", "data.conditions=[label]", "model.net.n_levels=1"],
    ["model=cgan", "model.categorical_codes=[2,2]", "adversarial@model.loss=hinge",
     "model.generator.conditioning=norm"],
    ["model=dcgan", "model.categorical_codes=[3,4]", "model.generator.mapping_dim=8", "model.discriminator.norm=none",
     "model.discriminator.mbstd_group_size=2"],
    ["model=cyclegan", "data.task=fill", "model.generator_a2b.norm=instance", "model.generator_a2b.padding=reflect",
     "model.generator_a2b.patch_size=1", "model.pool_a.size=0", "adversarial@model.loss=relativistic"],
    ["model=cyclegan", "data.task=fill", "model.generator_b2a.residual=false", "model.generator_b2a.n_downs=2",
     "model.generator_b2a.patch_size=1",
     "model.identity_weight=0", "adversarial@model.loss=non_saturating"],
    ["model=cut", "data.task=fill", "model.direction=b2a", "model.identity_weight=0", "model.n_patches=3"],
    ["model=cut", "data.task=fill", "model.patch_weight=0", "adversarial@model.loss=relativistic"],
    ["model=cut", "data.task=fill", "model.generator.norm=instance", "model.generator.padding=reflect",
     "model.generator.patch_size=1", "model.generator.n_downs=2", "model.generator.residual=false",
     "adversarial@model.loss=relativistic_average"],
    ["model=rrdbnet", "data.task=low_resolution", "model.pixel_loss=l2", "perceptual@model.perceptual=pyramid"],
    ["model=pix2pix", "data.task=label_map", "model.generator.norm=batch", "model.generator.n_dropout=0",
     "model.generator.source_levels=7", "model.discriminator.norm=batch"],
    ["model=pix2pix", "data.task=label_map", "model.generator.norm=none", "adversarial@model.loss=relativistic"],
    ["model=stargan", "data.task=attribute_transfer", "model.generator.residual=true", "model.identity_weight=10",
     "adversarial@model.loss=relativistic", "model.gp_weight=0", "model.r1_gamma=1", "model.n_critic=1"],
    ["model=srresnet", "data.task=low_resolution", "model.net.kernel=9", "model.net.norm=batch"],
    ["model=srresnet", "data.task=low_resolution", "model.net.residual=false", "model.pixel_loss=l2"],
    ["model=vae", "trainer=auto", "trainer.precision=bf16-mixed", "resume=never", "callbacks.ema.ramp=0"],
], ids=lambda given: given[1])  # fmt: skip
def test_the_choices_of_pages_train(overrides: list[str], tmp_path: Path) -> None:
    assert trained(tmp_path, *BRIEF, *FEW, *overrides)["images_seen"] == 8
    if "logger=tensorboard" in overrides:
        assert list(tmp_path.glob("tensorboard/events*"))


def test_the_other_mode_of_the_codec_trains(tmp_path: Path, stands_on: Callable) -> None:
    mode = ["model.codec.mode=mode", "model.codec.scale=2.0", "model.codec.shift=-0.5"]
    trained(tmp_path, "model=ldm", *BRIEF, *FEW, *mode, *stands_on("model=ldm", *FEW))


@pytest.mark.parametrize("page", ["srgan", "esrgan"])
def test_a_discriminator_without_a_perceptual_distance_trains(page: str, tmp_path: Path, stands_on: Callable) -> None:
    small = [f"model={page}", "data.task=low_resolution", *FEW]
    assert trained(tmp_path, *small, *BRIEF, "model.perceptual=null", *stands_on(*small))["images_seen"] == 8


@pytest.mark.parametrize(("page", "n"), {"fast": 4, "overfit": 8, "profiler": 8}.items())
def test_a_debug_page_trains(page: str, n: int, tmp_path: Path) -> None:
    budget = [] if page == "fast" else ["budget.images=8"]
    small = [
        word for word in BRIEF if not word.startswith(("budget.", "data.batch_size" if page == "overfit" else "-"))
    ]
    assert trained(tmp_path, "model=vae", f"debug={page}", *small, *FEW, *budget)["images_seen"] == n
    assert set(pages("debug")) == {"fast", "overfit", "profiler"}


@pytest.fixture
def data_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """A set of a few images in the layout that its page expects; gives the overrides that find it."""

    def make(page: str) -> list[str]:
        root = tmp_path / "set"
        if page == "shapes":
            return FEW
        if page in ("mnist", "fashion_mnist"):
            write_mnist(root, "MNIST" if page == "mnist" else "FashionMNIST")
        elif page == "cifar10":
            write_cifar10(root, monkeypatch)
        elif page == "celeba":
            write_celeba(root)
        elif page == "hugging_face":
            saved(root, 12)
            return [f"data.root={root}", "data.image_size=16", "data.holdout=0.4"]
        else:
            for k in range(12):
                inside = {"pairs": "train", "unpaired": ("trainA", "trainB", "testA", "testB")[k % 4]}
                path = root / inside.get(page, f"train/class{k % 2}") / f"{k}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                noise = np.random.default_rng(k).integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(noise).save(path)
                if page == "captioned":
                    Image.fromarray(noise[..., [0, 1, 2, 0]]).save(path)  # which has alpha
                    path.with_suffix(".txt").write_text(f"number {k}")
            return [f"data.root={root}", f"data.cache={tmp_path / 'cache'}", "data.image_size=16", "data.holdout=0.4"]
        return [f"data.root={root}"]

    return make


@pytest.mark.parametrize("page", pages("data"))
def test_a_set_trains(page: str, tmp_path: Path, data_of: Callable[[str], list[str]]) -> None:
    more = ["data.n_classes=2"] if page == "classes" else []
    flat = [f"data.root={tmp_path / 'set' / 'train'}"] if page in ("classes", "images") else []
    trained(tmp_path / "run", f"data={page}", "model=flow", *BRIEF, "data.num_workers=0", *data_of(page), *more, *flat)


def test_stargan_trains_between_class_folders(tmp_path: Path, data_of: Callable[[str], list[str]]) -> None:
    data_of("classes")
    found = [f"data.root={tmp_path / 'set' / 'train'}", "data.n_classes=2", "data.n_attributes=2"]
    words = ["model=stargan", "model.exclusive=true", "data=classes", *BRIEF, *found]
    assert trained(tmp_path / "run", *words)["images_seen"] == 8


@pytest.mark.parametrize("page", pages("experiment"))
def test_an_experiment_trains(
    page: str, tmp_path: Path, data_of: Callable[[str], list[str]], stands_on: Callable
) -> None:
    data = composed(f"experiment={page}").choices.data
    found = [*data_of(data), "data.num_workers=0"]
    if data == "classes":
        found += ["data.n_classes=2", f"data.root={tmp_path / 'set' / 'train'}"]
    if data == "unpaired":
        found += ["data.folders=[trainA,trainB,testA,testB]", "data.image_size=24"]
    words = [f"experiment={page}", *found]
    trained(tmp_path / "run", *words, *BRIEF, *stands_on(*words, *required("experiment", page)))


# What only a built object knows


@pytest.mark.parametrize(("overrides", "line"), [
    (["model=cgan", "data.image_size=24"], "error: data.image_size=24: this net needs a power of two from 8 up. Fix: "),
    (["model=vae", "data.image_size=18"], "18: patches of 1 and 2 halvings need a multiple of 4. Fix: data.image_size"),
    (["model=progan", "model.discriminator.channel_base=8"], "16 px leave no channel of it. Fix: model.discrim"),
    (["model=ae", "model.net.latent_channels=48"], "are no smaller than images (3, 16, 16). Fix: model.net.latent_ch"),
    (["model=glow", "data.image_size=20"], "error: data.image_size=20: 3 halvings need a multiple of 8. Fix: data.im"),
    (["model=vqprior", "model.net.heads=3", "FIRST"], "error: model.net.heads=3: it does not divide the width 4. Fix:"),
    (["model=autoencoder_kl", "model.adversarial_start=1"], "error: model.adversarial_start=1: the discriminator"),
    (["model=flow", "data.image_size=17", "model.net.patch_size=1"], "Fix: data.image_size=18"),
    (["model=flow", "model.net.heads=3"], "error: model.net.heads=3: attention over 8 channels"),
    (["model=flow", "model.net.attention=[5]"], "error: model.net.attention=[5]: no map has size 5"),
    (["model=flow", "target@model.objective.target=eps"], "Fix: target@model.objective.target=flow"),
    (["model=ddpm", "model.sampler.steps=2000"], "the schedule has 1000 levels. Fix: model.sampler.steps=1000"),
    (["model=vae", "eval.every_images=3"], "less than one batch of 4. Fix: eval.every_images=4"),
    (["model=ldm", "model.net.attention=[3]", "FIRST"], "Fix: model.net.attention=[2]"),
    (["model=ldm", "model.first_stage.run=nowhere"], "error: model.first_stage.run=nowhere: "),
    (["model=ldm", "model.first_stage.experiment=nothing"], "error: model.first_stage.experiment=nothing: "),
    (["model=vae", "metrics=mobilenet"], "error: metrics.weights="),
    (["model=cut", "data.task=fill", "data.image_size=18"], "error: data.image_size=18: "),
    (["model=vae", "trainer=cpu", "trainer.precision=16-mixed"], "Fix: trainer.precision=bf16-mixed"),
], ids=lambda part: "" if isinstance(part, str) else part[-1])  # fmt: skip
def test_what_a_constructor_refuses_is_one_line(
    overrides: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stands_on: Callable
) -> None:
    monkeypatch.setattr("atelier.runs.folders.OUTPUTS", tmp_path / "outputs")  # no run is found there
    given = [word for word in overrides if word != "FIRST"]
    given += stands_on(*given, *FEW) if "FIRST" in overrides else []
    found = line_of(lambda: trained(tmp_path / "run", *BRIEF, *FEW, *given))
    assert line in found, found


@pytest.mark.parametrize(("page", "given", "line"), [
    ("classes", ["data.n_classes=3"], "Fix: data.n_classes=2"),
    ("cifar10", ["data.n_classes=7"], "error: data.n_classes=7: "),
    ("mnist", ["data.n_classes=12"], "error: data.n_classes=12: "),
    ("images", ["data.conditions=[label]"], "error: data.conditions="),
    ("images", ["data.conditions=[label]", "data.n_classes=3"], "error: model=DDPM: DDPM needs label, ImageFolder"),
    ("celeba", ["data.n_attributes=39"], "error: data.n_attributes=39: "),
], ids=lambda part: part if isinstance(part, str) else "")  # fmt: skip
def test_a_set_that_does_not_give_what_was_asked_is_one_line(
    page: str, given: list[str], line: str, tmp_path: Path, data_of: Callable[[str], list[str]]
) -> None:
    flat = [f"data.root={tmp_path / 'set' / 'train'}"] if page in ("classes", "images") else []
    words = [f"data={page}", "model=flow", *BRIEF, "data.num_workers=0", *data_of(page), *flat, *given]
    found = line_of(lambda: trained(tmp_path / "run", *words))
    assert line in found, found
