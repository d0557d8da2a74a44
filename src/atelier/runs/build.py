"""What a config names, built: data, model, callbacks, loggers, trainer, judging, a request's options."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

from atelier.checkpoints import renamed
from atelier.core.errors import UserError, within
from atelier.core.launchers import rank
from atelier.runs import preflight

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import Logger
    from torch import nn

    from atelier.callbacks.order import Callbacks
    from atelier.data.base import DataModule
    from atelier.evaluation.evaluator import Evaluator
    from atelier.metrics.suite import Suite
    from atelier.models.base import Model


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The config as plain values, everything resolved."""
    return OmegaConf.to_container(cfg, resolve=True)


def stored_config(folder: Path) -> DictConfig:
    """The config of a run folder in the names of today; nothing in it is called yet."""
    return OmegaConf.create(renamed.today(plain(OmegaConf.load(folder / "config.yaml"))))


def safe_config(folder: Path) -> DictConfig:
    """The config of a run folder, which may call only what a page may.

    Raises:
        UserError: it calls something else.
    """
    cfg = stored_config(folder)
    preflight.targets(cfg)
    return cfg


def data(cfg: DictConfig) -> DataModule:
    return instantiate(cfg.data, _convert_="all")


def data_fields(cfg: DictConfig, role: str) -> set[str]:
    """Fields of the set of a config that have a role, by its name (`atelier.data.base.Role`)."""
    from atelier.data.base import Role, with_role

    return with_role(get_class(cfg.data._target_), Role[role])


def model(cfg: DictConfig, folder: Path) -> Model:
    """The model of a config, in its memory format; its parts come from the copies in the run folder."""
    import torch

    made = _model(cfg, folder)
    last = cfg.get("channels_last")  # not in the config of a run from before there was this key
    return made.to(memory_format=torch.channels_last) if last else made


def _model(cfg: DictConfig, folder: Path) -> Model:
    frozen = {name: part(folder / "frozen" / name, cfg.model[name].sha256, cfg) for name in parts(cfg)}
    return on_parts(cfg, frozen)


def parts(cfg: DictConfig) -> list[str]:
    """The arguments of the model that are parts of other runs: `atelier.runs.pretrained` finds or trains these."""
    return [name for name, node in cfg.model.items() if isinstance(node, DictConfig) and "experiment" in node]


def on_parts(cfg: DictConfig, nets: dict[str, nn.Module]) -> Model:
    """The model of a config on these parts of other runs."""
    node = cfg.model.copy()
    OmegaConf.set_struct(node, False)
    for name in nets:
        del node[name]
    if not nets:
        return instantiate(node, _convert_="all")
    with within("model"):
        return instantiate(node, _convert_="all", _partial_=True)(**nets)


def part(folder: Path, expected: str, cfg: DictConfig) -> nn.Module:
    """What a finished run lends, with its final weights, from the copy in the folder of the run that stands on it.

    A folder of diffusers, which has a config.json, is read for the images of `cfg`, the config of the run above.

    Raises:
        UserError: the weights are not those that the run was trained on.
    """
    from safetensors.torch import load_file

    from atelier.checkpoints import diffusers_folder
    from atelier.checkpoints.store import sha256

    names = ("weights.safetensors", diffusers_folder.WEIGHTS)
    weights = next((folder / name for name in names if (folder / name).exists()), None)
    if weights is None or sha256(weights) != expected:
        problem = "these are not the weights that this run stands on"
        fix = f"put back the file with sha256 {expected[:12]}..., or retrain"
        raise UserError(f"model.{folder.name}", weights or folder, problem, fix)
    if (folder / diffusers_folder.CONFIG).exists():
        return diffusers_folder.read(folder, cfg.data.image_size, cfg.data.image_channels)
    finished = model(without_perceptual(safe_config(folder)), folder)
    finished.load_state_dict(renamed.weights(load_file(weights)))
    return finished.part()


def untrained_part(cfg: DictConfig, nets: dict[str, nn.Module]) -> nn.Module:
    """What a run of this config on these parts would lend, before it is trained."""
    return on_parts(without_perceptual(cfg), nets).part()


