"""Stable Diffusion in a single file of the original layout: U-Net, autoencoder and text encoders in one .safetensors.

Its parts are read and written as `single_file_layout` has them. Averages of training (`model_ema.`) are passed over, as
the programs that published such files and diffusers do: one name means one net.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from atelier.checkpoints import diffusers_conditional, diffusers_files, diffusers_scheduler, transformers_folder
from atelier.checkpoints import single_file_names as names
from atelier.checkpoints.single_file_layout import (
    PREFIXES,
    SQUEEZED,
    UNET,
    VAE,
    Absent,
    Naming,
    Shapes,
    Version,
    described,
    naming_of,
    numbers,
    version_of,
)
from atelier.core.errors import UserError
from atelier.core.ranges import Name
from atelier.diffusion.samplers import DDIM
from atelier.diffusion.schedules import ScaledLinear
from atelier.diffusion.targets import Epsilon, Velocity
from atelier.nets.unet import UNet
from atelier.nets.words import BytePairs

Task = Literal["text", "inpaint", "edit"]
SaidTarget = Literal["eps", "v"]
SUFFIX = ".safetensors"
STEPS = 50  # of a scheduler, which no file says
TARGETS: dict[str, SaidTarget] = {"epsilon": "eps", "v": "v"}  # their words -> ours
REFINER = "it is SDXL's refiner, which reads one text encoder and an aesthetic score, not two encoders"
REFINERS = "conditioner.embedders.0.model."  # where the base has the tensors of transformers
TASKS: dict[int, Task] = {0: "text", 5: "inpaint", 4: "edit"}  # by the channels beside the noisy ones
PADS = {  # padding of the texts of each encoder
    ("sd1", "text_encoder"): "<|endoftext|>",
    ("sd2", "text_encoder"): "!",
    ("sdxl", "text_encoder"): "<|endoftext|>",
    ("sdxl", "text_encoder_2"): "!",
}
LEVELS = {  # that the published were trained on
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
}
BESIDE = ("sample_size", "architectures", "bos_token_id", "eos_token_id", "projection_dim")  # what no layer depends on
PASSED_OVER = re.compile(  # averages, the numbers of a schedule, and what no image comes from
    r"model_ema\..*|(log_one_minus_|sqrt_one_minus_|sqrt_recipm1_|sqrt_recip_|sqrt_)?alphas_cumprod(_prev)?|betas|logvar"
    r"|posterior_(variance|log_variance_clipped|mean_coef[12])|scale_factor|denoiser\.sigmas|.*\.logit_scale"
    r"|.*\.embeddings\.position_ids"
)


@dataclass(frozen=True)
class SingleFile:
    """A file whose names and shapes are those of a version; its tensors are read when they are asked for.

    Args:
        path: file.
        version: "sd1", "sd2" or "sdxl".
        task: "text", "inpaint" (a mask and latents beside the noisy ones) or "edit" (latents beside them).
        configs: configs of diffusers and transformers by part, with the heads and groups that were published.
        places: tensors in the file by part, each with the names of those that it holds.
        passed_over: names in the file that no part has.
        target: answer of the U-Net, "eps" or "v", as the file's own description says; None: it says nothing, as
            most do.
    """

    path: Path
    version: Version
    task: Task
    configs: dict[str, dict[str, Any]]
    places: dict[str, dict[str, list[str]]]
    passed_over: list[str]
    target: SaidTarget | None = None

    def tensors(self, part: str) -> dict[str, Tensor]:
        """The tensors of a part, of the precision that the file has, as diffusers and transformers name them."""
        found: dict[str, Tensor] = {}
        with safe_open(self.path, "pt") as file:
            for key, held in self.places[part].items():
                found |= _taken(held, file.get_tensor(key))
        return found

    def unet(self, image_size: int | None = None) -> UNet:
        """The U-Net, float32 and in eval mode.

        Args:
            image_size: height and width of its latents; None: those that the version was trained with.
        """
        given = self.configs["unet"], self.tensors("unet")
        return diffusers_conditional.built(self.path, *given, image_size, _refused)

    def unpack(self, folder: Path | str) -> None:
        """Make the folders of its parts as diffusers has them, which the readers of folders take, one after the other.

        The tokenizers, which text encoders need beside them, are not in the file. A scheduler is made where the file
        says the target.

        Args:
            folder: place, made if it is not there; the files of the parts are replaced.
        """
        for part, config in self.configs.items():
            weights = transformers_folder.WEIGHTS if part.startswith("text") else diffusers_files.WEIGHTS
            diffusers_files.write(Path(folder) / part, config, self.tensors(part), weights)
        if self.target is not None:
            said = Velocity() if self.target == "v" else Epsilon()
            sampler = DDIM(steps=STEPS, spacing="leading", offset=1, to_image=False)
            made = diffusers_scheduler.Scheduler(ScaledLinear(), said, sampler)
            diffusers_scheduler.write(made, Path(folder) / "scheduler")

    def write_tokenizers(self, folder: Path | str, vocabulary: Name) -> None:
        """Put the tokenizers of its text encoders beside what `unpack` made.

        Args:
            folder: place of the parts.
            vocabulary: path of CLIP's bpe_simple_vocab_16e6.txt.gz.

        Raises:
            UserError: that cannot be read.
        """
        words = BytePairs.published(vocabulary)
        for part in (part for part in self.configs if part.startswith("text")):
            place = Path(folder) / part.replace("text_encoder", "tokenizer")
            n = self.configs[part]["max_position_embeddings"]
            transformers_folder.write_tokenizer(words, place, PADS[self.version, part], n)


def read(path: Path | str) -> SingleFile:
    """What a file holds, by its header alone.

    Raises:
        UserError: it is pickled, cut, or of another model; a tensor is missing, too many or of another shape.
    """
    path = Path(path)
    header = _header(path)
    version, sizes, naming, unused = _sizes(path, header)
    if version == "sdxl" and any(key.startswith(REFINERS) for key in header):
        raise _refused(path, REFINER)
    try:
        found = described(path, sizes, _refused)
    except Absent as absent:
        raise _refused(path, f"it lacks {naming.key(absent.part, absent.name)}") from absent
    places = {part: found.places(part) for part in PREFIXES[version]}
    wanted = {key: found.shape(part, held) for part in places for key, held in places[part].items()}
    _compare(path, wanted, {key: shape for key, shape in header.items() if key not in unused}, "it")
    unet = found.configs["unet"]
    task = TASKS.get(unet["in_channels"] - unet["out_channels"])
    if task is None:
        raise _refused(path, f"its U-Net takes {unet['in_channels']} channels, not 4, 8 or 9")
    return SingleFile(path, version, task, found.configs, places, sorted(unused), target(path))


def target(path: Path) -> SaidTarget | None:
    """What a file says in its header that its U-Net answers, by the key of the Stability AI model specification.

    Raises:
        UserError: it is pickled or cut.
    """
    _check_suffix(path)
    try:
        with safe_open(path, "pt") as file:
            return TARGETS.get((file.metadata() or {}).get("modelspec.prediction_type", ""))
    except (OSError, SafetensorError) as error:
        raise _refused(path, f"it is cut, or no {SUFFIX} ({error})") from error


def write(path: Path | str, parts: dict[str, dict[str, Tensor]]) -> None:
    """Make the file that `from_single_file` of diffusers takes; one that is there is replaced.

    The places of OpenAI's text encoder are numbered in a tensor, as in what was published: older programs ask for it.

    Args:
        path: place, whose name ends in .safetensors.
        parts: tensors of each part by their names in diffusers and transformers, those of a text encoder with or
            without `text_model.`; all parts of a version.

    Raises:
        UserError: a part or a tensor is missing, too many or of another shape.
    """
    path = Path(path)
    _check_suffix(path)
    parts = {part: _whole_names(part, state) for part, state in parts.items()}
    sizes = {part: {name: list(value.shape) for name, value in state.items()} for part, state in parts.items()}
    try:
        found = described(path, sizes, _refused)
    except Absent as absent:
        raise _refused(path, f"{absent.part} lacks {absent.name}") from absent
    if unknown := sorted(set(sizes) - set(found.shapes)):
        raise _refused(path, f"{found.naming.version} has no {unknown[0]}")
    for part, wanted in found.shapes.items():
        _compare(path, wanted, sizes[part], part)
    made = {key: _given(held, parts[part]) for part in parts for key, held in found.places(part).items()}
    for part, prefix in PREFIXES[found.naming.version].items():
        if prefix.endswith("transformer."):
            n = found.configs[part]["max_position_embeddings"]
            made[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(n)[None]
    save_file(made, path, metadata={"format": "pt"})


def unsaid(path: Path | str, configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the reader of a file has to be told, as it supposes something else: `part.key` -> value.

    Args:
        path: file of parts with these configs.
        configs: configs of diffusers and transformers by part, that of a scheduler among them.
    """
    file = read(path)
    supposed: dict[str, dict[str, Any]] = {
        "unet": diffusers_conditional.DEFAULTS | file.configs["unet"],
        "vae": {"shift_factor": None} | file.configs["vae"],
        "scheduler": LEVELS | {"prediction_type": "v_prediction" if file.version == "sd2" else "epsilon"},
    }
    supposed |= {part: config for part, config in file.configs.items() if part.startswith("text")}
    return {
        f"{part}.{key}": value
        for part, config in configs.items()
        for key, value in config.items()
        if key in supposed[part] and key not in BESIDE and not _alike(value, supposed[part][key])
    }


