"""What a config names, built: data, model, callbacks, loggers, trainer, judging, a request's options."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

from atelier.checkpoints import renamed
from atelier.core.errors import UserError, within
from atelier.core.launchers import rank
from atelier.runs import fitting, preflight
from atelier.runs.pages import CONF, is_group, page_of

BASE = "base"  # the copy of the run that adapters are trained on, beside those of parts

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import Logger
    from torch import Tensor, nn

    from atelier.callbacks.order import Callbacks
    from atelier.data.base import DataModule
    from atelier.evaluation.evaluator import Evaluator
    from atelier.metrics.suite import Suite
    from atelier.models.base import Model


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The config as plain values, everything resolved."""
    return OmegaConf.to_container(cfg, resolve=True)


def composed(words: list[str]) -> DictConfig:
    """The config of `python train.py words`, without a folder; everything in it is resolved."""
    with contextlib.ExitStack() as stack:
        if not GlobalHydra.instance().is_initialized():  # outside of a command
            stack.enter_context(initialize_config_dir(str(CONF), version_base="1.3"))
        cfg = compose("train", words, return_hydra_config=True)
    chosen = cfg.hydra.runtime.choices
    OmegaConf.set_struct(cfg, False)
    del cfg["hydra"]
    cfg.choices = {key: chosen[key] for key in cfg.choices}
    cfg.run_dir = ""
    return OmegaConf.create(plain(cfg))


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


def family(cfg: DictConfig) -> type[Model]:
    """The class of the model."""
    return get_class(cfg.model._target_)


def model(cfg: DictConfig, folder: Path) -> Model:
    """The model of a config, in its memory format and precision; its parts come from the copies in the run folder.

    Raises:
        UserError: weights are to be halved where none are frozen.
    """
    nodes = {name: section(cfg, name) for name in parts(cfg)}
    nets = {name: part(folder / "frozen" / name, node.sha256, cfg, node) for name, node in nodes.items()}
    on_a_run = cfg.get("lora") is not None and cfg.start_from is not None
    return untaught(cfg, nets, _base(folder / "frozen" / BASE, cfg) if on_a_run else None)


def untaught(cfg: DictConfig, nets: dict[str, nn.Module], weights: dict[str, Tensor] | None = None) -> Model:
    """The same on these parts, with the weights that adapters are put on; None: those that it was made with.

    Raises:
        UserError: weights are to be halved where none are frozen.
    """
    import torch

    made = on_parts(cfg, nets)
    if weights is not None:
        made.begin_with(weights, "start_from")
    if cfg.get("lora") is not None:
        made.adapt(instantiate(cfg.lora, _convert_="all"))
    if cfg.get("frozen_precision", "32-true") == "bf16-true" and not made.halve_frozen():
        problem = f"{type(made).__name__} has no frozen encoder of texts, and no adapters on frozen weights"
        raise UserError("frozen_precision", "bf16-true", problem, "frozen_precision=32-true")
    last = cfg.get("channels_last")  # not in the config of a run from before there was this key
    return made.to(memory_format=torch.channels_last) if last else made


def _base(copied: Path, cfg: DictConfig) -> dict[str, Tensor]:
    """The weights that a run's adapters are trained on, from the copy in its folder.

    Raises:
        UserError: they are others than those that training began on.
    """
    from atelier.checkpoints import forms

    if forms.digest(copied) != cfg.base_sha256:
        problem = "these are not the weights that the adapters were trained on"
        raise UserError("start_from", copied, problem, f"put back the file with sha256 {cfg.base_sha256[:12]}...")
    return weights(copied / "weights.safetensors", "start_from")


