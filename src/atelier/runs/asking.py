"""A run that is asked for pictures, as often as one likes: sample.py, `atelier.load` and the page to play with."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from atelier.core.errors import UserError, nearest
from atelier.core.precision import Precision
from atelier.core.ranges import Labels
from atelier.core.words import word
from atelier.models.base import sampling_mode
from atelier.requests import files
from atelier.requests.checks import named, verb, verbs
from atelier.requests.folder import Made
from atelier.requests.request import Request
from atelier.runs import adapted, build, folders, preflight
from atelier.runs.pages import CONF, is_group, keys_of_page, known_keys, member, members, offered
from atelier.runs.trainer import autocast, device

LOADING = ("run", "root", "ema", "adapters", "adapter_weights", "tile")  # keys of sample.py that a run is loaded with
OF_FOLDERS = ("like", "out")  # keys that are about what it writes


def config(given: Mapping[str, Any]) -> DictConfig:
    """The config of sample.py in which these of its keys have values, checked; what they say is never interpolated.

    Args:
        given: value by key; a page is chosen as `sampler`, and changed as `sampler.steps`.

    Raises:
        UserError: there is no such key or page, or a value has another type than the key takes.
    """
    cfg = OmegaConf.load(CONF / "sample.yaml")
    del cfg["defaults"], cfg["hydra"]
    for group in offered("sample"):
        if given.get(group) is not None:
            cfg[group] = _page(group, given[group])
    for key in [key for key in given if not is_group(key)]:
        _refuse_unknown(key, given[key], cfg)
        OmegaConf.update(cfg, key, _plain(given[key]), merge=False)
    preflight.check(cfg)
    return cfg


def _page(group: str, name: str) -> DictConfig:
    if name not in members(group):
        problem = f"there is no such page in conf/{group}"
        raise UserError(group, name, problem, f"{group}={member(group, str(name))}")
    return OmegaConf.load(CONF / group / f"{name}.yaml")


def _refuse_unknown(key: str, value: Any, cfg: DictConfig) -> None:
    above, _, last = key.rpartition(".")
    section = OmegaConf.select(cfg, above) if above else cfg
    if isinstance(section, DictConfig) and last in section:
        return
    group, _, rest = key.partition(".")
    pages = [page for page in members(group) if rest and rest in keys_of_page(group, page)]
    if pages and group not in cfg:
        raise UserError(key, value, f"name the {group} too", f"{group}={pages[0]} {word(key, value)}")
    close = nearest(key, [name for name in known_keys("sample") if "." not in name or name.partition(".")[0] in cfg])
    raise UserError(key, value, "there is no such key", word(close, value) if close else f"leave {key} out")


def _plain(value: Any) -> Any:
    """Paths are text, arrays and their numbers plain ones, and text is itself: `${...}` refers to nothing."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, str | PurePath):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", str(value))
    return value


@dataclass
class ReadyRequest:
    """A request that is checked, and what a picture is told of it.

    Args:
        request: the request.
        words: every key of sample.py with its value, `run` and `images_seen` of the run, and `n` of its sources.
        sources: files that pictures are made of; none: they are of the model, or of test images.
        precision: precision that the model works in.
    """

    request: Request
    words: dict[str, Any]
    sources: list[files.Source]
    precision: Precision

    def pictures(self) -> Iterator[Made]:
        """The pictures, batch by batch or file by file.

        Raises:
            UserError: attributes are needed and none were given, or the only file cannot be read.
        """
        words = self.words
        if self.sources:
            parts = self.request.of_files(words["do"], self.sources, words["first"])
        else:
            parts = self.request.pictures(words["do"], words["first"], words["n"], words["batch_size"])
        yield from self.working(parts)

    def working(self, parts: Iterator[Any]) -> Iterator[Any]:
        """What comes of the request's methods, each made without gradients and in its precision."""
        model, end = self.request.model, object()
        while True:
            with sampling_mode(model, self.request.options), autocast(model, self.precision):
                part = next(parts, end)
            if part is end:
                return
            yield part


