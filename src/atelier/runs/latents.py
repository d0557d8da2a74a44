"""The latent cache of a run: whether its training can read one, which, and that all ranks make it together."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from omegaconf import DictConfig
from torch import nn

from atelier.core.errors import UserError
from atelier.data.base import DataModule, OnlyMirrored, Role, with_role
from atelier.data.latent_cache import KEY, KeptLatents, LatentCache, check_only_mirrored
from atelier.models.base import Model, TrainedOnLatents
from atelier.runs import keeping


def keep(cfg: DictConfig, model: Model, data: DataModule) -> None:
    """Where there is a `latent_cache`, training reads moments of the first stage from it, made where there are none.

    Raises:
        UserError: this model or this set needs pixels in training, or the folder holds a cache of something else.
    """
    if cfg[KEY] is None:
        return
    _can_be_kept(cfg[KEY], model, data)
    channels, *sides = model.first_stage.latent_shape
    of = identity(model.first_stage, data)
    folder = keeping.automatic("latents", of | {"flips": data.flip}) if cfg[KEY] == "auto" else Path(cfg[KEY])
    cache = LatentCache(folder, of, data.trained_on(), (2 * channels, *sides), data.flip)
    cache.check()
    data.latents = partial(_made, cache=cache, model=model, data=data)


def refuse_planes(cfg: DictConfig) -> None:
    """Refuse a cache for a page that sees planes, which are made of pixels, before what it stands on is trained."""
    if cfg[KEY] is not None and (planes := cfg.model.get("planes")) is not None:
        page = planes._target_.rpartition(".")[2]
        problem = f"its planes ({page}) are made of pixels in training, which a cache of latents has not"
        raise UserError(KEY, cfg[KEY], problem, f"{KEY}=null")


def _can_be_kept(asked: str, model: Model, data: DataModule) -> None:
    """Refuse what trains on pixels, or on others in each epoch."""
    off = f"{KEY}=null"
    if not isinstance(model, TrainedOnLatents):
        raise UserError(KEY, asked, f"{type(model).__name__} trains on no latents of a first stage", off)
    for name in sorted(with_role(data, Role.DRAWN)):
        if value := getattr(data, name):
            none = "false" if value is True else 0
            problem = "pixels are drawn anew each epoch, so their latents cannot be kept"
            raise UserError(f"data.{name}", value, problem, f"data.{name}={none}, or {off}")
    if (masks := getattr(data, "masks", "none")) != "none":
        why = "drawn anew each epoch" if masks == "lama" else "read with the pixels"
        problem = f"masks are {why}, which a cache of latents has not"
        raise UserError("data.masks", masks, problem, f"data.masks=none, or {off}")
    images = data.split("train")
    if not isinstance(images, OnlyMirrored):
        problem = "training cuts or changes its images anew each epoch"
        raise UserError("data", type(data).__name__, problem, off)
    there, _ = images.beside(list(data.trained_on()[:1]), None)
    if pixels := sorted(model.needs - there.keys()):
        problem = f"{type(model).__name__} needs {', '.join(pixels)} in training: pixels, which a cache has not"
        raise UserError(KEY, asked, problem, off)
    check_only_mirrored(images, data.trained_on(), data.flip)


def identity(first_stage: nn.Module, data: DataModule) -> dict[str, Any]:
    """Name to plain value of all that decides the moments of training images, as a user knows it."""
    names = [f.name for f in fields(data) if f.name not in with_role(data, Role.NOT_PIXELS)]
    options = {f"data.{name}": getattr(data, name) for name in [*names, "limit"]}
    stands_on = {"model.first_stage": keeping.net_hash(first_stage), "data": type(data).__name__}
    return stands_on | options | {"content of the images": data.fingerprint("train")}


def _made(trainer: Trainer, cache: LatentCache, model: TrainedOnLatents, data: DataModule) -> KeptLatents:
    """The training split by its kept latents, once all ranks have made what is missing of them."""
    images, device = data.split("train"), trainer.strategy.root_device

    def fill() -> None:
        model.first_stage.to(device)
        batch = data.batch_size // trainer.world_size
        cache.fill(images, lambda x: model.moments(x.to(device)), batch, trainer.global_rank, trainer.world_size)

    keeping.made(trainer, cache, fill)
    return KeptLatents(images, cache)