def weights(path: Path, key: str) -> dict[str, Tensor]:
    """The weights of a finished run, in the names of today; `key` is what named it.

    Raises:
        UserError: the file is not whole.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return renamed.weights(load_file(path))
    except (OSError, SafetensorError) as error:
        raise UserError(key, path, f"it cannot be read ({error})", f"{key}=ANOTHER") from error


def parts(cfg: DictConfig) -> list[str]:
    """The arguments of the model that are parts of other runs: `atelier.runs.pretrained` finds or trains these.

    Those of an argument that is built itself are dotted: `guider.classifier`.
    """
    return _parts(cfg.model)


def _parts(node: DictConfig) -> list[str]:
    sections = {name: inner for name, inner in node.items() if isinstance(inner, DictConfig)}
    own = [name for name, inner in sections.items() if "run" in inner]
    return own + [f"{name}.{part}" for name, inner in sections.items() if name not in own for part in _parts(inner)]


def below(cfg: DictConfig) -> list[Path]:
    """The run folders that a run stands on, those that these stand on among them."""
    named = [Path(run) for name in parts(cfg) if (run := section(cfg, name).run) is not None]
    found = [folder for folder in named if (folder / "config.yaml").exists()]
    return found + [lower for folder in found for lower in below(stored_config(folder))]


def section(cfg: DictConfig, name: str) -> DictConfig:
    """What a config says of one of its `parts`."""
    return OmegaConf.select(cfg.model, name)


def contract(cfg: DictConfig, name: str) -> type | None:
    """What the argument that takes a part asks of it (`nets/contracts.py`)."""
    owner, _, argument = name.rpartition(".")
    node = OmegaConf.select(cfg.model, owner) if owner else cfg.model
    return preflight.contract(node._target_, argument)


def on_parts(cfg: DictConfig, nets: dict[str, nn.Module]) -> Model:
    """The model of a config on these parts of other runs."""
    return _standing_on(cfg.model, nets, "model")


def _standing_on(node: DictConfig, nets: dict[str, Any], key: str) -> Any:
    """The object of a section, some of whose arguments, or of theirs, are built already."""
    if not nets:
        return instantiate(node, _convert_="all")
    given = {name: net for name, net in nets.items() if "." not in name}
    for owner in dict.fromkeys(name.partition(".")[0] for name in nets if "." in name):
        own = {name.removeprefix(f"{owner}."): net for name, net in nets.items() if name.startswith(f"{owner}.")}
        with within(key):
            given[owner] = _standing_on(node[owner], own, owner)
    if "_target_" not in node:
        return {name: given[name] if name in given else instantiate(node[name], _convert_="all") for name in node}
    rest = node.copy()
    OmegaConf.set_struct(rest, False)
    for name in given:
        del rest[name]
    with within(key):
        made = partial(instantiate(rest, _convert_="all", _partial_=True), **given)
        return made if node.get("_partial_") else made()


def part(folder: Path, expected: str | None, cfg: DictConfig, node: DictConfig | None = None) -> nn.Module:
    """What a finished run lends, with its final weights, from the copy in the folder of the run that stands on it.

    What is published, a folder of diffusers or the files of taef2, is read for the images of `cfg`, the config of the
    run above; of a text encoder of transformers, the states that `node` names, the section of the part. `expected` is
    the digest of the weights, None where any will do.

    Raises:
        UserError: the weights are not those that the run was trained on, or not all of them are numbers.
    """
    from atelier.checkpoints import forms

    with within(f"model.{folder.name}"):
        same = expected is None or forms.digest(folder) == expected
    if not same:
        problem = "these are not the weights that this run stands on"
        fix = f"put back the files with sha256 {expected[:12]}..., or retrain"
        raise UserError(f"model.{folder.name}", folder, problem, fix)
    node = OmegaConf.create() if node is None else node
    try:
        net = _read(folder, cfg, node)
    except UserError as error:  # told of the copy
        raise UserError(f"model.{folder.name}.run", node.get("run", folder), error.problem, error.fix) from error
    looked_at = forms.form(folder) in (forms.DIFFUSERS, forms.TRANSFORMERS)  # when they were read, with less memory
    if broken := [n for n, weight in net.named_parameters() if not looked_at and not weight.isfinite().all()]:
        problem = f"not all numbers of {broken[0]} are finite"
        raise UserError(f"model.{folder.name}", folder, problem, f"model.{folder.name}.run=ANOTHER")
    if node.get("checkpointing"):
        if not hasattr(net, "checkpointing"):
            problem = f"{type(net).__name__} computes nothing again on the way back"
            raise UserError(f"model.{folder.name}.checkpointing", True, problem, "leave it out")
        net.checkpointing = True
    return net


def _read(folder: Path, cfg: DictConfig, node: DictConfig) -> nn.Module:
    """The net of a folder, of whichever form."""
    from atelier.checkpoints import diffusers_conditional, diffusers_folder, forms, taesd_files, transformers_folder

    names, images = forms.form(folder), (cfg.data.image_size, cfg.data.image_channels)
    if names == forms.DIFFUSERS:
        if diffusers_conditional.holds(folder):
            return diffusers_conditional.read(folder)
        return diffusers_folder.read(folder, *images)
    if names == forms.TAEF2:
        return taesd_files.read(folder, *images)
    if names == forms.TRANSFORMERS:
        return transformers_folder.text_encoder(str(folder), node.get("layer", "last"), node.get("final_norm", True))
    finished = model(without_perceptual(safe_config(folder)), folder)
    finished.restore(weights(folder / names[1], f"model.{folder.name}.run"))
    return finished.part()


def lent(node: DictConfig, key: str, data: DictConfig | None) -> nn.Module:
    """What the finished run lends that a request names as `key` (`guider.classifier`), for a run on this `data`.

    Raises:
        UserError: no finished run lies there, or it was trained on other images or labels.
    """
    from atelier.checkpoints.store import sha256

    folder, fix = Path(node.run), f"{key}.run=DIR of a run of experiment={node.experiment}"
    if node.run == "auto":
        raise UserError(f"{key}.run", "auto", "a request trains nothing, name a run", fix)
    weights = folder / "weights.safetensors"
    if not weights.exists() or not (folder / "config.yaml").exists():
        raise UserError(f"{key}.run", folder, "no finished run lies there", fix)
    finished = stored_config(folder)
    if data is not None:
        same_images(f"{key}.run", folder, finished.data, data, fix, labels=key.endswith("classifier"))
    return part(folder, sha256(weights), finished)


def same_images(key: str, source: Path, trained: DictConfig, data: DictConfig, fix: str, labels: bool = False) -> None:
    """Refuse a part that was trained on images of another size or, where `labels` matter, with another number of them.

    Raises:
        UserError: it was.
    """
    for name in ("image_size", "image_channels", *(["n_classes"] if labels else [])):
        if trained[name] != data[name]:
            problem = f"it was trained on data.{name}={trained[name]}, this is data.{name}={data[name]}"
            raise UserError(key, source, problem, fix)


def untrained_part(cfg: DictConfig, nets: dict[str, nn.Module]) -> nn.Module:
    """What a run of this config on these parts would lend, before it is trained."""
    return on_parts(without_perceptual(cfg), nets).part()


def by_tiles(model: Model, tile: int | None) -> None:
    """Have the first stage of a model work by tiles of this side from here on; None: as its config says.

    Raises:
        UserError: it has none.
    """
    if tile is None:
        return
    if not hasattr(model, "codec"):
        raise UserError("tile", tile, f"{type(model).__name__} decodes no latents by a first stage", "leave tile out")
    model.codec.tile = tile


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
    return _standing_on(cfg.metrics, _judges(cfg, cfg.get("data"), ""), "metrics")


def callbacks(cfg: DictConfig) -> Callbacks:
    from atelier.callbacks.order import Callbacks

    return Callbacks(_standing_on(cfg.callbacks, _judges(cfg, cfg.data, "evaluation.evaluator.suite."), "callbacks"))


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


def evaluator(cfg: DictConfig, trained: DictConfig | None = None) -> Evaluator:
    """What judges the samples of a run; `trained` is its config, which the runs that the metrics stand on must fit."""
    below = None if trained is None else trained.data
    return _standing_on(cfg.evaluator, _judges(cfg, below, "suite."), "evaluator")


def _judges(cfg: DictConfig, data: DictConfig | None, place: str) -> dict[str, nn.Module]:
    """The finished runs that the metrics of a config stand on, by where they stand in another object."""
    return {f"{place}{name}": _judge(cfg.metrics[name], f"metrics.{name}", data) for name in _parts(cfg.metrics)}


def _judge(node: DictConfig, key: str, data: DictConfig | None) -> nn.Module:
    """What a finished run lends to metrics, or a CLIP in a folder of transformers."""
    from atelier.metrics.clip_score import ClipEncoder, TransformersClip

    if (Path(node.run) / "config.json").exists():
        with within(key):
            return TransformersClip(node.run)
    found = lent(node, key, data)
    if not isinstance(found, ClipEncoder):
        fix = f"{key}.run=DIR of a run of experiment={node.experiment}"
        raise UserError(f"{key}.run", node.run, f"{type(found).__name__} does not encode images and texts", fix)
    return found


def options(cfg: DictConfig, model: Model, maker: Callable, trained: DictConfig | None = None) -> dict[str, Any]:
    """The options of a model's method that the user gave; from here on the model needs the conditions that they do.

    Args:
        cfg: config of the request.
        model: model that is asked.
        maker: method of it.
        trained: config of its run, which what an option stands on must fit; None: no option stands on anything.

    Raises:
        UserError: the method does not take one, it would change nothing, or it stands on a run that does not fit.
    """
    kinds = {name: kind for name, kind in preflight.options().items() if cfg.get(name) is not None}
    for name in kinds:
        if name not in inspect.signature(maker).parameters:
            value = page_of(name, cfg[name]) if is_group(name) else cfg[name]
            raise UserError(name, value, f"{type(model).__name__} takes no {name} here", f"leave {name} out")
    found = {name: _option(cfg[name], name, kind, trained) for name, kind in kinds.items()}
    for option in found.values():
        model.needs = model.needs | frozenset(getattr(option, "conditions", ()))
    if "guidance" in found and not model.needs:
        raise UserError("guidance", cfg.guidance, "the model was trained without conditions", "leave guidance out")
    return found


def _option(value: Any, name: str, kind: Any, trained: DictConfig | None) -> Any:
    """An object that a page describes, on the finished runs that it names, or a number."""
    if not isinstance(value, DictConfig):
        return fitting.fitted(value, name, kind)
    return _standing_on(
        value, {part: lent(value[part], f"{name}.{part}", trained.data) for part in _parts(value)}, name
    )