class ReadyRun:
    """A trained run whose model is on its device, ready for any number of requests: what `atelier.load` gives.

    Its config, set and model are those of `loaded`.

    Args:
        words: values of the keys `LOADING` of sample.py, at least.

    Raises:
        UserError: there is no such run, it makes no images, or the rest does not fit it.
    """

    def __init__(self, words: Mapping[str, Any]) -> None:
        self.loaded = folders.load_generator(folders.find(words["run"]), words["ema"], words["root"])
        adapted.put_on(self.loaded.model, words["adapters"], words["adapter_weights"])
        self.model = self.loaded.model.to(device())
        build.by_tiles(self.model, words["tile"])
        self._needs = self.model.needs

    def __repr__(self) -> str:
        """Which run it is, how far, and what it can be asked for."""
        run = self.loaded
        return f"{self.model.kind} in {run.folder}, {run.images_seen:,} images seen: {', '.join(verbs(self.model))}"

    def asked(self, cfg: DictConfig, out: Path | None = None) -> ReadyRequest:
        """What a config of sample.py asks of this run, checked; its keys `LOADING` are not looked at.

        Args:
            cfg: the config.
            out: folder that the pictures are written to; None: none are.

        Raises:
            UserError: the model or its set has not what is asked for.
        """
        words, model, run = build.plain(cfg), self.model, self.loaded
        model.needs = self._needs  # an earlier request's guider may have needed more
        words["do"] = verb(words["do"], model)
        options = build.options(cfg, model, verbs(model)[words["do"]], run.cfg)
        request = Request.of(model, run.data, options, words)
        sources = [] if words["source"] is None else files.sources(words["source"], out)
        words |= {"label": named(words["label"], run.data), "run": str(run.folder), "images_seen": run.images_seen}
        words |= {"n": len(sources)} if sources else {}
        return ReadyRequest(request, words, sources, words["precision"] or run.cfg.trainer.precision)

    def ask(
        self,
        do: str | None = None,
        n: int = 64,
        seed: int = 0,
        label: Labels | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> list[Made]:
        """What `sample.py do=...` makes, batch by batch or source file by file.

        Each has `images` (n, C, H, W) uint8, and with them `sources`, `frames` of a GIF, `captions`, what was `asked`.

        Args:
            do: a verb, as "interpolate"; None: what the model is for.
            n: number of images; picture k comes from (seed, k).
            seed: seed of their noise.
            label: class of every image by name or number, or a list of them in turn; None: those of test images.
            options: every other key of sample.py with its value, as {"sampler": "heun", "sampler.steps": 10}.

        Raises:
            UserError: as sample.py says it.
        """
        for key, value in (options or {}).items():
            if key in LOADING:
                raise UserError(key, value, "a run is loaded with it", f"load(RUN, {key}=...)")
            if key in OF_FOLDERS:
                raise UserError(key, value, "nothing is written here", f"leave {key} out, or python sample.py")
        run = {"run": str(self.loaded.folder)}
        given = {"do": do, "n": n, "seed": seed, "label": label} | run | dict(options or {})
        return list(self.asked(config(given)).pictures())

    def sample(
        self, n: int = 64, seed: int = 0, label: Labels | None = None, options: Mapping[str, Any] | None = None
    ) -> Tensor:
        """The images of `ask("sample", ...)`, (n, C, H, W) uint8: to the bit those that sample.py writes.

        Raises:
            UserError: as `ask`, or they are of source files and have several sizes.
        """
        images = [made.images for made in self.ask("sample", n, seed, label, options)]
        if len({made.shape[1:] for made in images}) > 1:
            source = (options or {}).get("source")
            raise UserError("source", source, "its pictures are of several sizes", 'run.ask("sample", ...)')
        return torch.cat(images).cpu()
