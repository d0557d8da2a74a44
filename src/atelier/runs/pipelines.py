"""Pipelines of diffusers, whole models that others have published, asked as runs are."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from atelier.checkpoints import diffusers_scheduler, forms
from atelier.core.errors import UserError, within
from atelier.core.words import typed_value
from atelier.runs import build, published

if TYPE_CHECKING:
    from atelier.models.base import Model

TASKS = {"stable_diffusion_inpaint": ["data.task=inpaint"], "stable_diffusion_edit": ["data.task=edit"]}
SCALE, SIZE = 0.18215, 64  # of latents, where a config does not say
TABLES = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "squaredcos_cap_v2": "cosine",
}  # theirs -> conf/schedule


def as_run(place: Path) -> tuple[DictConfig, Model]:
    """The config and the model of a pipeline as it was published; conditions that nobody gives are those of shapes.

    Raises:
        UserError: it is of another kind, or a part of it cannot be read.
    """
    cfg = build.composed(_words(place))
    parts = {name: _part(place, name, cfg) for name in build.parts(cfg)}
    nodes = {name: build.section(cfg, name) for name in parts}
    nets = {name: build.part(path, None, cfg, nodes[name]) for name, path in parts.items()}
    model = build.on_parts(cfg, nets)
    try:
        sampler = diffusers_scheduler.read(place / "scheduler", cfg.model.sampler.steps).sampler
        model.diffusion_sampler = replace(model.diffusion_sampler, sampler=sampler)
    except UserError as error:  # its levels and its target were read
        told = f"{error.problem}; samples are drawn by {model.diffusion_sampler.sampler}"
        print(f"{place / 'scheduler'}: {told}", file=sys.stderr, flush=True)
    return cfg, model


def _part(place: Path, name: str, cfg: DictConfig) -> Path:
    found = published.folder(name, cfg)
    with within(""):
        form = forms.form(found)
    if form is None:
        problem = f"{found.name}/ has no weights in .safetensors beside its config.json"
        raise UserError("run", place, problem, "run=FOLDER that has; pickles (.bin) are not read")
    if told := published.of_variant(found):
        print(f"{found}{told}", file=sys.stderr, flush=True)
    return found


def _words(place: Path) -> list[str]:
    """What train.py would be told of a pipeline."""
    unet, vae = published.config(place / "unet"), published.config(place / "vae")
    side = unet.get("sample_size") or SIZE
    size = (side[0] if isinstance(side, list) else side) * 2 ** (len(vae["block_out_channels"]) - 1)
    scheduler = place / "scheduler"
    with within(""):
        kind = published.page(place / "unet")
    page = "sdxl_turbo" if kind == "sdxl" and _in_few_steps(scheduler) else kind
    words = [f"model={page}", *TASKS.get(kind, []), f"data.image_size={size}", "data.n_test_scenes=64"]
    words += [
        f"model.net.run={typed_value(str(place))}",
        f"model.first_stage.scale={vae.get('scaling_factor') or SCALE}",
    ]
    words += [f"model.first_stage.shift={vae.get('shift_factor') or 0.0}"]
    if kind == "sdxl":
        words += [f"model.embedder.size_dim={unet['addition_time_embed_dim']}"]
    return words + (_objective(scheduler) if (scheduler / diffusers_scheduler.CONFIG).exists() else _usual(unet))


def _usual(unet: dict[str, Any]) -> list[str]:
    """The target where nothing tells it, as beside a single file: v of version 2, else eps, on the page's levels."""
    second = published.is_version_2(unet)
    print(f"no scheduler tells what the net answers: {'v' if second else 'eps'} is taken", file=sys.stderr, flush=True)
    return ["target@model.objective.target=v"] if second else []


def _in_few_steps(scheduler: Path) -> bool:
    """Whether a scheduler of XL is that of its distilled net: nothing else in a pipeline tells the two apart."""
    if not (scheduler / diffusers_scheduler.CONFIG).exists():
        return False
    told = diffusers_scheduler.config(scheduler)
    kind, spacing = told.get("_class_name"), told.get("timestep_spacing")
    return kind == "EulerAncestralDiscreteScheduler" and spacing == "trailing"


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
