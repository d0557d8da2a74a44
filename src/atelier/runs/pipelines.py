"""Whole models that others have published: pipelines of diffusers, and single files, which become pipelines."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from atelier.checkpoints import diffusers_scheduler, forms, single_file, transformers_folder
from atelier.checkpoints.store import sha256
from atelier.core.errors import UserError, within
from atelier.runs import build, keeping
from atelier.runs.pages import typed_value

if TYPE_CHECKING:
    from atelier.models.base import Model

INDEX = "model_index.json"  # of a folder of diffusers that holds a whole model, a folder for each part
CHANNELS = {9: "stable_diffusion_inpaint", 8: "stable_diffusion_edit"}  # of a net's input; others: noisy latents alone
PAGES = ("stable_diffusion", "stable_diffusion_2", "sdxl", *CHANNELS.values())
TASKS = {"stable_diffusion_inpaint": ["data.task=inpaint"], "stable_diffusion_edit": ["data.task=edit"]}
SCALE, SIZE = 0.18215, 64  # of latents, where a config does not say
TABLES = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "squaredcos_cap_v2": "cosine",
}  # theirs -> conf/schedule


def lies_in(place: Path) -> bool:
    """Whether a pipeline of diffusers is there."""
    return (place / INDEX).exists()


def page(unet: Path) -> str:
    """The page of conf/model that the net in a folder is of; that of version 2 is version 1's with another target."""
    config = _config(unet)
    if config.get("addition_embed_type") == "text_time":
        return "sdxl"
    return CHANNELS.get(config.get("in_channels", 4), "stable_diffusion")


def as_run(place: Path) -> tuple[DictConfig, Model]:
    """The config and the model of a pipeline as it was published; conditions that nobody gives are those of shapes.

    Raises:
        UserError: it is of another kind, or a part of it cannot be read.
    """
    cfg = build.composed(_words(place))
    parts = {name: _part(place, name, cfg) for name in build.parts(cfg)}
    nodes = {name: build.section(cfg, name) for name in parts}
    nets = {name: build.part(path, forms.digest(path), cfg, nodes[name]) for name, path in parts.items()}
    model = build.on_parts(cfg, nets)
    try:
        sampler = diffusers_scheduler.read(place / "scheduler", cfg.model.sampler.steps).sampler
        model.diffusion_sampler = replace(model.diffusion_sampler, sampler=sampler)
    except UserError as error:  # its levels and its target were read
        told = f"{error.problem}; samples are drawn by {model.diffusion_sampler.sampler}"
        print(f"{place / 'scheduler'}: {told}", file=sys.stderr, flush=True)
    return cfg, model


def _part(place: Path, name: str, cfg: DictConfig) -> Path:
    from atelier.runs import published

    found = published.folder(name, cfg)
    if forms.form(found) is None:
        problem = f"{found.name}/ has no weights in one .safetensors beside its config.json"
        raise UserError("run", place, problem, "run=FOLDER that has; pickles, shards and variants are not read")
    return found


def _words(place: Path) -> list[str]:
    """What train.py would be told of a pipeline."""
    unet, vae = _config(place / "unet"), _config(place / "vae")
    side = unet.get("sample_size") or SIZE
    size = (side[0] if isinstance(side, list) else side) * 2 ** (len(vae["block_out_channels"]) - 1)
    kind = page(place / "unet")
    words = [f"model={kind}", *TASKS.get(kind, []), f"data.image_size={size}", "data.n_test_scenes=64"]
    words += [
        f"model.net.run={typed_value(str(place))}",
        f"model.first_stage.scale={vae.get('scaling_factor') or SCALE}",
    ]
    words += [f"model.first_stage.shift={vae.get('shift_factor') or 0.0}"]
    if kind == "sdxl":
        words += [f"model.embedder.size_dim={unet['addition_time_embed_dim']}"]
    return words + _objective(place / "scheduler")


def _objective(scheduler: Path) -> list[str]:
    """The pages of a scheduler's levels and target, with its numbers."""
    target = diffusers_scheduler.PAGES[type(diffusers_scheduler.meaning(scheduler).target)]
    told, key = diffusers_scheduler.config(scheduler), "model.objective.schedule"
    words = [f"target@model.objective.target={target}"]
    if told["trained_betas"] is not None or (
        told["rescale_betas_zero_snr"] and told["beta_schedule"] != "scaled_linear"
    ):
        raise UserError("run", scheduler, "a table of levels that no page of conf/schedule has", "another run=FOLDER")
    if told["rescale_betas_zero_snr"]:
        words, key = [*words, f"schedule@{key}=zero_terminal"], f"{key}.schedule"
    else:
        words = [*words, f"schedule@{key}={TABLES[told['beta_schedule']]}"]
    numbers = {"n_steps": told["num_train_timesteps"]}
    if told["beta_schedule"] != "squaredcos_cap_v2":
        numbers |= {"beta_min": told["beta_start"], "beta_max": told["beta_end"]}
    return words + [f"{key}.{name}={number}" for name, number in numbers.items()]


def _config(folder: Path) -> dict[str, Any]:
    """The config.json of a part. Raises UserError where there is none."""
    try:
        return json.loads((folder / forms.DIFFUSERS[0]).read_text())
    except (OSError, ValueError) as error:
        problem = f"{folder.name}/ has no readable {forms.DIFFUSERS[0]}"
        raise UserError("run", folder.parent, problem, "run=FOLDER of a whole pipeline of diffusers") from error


def unpacked(file: Path, vocabulary: str | None) -> Path:
    """The pipeline that a single file becomes, made where it is not there yet; known by the content of the file.

    Args:
        file: single file.
        vocabulary: path of CLIP's vocabulary, for the tokenizers; "": they are not needed now.

    Raises:
        UserError: it is no such file, or there is no tokenizer for it.
    """
    folder = keeping.automatic("single_files", {"sha256": sha256(file)})
    if not lies_in(folder):
        part = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        print(f"unpacking {file} into {folder}", flush=True)
        with within("model.net"):
            single_file.read(file).unpack(part)
        (part / INDEX).write_text("{}")
        try:
            part.rename(folder)
        except OSError:
            shutil.rmtree(part, ignore_errors=True)
            if not lies_in(folder):  # else another has made it
                raise
    if vocabulary != "" and not transformers_folder.tokenizer_files(folder / "text_encoder"):
        if vocabulary is None:
            key = "model.net.vocabulary"
            fix = f"{key}=PATH of CLIP's bpe_simple_vocab_16e6.txt.gz"
            raise UserError(key, None, "a single file has no tokenizer", fix)
        with within("model.net"):
            single_file.read(file).write_tokenizers(folder, vocabulary)
    return folder
