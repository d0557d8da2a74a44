"""What a page may have Hydra call: its own launchers and sweepers, and the table of a sweep.

Hydra builds whatever `hydra:` names before the first line of a command runs, and its logging calls any class; a page
from another folder (--config-dir) may bring such a section along. Here it is looked at between composing and calling.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from atelier.core.errors import UserError

PLUGINS = ("hydra._internal.core_plugins.", "hydra_plugins.")
CALLED = {  # section of `hydra` -> how the path of what is called there begins
    "callbacks": ("atelier.cli.sweeps.Summary",),
    "launcher": PLUGINS,
    "sweeper": (*PLUGINS, "optuna.samplers."),
}
LOGGING = ("job_logging", "hydra_logging")
HANDLERS = ("logging.StreamHandler", "logging.NullHandler", "logging.Formatter")


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Inside, each config that Hydra composes is checked before Hydra calls anything that it names."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    composed = ConfigLoaderImpl.load_configuration

    def checked(
        self: ConfigLoaderImpl,
        config_name: str | None,
        overrides: list[str],
        run_mode: Any,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        cfg = composed(self, config_name, overrides, run_mode, from_shell, validate_sweep_overrides)
        check(cfg)
        return cfg

    ConfigLoaderImpl.load_configuration = checked
    try:
        yield
    finally:
        ConfigLoaderImpl.load_configuration = composed


def check(cfg: DictConfig) -> None:
    """Raises UserError where the section `hydra` of a config names what it may not call."""
    for section in cfg.hydra:
        raw = OmegaConf.to_container(OmegaConf.masked_copy(cfg.hydra, section))[section]
        for key, value in _leaves(raw, f"hydra.{section}"):
            last = key.rpartition(".")[2]
            called = last == "_target_" or section in LOGGING and last in ("class", "()")
            allowed = HANDLERS if section in LOGGING and last == "class" else CALLED.get(section, ())
            known = any(value == one or one.endswith(".") and str(value).startswith(one) for one in allowed)
            if called and not known or _hidden(cfg, key, value):
                problem = "a page may not have Hydra call it"
                raise UserError(key, value, problem, f"take {key.partition('.')[0]}: out of that page")


def _leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from _leaves(value, f"{prefix}.{key}")
    if not isinstance(node, dict | list):
        yield prefix, node


def _hidden(cfg: DictConfig, key: str, value: Any) -> bool:
    """Whether a value stands for a whole section elsewhere, or for an object that logging would look up."""
    if isinstance(value, str) and "://" in value and value.startswith(("ext:", "cfg:")):
        return value not in ("ext://sys.stdout", "ext://sys.stderr")
    if not isinstance(value, str) or "${" not in value:
        return False
    with contextlib.suppress(Exception):  # what has no value yet is none
        return OmegaConf.is_config(OmegaConf.select(cfg, key))
    return False