def _alike(value: Any, other: Any) -> bool:
    """Whether two values of a config are the same, numbers to rounding."""
    if isinstance(value, float) and isinstance(other, int | float):
        return math.isclose(value, other, rel_tol=1e-6)
    return value == other


# ---- the file


def _header(path: Path) -> Shapes:
    _check_suffix(path)
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_slice(key).get_shape() for key in file.keys()}
    except OSError as error:
        raise _refused(path, f"it cannot be read ({error.strerror or 'no such file'})") from error
    except SafetensorError as error:
        raise _refused(path, f"it is cut, or no {SUFFIX} ({error})") from error


def _check_suffix(path: Path) -> None:
    if path.suffix != SUFFIX:
        raise _refused(path, f"it is no {SUFFIX}; pickled weights (.ckpt, .pt) are not read")


def _sizes(path: Path, header: Shapes) -> tuple[Version, dict[str, Shapes], Naming, set[str]]:
    """The version of a file, its shapes by part and name, how they are called, and which tensors no part has."""
    inside = {key.removeprefix(UNET): shape for key, shape in header.items() if key.startswith(UNET)}
    n_layers = _layers_of_file(path, inside)
    unet = {names.unet_from_file(key, n_layers): shape for key, shape in inside.items()}
    version = version_of(unet)
    n_levels = 1 + max(numbers(header, rf"{re.escape(VAE)}encoder\.down\.(\d+)\."), default=0)
    naming = replace(naming_of({"unet": unet}), n_levels=n_levels)
    unused = {key for key in header if PASSED_OVER.fullmatch(key)} | (_unused(header) if version == "sd2" else set())
    sizes = {"unet": unet}
    for part in [part for part in PREFIXES[version] if part != "unet"]:
        prefix = PREFIXES[version][part]
        own = {key.removeprefix(prefix): header[key] for key in header if key.startswith(prefix) and key not in unused}
        sizes[part] = _inside(naming, part, own)
    return version, sizes, naming, unused


