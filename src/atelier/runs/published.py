"""What others have published and a run stands on: where it lies, and whether it means what the run's config says."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.utils import instantiate
from omegaconf import DictConfig

from atelier.checkpoints import diffusers_scheduler, forms, hub, single_file, transformers_folder
from atelier.checkpoints.store import sha256
from atelier.core.errors import UserError, within
from atelier.nets.contracts import DenoisingNet, FirstStage, TextEncoder
from atelier.runs import build
from atelier.runs.pages import typed_value

if TYPE_CHECKING:
    from atelier.models.base import Model

PIPELINE = "model_index.json"  # of a folder of diffusers that holds a whole model, a folder for each part
INSIDE: dict[type | None, str] = {FirstStage: "vae", DenoisingNet: "unet", TextEncoder: "text_encoder"}


def folder(name: str, cfg: DictConfig) -> Path:
    """The folder that a part names: one of this machine, or of the hub where the part may be fetched from there.

    Of a pipeline of diffusers it is the folder in it that holds such a part; a single file of Stable Diffusion becomes
    a pipeline once, beneath ATELIER_CACHE.
    """
    part, inner = build.section(cfg, name), INSIDE.get(build.contract(cfg, name))
    place = Path(part.run).expanduser()
    files = [path for path in (place, *place.parents) if path.suffix == single_file.SUFFIX and path.is_file()]
    for file in files:
        place = unpacked(file, cfg.model.net.get("vocabulary")) / place.relative_to(file)
    if inner is not None and (place / PIPELINE).exists():
        place = place / inner
    if "fetch" not in part or place.exists():
        return place
    if inner == INSIDE[TextEncoder]:
        with within(f"model.{name}"):
            return transformers_folder.located(part.run, part.fetch)
    return hub.folder(part.run, part.fetch, f"model.{name}")


def is_pipeline(place: Path) -> bool:
    """Whether a pipeline of diffusers lies there."""
    return (place / PIPELINE).exists()


def pipeline(place: Path) -> tuple[DictConfig, Model]:
    """The config and the model of a pipeline of diffusers as it was published; its conditions are those of shapes.

    Raises:
        UserError: it is of another kind, or a part of it cannot be read.
    """
    theirs = diffusers_scheduler.read(place / "scheduler")
    cfg = build.composed([*_page(place), *_objective(theirs), f"model.net.run={typed_value(str(place))}"])
    parts = {name: folder(name, cfg) for name in build.parts(cfg)}
    nodes = {name: build.section(cfg, name) for name in parts}
    nets = {name: build.part(path, forms.digest(path), cfg, nodes[name]) for name, path in parts.items()}
    model = build.on_parts(cfg, nets)
    model.diffusion_sampler = replace(model.diffusion_sampler, sampler=theirs.sampler)
    return cfg, model


def _page(place: Path) -> list[str]:
    """The page of conf/model that is a pipeline's, with its sizes."""
    unet, vae = (json.loads((place / part / forms.DIFFUSERS[0]).read_text()) for part in ("unet", "vae"))
    size = unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)
    words = [f"data.image_size={size}", "data.n_test_scenes=64", f"model.first_stage.scale={vae['scaling_factor']}"]
    if unet.get("addition_embed_type") == "text_time":
        return ["model=sdxl", f"model.embedder.size_dim={unet['addition_time_embed_dim']}", *words]
    task = {
        9: ["model=stable_diffusion_inpaint", "data.task=inpaint"],
        8: ["model=stable_diffusion_edit", "data.task=edit"],
    }
    return task.get(unet["in_channels"], ["model=stable_diffusion"]) + words


def _objective(theirs: diffusers_scheduler.Scheduler) -> list[str]:
    """The pages of its scheduler's schedule and target."""
    schedule = "zero_terminal" if theirs.schedule.logsnrs[-1].isinf() else "scaled_linear"
    target = diffusers_scheduler.PAGES[type(theirs.target)]
    return [f"schedule@model.objective.schedule={schedule}", f"target@model.objective.target={target}"]


def unpacked(file: Path, vocabulary: str | None) -> Path:
    """The folder with the parts of a single file, made where it is not there yet; known by the content of the file.

    Raises:
        UserError: it is no such file, or there is no tokenizer for it.
    """
    folder = Path(os.environ.get("ATELIER_CACHE", "~/.cache/atelier")).expanduser() / "single_files" / sha256(file)[:24]
    if (folder / PIPELINE).exists():
        return folder
    key, fix = "model.net.vocabulary", "PATH of CLIP's bpe_simple_vocab_16e6.txt.gz"
    if vocabulary is None:
        raise UserError(key, None, "a single file has no tokenizer", f"{key}={fix}")
    part = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    print(f"unpacking {file} into {folder}", flush=True)
    with within("model.net"):
        single_file.read(file).unpack(part, vocabulary)
    (part / PIPELINE).write_text("{}")
    with contextlib.suppress(OSError):  # another has made it
        part.rename(folder)
    return folder


def check(name: str, cfg: DictConfig, source: Path) -> None:
    """Refuse a folder of diffusers whose config says otherwise than that of the run.

    Args:
        name: part that the folder becomes.
        cfg: config of the run.
        source: folder of the part.

    Raises:
        UserError: scale or shift of latents, noise levels or the target differ. The sampler may be any.
    """
    _same_latents(name, build.section(cfg, name), source / forms.DIFFUSERS[0])
    scheduler = source.parent / "scheduler"
    if build.contract(cfg, name) is DenoisingNet and (scheduler / diffusers_scheduler.CONFIG).exists():
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
