"""Whole models as others open them: a folder of diffusers with a folder for each part, or a single file.

What diffusers has no pipeline for is written part by part.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from atelier.checkpoints import (
    diffusers_conditional,
    diffusers_files,
    diffusers_folder,
    diffusers_nets,
    diffusers_scheduler,
    single_file,
    transformers_folder,
    weight_files,
)
from atelier.checkpoints.diffusers_scheduler import Scheduler
from atelier.core.errors import UserError
from atelier.diffusion.samplers import DDIM, Euler, Sampler
from atelier.diffusion.schedules import DiscreteSchedule, Schedule
from atelier.diffusion.targets import Epsilon, Target, Velocity
from atelier.nets.autoencoder_kl import KLNet
from atelier.nets.conditioning import ConditionEmbedder
from atelier.nets.conditions import Planes, Several, TextEmbedder
from atelier.nets.contracts import TextEncoder
from atelier.nets.dit import DiT
from atelier.nets.planes import LatentPlanes, MaskedImage, SourceLatents
from atelier.nets.transformers_text import TransformersText
from atelier.nets.two_texts import N_SIZES, TwoTexts
from atelier.nets.unet import UNet
from atelier.nets.words import BytePairs

INDEX, LAYOUT = "model_index.json", "0.30.0"  # version of diffusers whose layout it is
XL = "StableDiffusionXLPipeline"
PIPELINES: dict[type, str] = {  # what the net sees beside its latents -> theirs
    type(None): "StableDiffusionPipeline",
    MaskedImage: "StableDiffusionInpaintPipeline",
    SourceLatents: "StableDiffusionInstructPix2PixPipeline",
}
UNCHECKED = {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
ZEROS = "force_zeros_for_empty_prompt"  # of the index of XL: whether zeros stand for no text


class PipelineParts(NamedTuple):
    """What a diffusion model is made of.

    `scale` and `shift` are those of its latents. `linear`: see `diffusers_conditional.write`. `source`: pipeline that
    all of it was read from, whose scheduler and precision stay; None: it was trained here.
    """

    net: nn.Module
    embedder: nn.Module
    schedule: Schedule
    target: Target
    sampler: Sampler
    first_stage: nn.Module | None = None  # None: it denoises pixels
    scale: float = 1.0
    shift: float = 0.0
    planes: LatentPlanes | None = None
    linear: bool | None = None
    source: Path | None = None


Told = dict[str, tuple[dict[str, Any], dict[str, Tensor]]]  # a part -> its config, its tensors


def pipeline(parts: PipelineParts) -> str:
    """The class of diffusers that opens all parts together, where `missing` finds nothing."""
    return XL if isinstance(parts.embedder, TwoTexts) else PIPELINES[type(parts.planes)]


def missing(parts: PipelineParts) -> str | None:
    """The first part for which no pipeline of diffusers has a place, and why; None where one opens them all."""
    return _no_text(parts) or _no_latents(parts) or _no_levels(parts) or _no_net(parts)


def write(parts: PipelineParts, folder: Path) -> list[str]:
    """Make the folder that `from_pretrained` of `pipeline(parts)` takes; gives what is to be said of it.

    Args:
        parts: parts of which `missing` says nothing.
        folder: place, made if it is not there.
    """
    told, notes = _told(parts), list[str]()
    for part, (config, tensors) in told.items():
        weights = transformers_folder.WEIGHTS if part.startswith("text") else diffusers_files.WEIGHTS
        diffusers_files.write(folder / part, config, tensors, weights)
    for part, encoder in _encoders(parts).items():
        _write_tokenizer(encoder, folder / part)
    place = folder / "scheduler" / diffusers_scheduler.CONFIG
    place.parent.mkdir(exist_ok=True)
    if own := _of_source(parts, f"scheduler/{diffusers_scheduler.CONFIG}"):
        shutil.copyfile(own, place)
    else:
        scheduler, notes = _scheduler(parts)
        _write_json(place, scheduler)
    index = {"_class_name": pipeline(parts), "_diffusers_version": LAYOUT}
    index |= {"scheduler": ["diffusers", _read_json(place)["_class_name"]]}
    index |= {part: ["transformers", config["architectures"][0]] for part, (config, _) in _of_texts(told).items()}
    index |= {part.replace("text_encoder", "tokenizer"): ["transformers", "CLIPTokenizer"] for part in _of_texts(told)}
    index |= {part: ["diffusers", told[part][0]["_class_name"]] for part in ("unet", "vae")}
    _write_json(folder / INDEX, index | ({ZEROS: _zeros(parts)} if pipeline(parts) == XL else UNCHECKED))
    return notes


def write_file(parts: PipelineParts, path: Path) -> list[str]:
    """Make a single file of the original layout; gives what is to be said of it.

    Args:
        parts: parts of which `missing` says nothing.
        path: place, whose name ends in .safetensors.

    Raises:
        UserError: a part has another form than in Stable Diffusion.
    """
    told = _told(parts)
    single_file.write(path, {part: tensors for part, (_, tensors) in told.items()})
    configs = {part: config for part, (config, _) in told.items()} | {"scheduler": _scheduler(parts)[0]}
    unsaid = single_file.unsaid(path, configs)
    if not unsaid:
        return []
    known = ", ".join(f"{key}={_shown(value)}" for key, value in unsaid.items())
    return [f"nothing in the file says {known}: who opens it has to know, as from config=FOLDER of layout=diffusers"]


def write_parts(parts: PipelineParts, folder: Path) -> tuple[list[str], list[str]]:
    """Make a folder for each part that diffusers or transformers open by itself; gives their names, and why not others.

    Args:
        parts: parts of any diffusion model.
        folder: place, made if it is not there.
    """
    written: list[str] = []
    refused: list[str] = []
    for name, make in (
        ("transformer" if isinstance(parts.net, DiT) else "unet", _write_net),
        ("vae", _write_first_stage),
        ("scheduler", _write_scheduler),
    ):
        if name == "vae" and parts.first_stage is None:
            continue
        try:
            make(parts, folder / name)
            written.append(name)
        except UserError as error:
            refused.append(_problem(name, error))
    for part, encoder in _encoders(parts).items():
        if isinstance(encoder, TransformersText):
            transformers_folder.write(encoder, folder / part)
            _write_tokenizer(encoder, folder / part)
            written.append(part)
        else:
            refused.append(f"{part}: transformers has no {type(encoder).__name__}")
    return written, refused


# ---- what a pipeline lacks


def _no_text(parts: PipelineParts) -> str | None:
    """What its condition is, where that is none of a text that transformers encodes and diffusers hands on."""
    encoders, embedder = _encoders(parts), parts.embedder
    if not encoders:
        known = ", ".join(getattr(embedder, "conditions", ())) or "nothing"
        return f"unet: it is conditional on {known}, pipelines on a text"
    for part, encoder in encoders.items():
        if not isinstance(encoder, TransformersText):
            return f"{part}: transformers has no {type(encoder).__name__}"
    if isinstance(embedder, TwoTexts):
        if any(one.layer != "penultimate" or one.final_norm for one in encoders.values()):
            return "text_encoder: its tokens are not those before the last block, without a norm, as of XL"
        return None if embedder.null_kind in ("zeros", "empty") else f"text_encoder: {embedder.null_kind} is no text"
    return _no_plain_text(embedder, *encoders.values())


def _no_plain_text(embedder: nn.Module, encoder: TransformersText) -> str | None:
    text = _text(embedder)
    if "vector" in embedder.cond_sizes:
        return "unet: it takes a vector of the text, pipelines give tokens alone (reads=[tokens], cond_dim=null)"
    if text.null_kind != "empty":
        return f"text_encoder: for no text stands {text.null_kind}, in pipelines the empty prompt"
    if encoder.layer != "last" or not encoder.final_norm:
        return "text_encoder: its tokens are not those of the last block behind the norm"
    return None


def _no_latents(parts: PipelineParts) -> str | None:
    if not isinstance(parts.first_stage, KLNet):
        kind = "none: it denoises pixels" if parts.first_stage is None else f"a {type(parts.first_stage).__name__}"
        return f"vae: pipelines have an AutoencoderKL, this is {kind}"
    if parts.shift:
        return f"vae: pipelines subtract nothing of latents, this {parts.shift:g}"
    if type(parts.planes) not in PIPELINES:
        return f"unet: no pipeline gives it {type(parts.planes).__name__}"
    return None


def _no_levels(parts: PipelineParts) -> str | None:
    if not isinstance(parts.target, Epsilon | Velocity):
        return f"unet: its answer is a {type(parts.target).__name__}, pipelines want eps or v"
    if not isinstance(parts.schedule, DiscreteSchedule):
        return f"scheduler: {type(parts.schedule).__name__} is no table of levels"
    return None


def _no_net(parts: PipelineParts) -> str | None:
    if not isinstance(parts.net, UNet):
        return f"unet: pipelines have a {diffusers_conditional.KIND}, this is a {type(parts.net).__name__}"
    try:
        diffusers_conditional.config_of(parts.net, parts.linear, _size_dim(parts))
    except UserError as error:
        return _problem("unet", error)
    return None


def _problem(part: str, error: UserError) -> str:
    return (
        f"{part}: {error.problem} ({error.key}={error.value})" if error.key != "folder" else f"{part}: {error.problem}"
    )


# ---- the parts


def _told(parts: PipelineParts) -> Told:
    """Config and tensors of all that has weights, in the precision of their source."""
    found: Told = {
        "unet": diffusers_conditional.exported(parts.net, parts.linear, _size_dim(parts)),
        "vae": diffusers_folder.exported(parts.first_stage, parts.scale, parts.shift),
    }
    found |= {part: transformers_folder.exported(encoder) for part, encoder in _encoders(parts).items()}
    for part in found if parts.source is not None else ():
        name = transformers_folder.WEIGHTS if part.startswith("text") else diffusers_files.WEIGHTS
        dtype, (config, tensors) = weight_files.precision(parts.source / part, name), found[part]
        found[part] = config, {key: value.to(dtype) for key, value in tensors.items()}
    return found


def _of_texts(told: Told) -> Told:
    return {part: both for part, both in told.items() if part.startswith("text")}


def _encoders(parts: PipelineParts) -> dict[str, TextEncoder]:
    """The encoders of its texts, by their folder; none where its condition is more than texts and planes, or less."""
    embedder = parts.embedder
    if isinstance(embedder, TwoTexts):
        return {"text_encoder": embedder.encoder, "text_encoder_2": embedder.second.net}
    text = _text(embedder)
    return {} if text is None else {"text_encoder": text.encoder}


def _text(embedder: nn.Module) -> TextEmbedder | None:
    sources = embedder.sources.values() if isinstance(embedder, Several) else [embedder]
    others = [source for source in sources if not isinstance(source, Planes)]
    return others[0] if len(others) == 1 and isinstance(others[0], TextEmbedder) else None


def _size_dim(parts: PipelineParts) -> int:
    return len(parts.embedder.sizes) // N_SIZES if isinstance(parts.embedder, TwoTexts) else 256


def _write_tokenizer(encoder: TransformersText, folder: Path) -> None:
    """Beside the folder of an encoder, that of its tokenizer."""
    words: BytePairs = encoder.words
    pad = next(name for name, row in words.rows.items() if row == words.pad)
    place = folder.with_name(folder.name.replace("text_encoder", "tokenizer"))
    transformers_folder.write_tokenizer(words, place, pad, encoder.max_tokens)


def _scheduler(parts: PipelineParts) -> tuple[dict[str, Any], list[str]]:
    """What the scheduler's file says, and a line where that is not the sampler's own."""
    own, place = Scheduler(parts.schedule, parts.target, _as_ddim(parts.sampler)), Path("scheduler")
    try:
        config = diffusers_scheduler.exported(own, place)
        if isinstance(own.sampler, Euler) and own.sampler.spacing != "leading":
            weaker = f"{config['_class_name']} begins with weaker noise, so images differ by thousandths"
            return config, [f"scheduler: {weaker}"]
        if config["steps_offset"] == 1 or pipeline(parts) == XL:
            return config, []
        problem = f"its pipelines lay the times of steps one later than {parts.sampler}"
    except UserError as error:
        problem = error.problem
    config = diffusers_scheduler.exported(own._replace(sampler=DDIM(steps=parts.sampler.steps)), place)
    return config, [f"scheduler: {problem}; a DDIMScheduler is written in its place"]


def _as_ddim(sampler: Sampler) -> Sampler:
    """DDIM in place of Euler on the same times, which is the same steps: theirs of Euler begins with weaker noise."""
    if type(sampler) is Euler and sampler.grid == "uniform" and sampler.spacing != "leading":
        return DDIM(steps=sampler.steps, spacing=sampler.spacing, to_image=sampler.to_image)
    return sampler


def _zeros(parts: PipelineParts) -> bool:
    """Whether zeros stand for no text in XL, as its source says."""
    index = _of_source(parts, INDEX)
    return (_read_json(index) if index else {}).get(ZEROS, parts.embedder.null_kind == "zeros")


def _of_source(parts: PipelineParts, name: str) -> Path | None:
    """A file of the pipeline that all of it was read from."""
    return None if parts.source is None or not (parts.source / name).exists() else parts.source / name


def _write_net(parts: PipelineParts, folder: Path) -> None:
    net, embedder = parts.net, parts.embedder
    if not isinstance(net, UNet | DiT):
        raise UserError("folder", folder, f"diffusers has no {type(net).__name__}", "model.net of unet or dit")
    if "tokens" in net.cond_sizes and isinstance(net, UNet):
        diffusers_conditional.write(net, folder, parts.linear, _size_dim(parts))
        return
    if "vector" in net.cond_sizes and not isinstance(embedder, ConditionEmbedder):
        problem = f"diffusers embeds labels in it, not {', '.join(embedder.conditions)}"
        raise UserError("folder", folder, problem, "data.conditions=[label]")
    diffusers_nets.write(net, embedder, folder)


def _write_first_stage(parts: PipelineParts, folder: Path) -> None:
    if not diffusers_folder.fits(parts.first_stage):
        problem = f"diffusers has no {type(parts.first_stage).__name__}"
        raise UserError("folder", folder, problem, "a first stage of model=autoencoder_kl")
    diffusers_folder.write(parts.first_stage, folder, parts.scale, parts.shift)


def _write_scheduler(parts: PipelineParts, folder: Path) -> None:
    diffusers_scheduler.write(Scheduler(parts.schedule, parts.target, parts.sampler), folder)


# ---- files


def _shown(value: Any) -> str:
    return f"[{len(value)} numbers]" if isinstance(value, list) and len(value) > 8 else str(value)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, told: dict[str, Any]) -> None:
    path.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
