"""What others have published and a run stands on: where it lies, and whether it means what the run's config says."""

from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from atelier.checkpoints import diffusers_pipeline, diffusers_scheduler, forms, hub, single_file, transformers_folder
from atelier.checkpoints.store import sha256
from atelier.core import lines
from atelier.core.errors import UserError, within
from atelier.nets.contracts import DenoisingNet, FirstStage, TextEncoder
from atelier.runs import build, keeping

CHANNELS = {9: "stable_diffusion_inpaint", 8: "stable_diffusion_edit"}  # of a net's input; others: noisy latents alone
SAME = {"stable_diffusion_2": "stable_diffusion", "sdxl_turbo": "sdxl"}  # pages whose net is that of another
PAGES = ("stable_diffusion", "sdxl", *CHANNELS.values(), *SAME)
N_REFINED = 5  # numbers that the refiner of XL gets beside a text: four sizes and an aesthetic score
INSIDE: dict[type | None, str] = {FirstStage: "vae", DenoisingNet: "unet", TextEncoder: "text_encoder"}  # of a pipeline


def folder(name: str, cfg: DictConfig) -> Path:
    """The folder that a part names: one of this machine, or of the hub where the part may be fetched from there.

    Of a pipeline of diffusers it is the folder in it that holds such a part; a single file of Stable Diffusion becomes
    a pipeline once, beneath ATELIER_CACHE.
    """
    part, inner = build.section(cfg, name), INSIDE.get(build.contract(cfg, name))
    place = _on_disk(part.run, cfg.model.get("net"))
    for file in [path for path in (place, *place.parents) if path.suffix == single_file.SUFFIX and path.is_file()]:
        vocabulary = OmegaConf.select(cfg, "model.net.vocabulary") if inner == INSIDE[TextEncoder] else ""
        place = unpacked(file, vocabulary) / place.relative_to(file)
    if inner is not None and lies_in(place):
        place = place / inner
    if "fetch" not in part or place.exists():
        return place
    if inner == INSIDE[TextEncoder]:
        with within(f"model.{name}"):
            return transformers_folder.located(part.run, part.fetch)
    return hub.folder(part.run, part.fetch, f"model.{name}")


def _on_disk(run: str, net: Any) -> Path:
    """A part's place; of a pipeline that `net` names by its place on the hub, that in the hub's cache."""
    place = Path(run).expanduser()
    if not isinstance(net, DictConfig) or "fetch" not in net or not run.startswith(net.run) or place.exists():
        return place
    if not hub.NAME.fullmatch(net.run) or Path(net.run).expanduser().exists():
        return place
    return hub.pipeline(net.run, net.fetch, "model.net") / run.removeprefix(net.run).lstrip("/")


def of_variant(part: Path) -> str:
    """What a line says of a folder behind its name: which variant is read where the plain weights are missing."""
    variant = forms.variant(part)
    return f" (its variant {variant}, since it has no plain weights)" if variant else ""


def lies_in(place: Path) -> bool:
    """Whether a pipeline of diffusers is there."""
    return (place / diffusers_pipeline.INDEX).exists()


def page(unet: Path) -> str:
    """The page of conf/model that the net in a folder is of, one of those whose net is not another's (`SAME`).

    Raises:
        UserError: it is the refiner of XL.
    """
    told = config(unet)
    if told.get("addition_embed_type") == "text_time":
        _refuse_refiner(unet, told)
        return "sdxl"
    return CHANNELS.get(told.get("in_channels", 4), "stable_diffusion")


def _refuse_refiner(unet: Path, told: dict[str, Any]) -> None:
    """Refuse a net whose vector is a text's of one encoder and five numbers, in a pipeline without a first encoder."""
    each, dim = told.get("addition_time_embed_dim") or 0, told.get("projection_class_embeddings_input_dim") or 0
    if dim - N_REFINED * each == told.get("cross_attention_dim") and not (unet.parent / "text_encoder").exists():
        raise UserError(".run", unet.parent, single_file.REFINER, ".run=FOLDER of SDXL's base")


def config(folder: Path) -> dict[str, Any]:
    """The config.json of a part of a pipeline.

    Raises:
        UserError: there is none.
    """
    try:
        return json.loads((folder / forms.DIFFUSERS[0]).read_text())
    except (OSError, ValueError) as error:
        problem = f"{folder.name}/ has no readable {forms.DIFFUSERS[0]}"
        raise UserError("run", folder.parent, problem, "run=FOLDER of a whole pipeline of diffusers") from error


def unpacked(file: Path, vocabulary: str | None, place: str = "model.net") -> Path:
    """The pipeline that a single file becomes, made where it is not there yet; known by the content of the file.

    Args:
        file: single file.
        vocabulary: path of CLIP's vocabulary, for the tokenizers; "": they are not needed now.
        place: section that names both, as `run` and `vocabulary`; "": the command itself.

    Raises:
        UserError: it is no such file, or there is no tokenizer for it.
    """
    known: dict[str, Any] = {"sha256": _digest(file, file.stat().st_size, file.stat().st_mtime_ns)}
    with within("model.net"):
        if (target := single_file.target(file)) is not None:
            known["target"] = target
    folder = keeping.automatic("single_files", known)
    if not lies_in(folder):
        part = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        lines.say(f"unpacking {file} into {folder}", error=True)
        with within(place):
            single_file.read(file).unpack(part)
        (part / diffusers_pipeline.INDEX).write_text("{}")
        try:
            part.rename(folder)
        except OSError:
            shutil.rmtree(part, ignore_errors=True)
            if not lies_in(folder):  # else another has made it
                raise
    if vocabulary != "" and not transformers_folder.tokenizer_files(folder / "text_encoder"):
        with within(place):
            if vocabulary is None:
                fix = ".vocabulary=PATH of CLIP's bpe_simple_vocab_16e6.txt.gz"
                raise UserError(".vocabulary", None, "a single file has no tokenizer", fix)
            single_file.read(file).write_tokenizers(folder, vocabulary)
    return folder


@functools.cache
def _digest(file: Path, size: int, changed: int) -> str:
    """The sha256 of a file, read once for all parts that lie in it while it has this size and time."""
    return sha256(file)


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
    with within(f"model.{name}"):
        own, right = cfg.choices.model, page(source)
    if own in PAGES and SAME.get(own, own) != right:
        raise UserError("model", own, f"the net in {source} is one of {right}", f"model={right}")
    scheduler = source.parent / "scheduler"
    if (scheduler / diffusers_scheduler.CONFIG).exists():
        with within("model.objective"):
            objective = cfg.model.objective
            diffusers_scheduler.check(scheduler, instantiate(objective.schedule), instantiate(objective.target))
    elif own in PAGES and is_version_2(config(source)):
        page_of = diffusers_scheduler.PAGES.get(type(instantiate(cfg.model.objective.target)))
        other = "eps" if page_of == "v" else "v"
        lines.say(
            f"{name}: nothing says what this net answers, {page_of} is taken; version 2 of 768 px says v, its base of"
            f" 512 px eps: target@model.objective.target={other}"
        )


def is_version_2(unet: dict[str, Any]) -> bool:
    """Whether a net is of Stable Diffusion 2, by what tells it from version 1 and from XL."""
    return bool(unet.get("use_linear_projection")) and unet.get("addition_embed_type") is None


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
