"""What others have published and a run stands on: where it lies, and whether it means what the run's config says."""

from __future__ import annotations

import json
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from atelier.checkpoints import diffusers_scheduler, forms, hub, single_file, transformers_folder
from atelier.core.errors import UserError, within
from atelier.nets.contracts import DenoisingNet, FirstStage, TextEncoder
from atelier.runs import build, pipelines

INSIDE: dict[type | None, str] = {FirstStage: "vae", DenoisingNet: "unet", TextEncoder: "text_encoder"}  # of a pipeline


def folder(name: str, cfg: DictConfig) -> Path:
    """The folder that a part names: one of this machine, or of the hub where the part may be fetched from there.

    Of a pipeline of diffusers it is the folder in it that holds such a part; a single file of Stable Diffusion becomes
    a pipeline once, beneath ATELIER_CACHE.
    """
    part, inner = build.section(cfg, name), INSIDE.get(build.contract(cfg, name))
    place = Path(part.run).expanduser()
    for file in [path for path in (place, *place.parents) if path.suffix == single_file.SUFFIX and path.is_file()]:
        vocabulary = OmegaConf.select(cfg, "model.net.vocabulary") if inner == INSIDE[TextEncoder] else ""
        place = pipelines.unpacked(file, vocabulary) / place.relative_to(file)
    if inner is not None and pipelines.lies_in(place):
        place = place / inner
    if "fetch" not in part or place.exists():
        return place
    if inner == INSIDE[TextEncoder]:
        with within(f"model.{name}"):
            return transformers_folder.located(part.run, part.fetch)
    return hub.folder(part.run, part.fetch, f"model.{name}")


def check(name: str, cfg: DictConfig, source: Path) -> None:
    """Refuse a folder of diffusers whose config says otherwise than that of the run.

    Args:
        name: part that the folder becomes.
        cfg: config of the run.
        source: folder of the part.

    Raises:
        UserError: it is a net of another page, or scale or shift of latents, noise levels or the target differ. The
            sampler may be any.
    """
    _same_latents(name, build.section(cfg, name), source / forms.DIFFUSERS[0])
    if build.contract(cfg, name) is not DenoisingNet:
        return
    own, page = cfg.choices.model, pipelines.page(source)
    if own in pipelines.PAGES and own.removesuffix("_2") != page:
        raise UserError("model", own, f"the net in {source} is one of {page}", f"model={page}")
    scheduler = source.parent / "scheduler"
    if (scheduler / diffusers_scheduler.CONFIG).exists():
        with within("model.objective"):
            objective = cfg.model.objective
            diffusers_scheduler.check(scheduler, instantiate(objective.schedule), instantiate(objective.target))


def _same_latents(name: str, part: DictConfig, config: Path) -> None:
    """Refuse numbers of latents other than those that the config.json of the first stage says, where any are given.

    Raises:
        UserError: they differ.
    """
    if part.get("scale") is None:
        return
    told = json.loads(config.read_text())
    for key, theirs, default in (("scale", "scaling_factor", part.scale), ("shift", "shift_factor", 0.0)):
        value = default if told.get(theirs) is None else told[theirs]
        if abs(value - part[key]) > 1e-4 * abs(value):
            fix = f"model.{name}.{key}={value}, or model.{name}.scale=null measures it"
            raise UserError(f"model.{name}.{key}", part[key], f"its {config.name} says {theirs} {value}", fix)