def compile_nets(model: Model) -> None:
    """torch.compile of the averaged nets, in place.

    Raises:
        UserError: training goes backward through their gradients.
    """
    if model.needs_double_backward:
        problem = f"{type(model).__name__} needs gradients of gradients, which a compiled net has not"
        raise UserError("compile", True, problem, "compile=false")
    for name in model.ema_nets:
        getattr(model, name).compile()


def without_perceptual(cfg: DictConfig) -> DictConfig:
    """Without what a finished model needs no more: the net of a perceptual loss, whose weights are files elsewhere."""
    cfg = cfg.copy()
    if "perceptual" in cfg.model:
        cfg.model.perceptual = None
    return cfg


def metrics(cfg: DictConfig) -> Suite:
    return instantiate(cfg.metrics, _convert_="all")


def callbacks(cfg: DictConfig) -> Callbacks:
    from atelier.callbacks.order import Callbacks

    return Callbacks(instantiate(cfg.callbacks, _convert_="all"))


def trainer(cfg: DictConfig, model: Model, callbacks: Callbacks, loggers: list[Logger]) -> Trainer:
    """Lightning's Trainer; evaluations come every so many batches of the clock.

    Raises:
        UserError: an evaluation would come more often than batches.
    """
    every = cfg.eval.every_images // cfg.data.batch_size
    if every < 1:
        problem = f"less than one batch of {cfg.data.batch_size}"
        raise UserError("eval.every_images", cfg.eval.every_images, problem, f"eval.every_images={cfg.data.batch_size}")
    given = {"model": model, "callbacks": list(callbacks), "loggers": loggers, "evaluate_every": every}
    return instantiate(cfg.trainer, _convert_="all")(**given)


@contextlib.contextmanager
def loggers(cfg: DictConfig) -> Iterator[list[Logger]]:
    """The loggers of a config, which are rank 0's business; they end with the job, whether it failed or not."""
    made: list[Logger] = []
    failed = True
    try:
        if rank() == 0:
            made = _loggers(cfg)
        yield made
        failed = False
    finally:
        for logger in made:
            logger.finish(failed)


def _loggers(cfg: DictConfig) -> list[Logger]:
    node = cfg.logger.copy()
    if "described" in node:
        node.described = described(cfg)
    if "group" in node and node.group is None and HydraConfig.get().mode == RunMode.MULTIRUN:
        node.group = Path(cfg.run_dir).parent.name
    return instantiate(node, _convert_="all", _recursive_=False)  # what is described is not built


def described(cfg: DictConfig) -> dict[str, Any]:
    """A run's config as a logger shows it: the pages' names to filter by, and every setting."""
    every = plain(OmegaConf.masked_copy(cfg, [key for key in cfg if key != "logger"]))
    sections = {key: value for key, value in every.items() if isinstance(value, dict) and key != "choices"}
    return {**every["choices"], "seed": every["seed"], "settings": sections}


def evaluator(cfg: DictConfig) -> Evaluator:
    return instantiate(cfg.evaluator, _convert_="all")


def options(cfg: DictConfig, model: Model, maker: Callable) -> dict[str, Any]:
    """The options of a model's method that the user gave.

    Raises:
        UserError: the method does not take one, or it would change nothing.
    """
    kinds = {name: kind for name, kind in preflight.options().items() if cfg.get(name) is not None}
    for name in kinds:
        value = HydraConfig.get().runtime.choices.get(name, cfg[name])
        if name not in inspect.signature(maker).parameters:
            raise UserError(name, value, f"{type(model).__name__} takes no {name} here", f"leave {name} out")
        if name == "guidance" and not model.needs:
            raise UserError(name, value, "the model was trained without conditions", f"leave {name} out")
    return {name: _option(cfg[name], name, kind) for name, kind in kinds.items()}


def _option(value: Any, name: str, kind: Any) -> Any:
    """An object that a page describes, or a number."""
    return instantiate(value, _convert_="all") if isinstance(value, DictConfig) else preflight.fitted(value, name, kind)