def _layers_of_file(path: Path, unet: Iterable[str]) -> int:
    """Residual blocks per level, told from where the first map is halved, or from how many there are."""
    halved = [int(found[1]) for key in unet if (found := re.fullmatch(r"input_blocks\.(\d+)\.0\.op\.weight", key))]
    blocks = [key for key in unet if re.fullmatch(r"input_blocks\.\d+\.0\.in_layers\.0\.weight", key)]
    n_layers = min(halved, default=len(blocks) + 1) - 1
    if n_layers < 1:
        raise _refused(path, f"it holds no U-Net of Stable Diffusion ({UNET}input_blocks)")
    return n_layers


def _inside(naming: Naming, part: str, own: Shapes) -> Shapes:
    """The shapes of an autoencoder or a text encoder by their names in diffusers and transformers."""
    found: Shapes = {}
    for key, shape in own.items():
        held = naming.held(part, key)
        if held == ["text_projection.weight"]:
            shape = shape[::-1]
        elif SQUEEZED.search(held[0]):
            shape = shape[:2]
        elif len(held) > 1:
            shape = [shape[0] // len(held), *shape[1:]]
        found |= dict.fromkeys(held, shape)
    return found


def _unused(header: Shapes) -> set[str]:
    """The projection of version 2 and, where there is one, the last block, which its tokens do not come from."""
    prefix = PREFIXES["sd2"]["text_encoder"]
    if f"{prefix}text_projection" not in header:
        return set()
    last = max(numbers(header, rf"{re.escape(prefix)}transformer\.resblocks\.(\d+)\."), default=0)
    block = f"{prefix}transformer.resblocks.{last}."
    return {key for key in header if key == f"{prefix}text_projection" or key.startswith(block)}


def _taken(held: list[str], value: Tensor) -> dict[str, Tensor]:
    """The tensors that one of the file holds."""
    if held == ["text_projection.weight"]:
        return {held[0]: value.T.contiguous()}
    if SQUEEZED.search(held[0]):
        value = value[:, :, 0, 0]
    return {name: part.clone() for name, part in zip(held, value.chunk(len(held)), strict=True)}


def _given(held: list[str], state: dict[str, Tensor]) -> Tensor:
    """One tensor of the file, made of those that it holds."""
    value = torch.cat([state[name] for name in held])
    if held == ["text_projection.weight"]:
        return value.T.contiguous()
    return value[:, :, None, None] if SQUEEZED.search(held[0]) else value


def _whole_names(part: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a text encoder with `text_model.` in front, which transformers leaves out or not."""
    if not part.startswith("text"):
        return state
    kept = {name: value for name, value in state.items() if not name.endswith("embeddings.position_ids")}
    return {n if n.startswith("text_") else f"text_model.{n}": value for n, value in kept.items()}


def _compare(path: Path, wanted: Shapes, given: Shapes, whose: str) -> None:
    if missing := sorted(set(wanted) - set(given)):
        raise _refused(path, f"{whose} lacks {missing[0]}")
    if more := sorted(set(given) - set(wanted)):
        raise _refused(path, f"{whose} also holds {more[0]}")
    for name, shape in wanted.items():
        if given[name] != shape:
            raise _refused(path, f"{name} has shape {given[name]}, not {shape}")


def _refused(path: Path, problem: str) -> UserError:
    fix = f".run=PATH of a {SUFFIX} of Stable Diffusion 1, 2 or XL in its original layout"
    return UserError(".run", path, problem, fix)
