"""Types of the keys that become no argument of a class: those at the root of a config, and those of a part."""

from __future__ import annotations

from typing import Any, Literal

from atelier.core.precision import Precision
from atelier.core.ranges import Labels, Name, NonNegInt, Port, PositiveFloat, PositiveInt, Seed, Share, Tile
from atelier.nets.contracts import Layer

TYPES: dict[str, Any] = {
    "seed": Seed,
    "run_dir": Name,
    "resume": Literal["auto", "never"],
    "compile": bool,
    "accumulate": PositiveInt,
    "frozen_precision": Literal["32-true", "bf16-true"],
    "channels_last": bool,
    "latent_cache": Name | None,
    "text_cache": Name | None,
    "start_from": Name | None,
    "check": bool,
    "doctor": bool,
    "objective": Name | None,
    "run": Name,
    "n": PositiveInt,
    "first": NonNegInt,
    "like": Name | None,
    "out": Name | None,
    "root": Name | None,
    "batch_size": PositiveInt,
    "do": Name | None,
    "label": Labels | None,
    "source": Name | None,
    "prompt": str | None,
    "prompts": Name | None,
    "negative": str | None,
    "instruction": Name | None,
    "direction": Name | None,
    "attributes": list[Name] | Name | None,
    "scale_factor": PositiveInt | None,
    "strength": Share | None,
    "mask": Name | None,
    "resamplings": PositiveInt | None,
    "adapters": list[Name] | Name | None,
    "adapter_weights": list[float] | float | None,
    "ema": bool | PositiveInt,
    "precision": Precision | None,
    "layout": Literal["diffusers", "single_file", "onnx", "kohya", "comfyui"],
    "vocabulary": Name | None,
    "tile": Tile | None,
    "port": Port,
}
PART: dict[str, Any] = {  # a run, the experiment that makes one; of what is published, whether it may be downloaded;
    "run": Name,
    "experiment": Name,
    "images": PositiveInt | None,
    "fetch": bool,
    "scale": PositiveFloat | None,  # of latents, as the codec takes these three
    "shift": float,
    "n_measured": PositiveInt,
    "layer": Layer,  # of a text encoder of transformers, which states are its tokens
    "final_norm": bool,
    "vocabulary": Name | None,  # of Stable Diffusion in a single file, the tokenizer that it lacks
    "checkpointing": bool,  # of a U-Net
    "sha256": Name,
}
