"""A config as the entry points get it, without a command line."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import re
from collections import defaultdict
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository, ConfigResult
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, base, open_dict

from atelier.runs import folders
from atelier.runs.pages import is_group

VALUE = re.compile(r"[+~]*\w[\w.]*(=|$)")  # sets a key or takes it away, or does that with a page
PARSER = OverridesParser.create()
CONF = Path(__file__).parents[1] / "conf"
base.parse = functools.cache(base.parse)  # each look at an interpolation parses it: half of the time of a check


def copied(self: base.Metadata, memo: dict) -> base.Metadata:
    """What a node says of itself: only two dicts of it are changed in place. It was half of copying a config."""
    new = object.__new__(type(self))
    kept = copy.deepcopy(self.resolver_cache) if self.resolver_cache else defaultdict(dict)
    new.__dict__ |= self.__dict__ | {"flags": dict(self.flags), "resolver_cache": kept}
    return new


base.Metadata.__deepcopy__ = copied
read, READ = ConfigRepository.load_config, {}


def load_config(self: ConfigRepository, config_path: str) -> ConfigResult | None:
    """A page is read once, and copied for each config: reading was two fifths of composing one."""
    place = config_path, *(source.path for source in self.sources)
    if place not in READ:
        READ[place] = read(self, config_path)
    return copy.deepcopy(READ[place])


ConfigRepository.load_config = load_config


def composed(*overrides: str, run_dir: Path | str = "unused", config: str = "train") -> DictConfig:
    """What `python <config>.py *overrides` would work on, with its run in `run_dir`.

    HydraConfig is set, so that `${hydra:runtime.choices.model}` resolves: that of the latest call.
    """
    cfg = copy.deepcopy(_composed(config, tuple(word for word in overrides if _value(word) is None)))
    ConfigLoaderImpl._apply_overrides_to_config([one for one in map(_value, overrides) if one is not None], cfg)
    cfg.hydra.overrides.task = list(overrides)
    with open_dict(cfg):
        cfg.hydra.mode, cfg.hydra.runtime.output_dir = "RUN", str(run_dir)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
        if "run_dir" in cfg:
            cfg.run_dir = str(run_dir)
    return cfg


@functools.cache
def _value(word: str) -> Override | None:
    """A word that sets a key to one value, which Hydra does behind all else; None: pages are composed by it."""
    if VALUE.match(word) and not is_group(word.partition("=")[0].lstrip("+~")):
        with contextlib.suppress(HydraException):
            found = PARSER.parse_override(word)
            return None if found.is_sweep_override() else found
    return None


@functools.cache
def _composed(config: str, pages: tuple[str, ...]) -> DictConfig:
    """A tenth of a second of Hydra's, once for the same choice of pages."""
    folders.register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(config, list(pages), return_hydra_config=True)


@functools.cache
def a_finished_run() -> Path:
    """A folder that looks like one."""
    folder = Path(os.environ["ATELIER_CACHE"]) / "a_finished_run"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("{model: {}, data: {}}")
    (folder / "weights.safetensors").touch()
    return folder
