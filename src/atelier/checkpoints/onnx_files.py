"""A diffusion model as graphs of ONNX, which run without torch: what its net denoises, its noise levels, its decoder.

A program around them begins with x = start * noise at the first of its times and asks for the denoised image at each.
It guides, D = D_null + guidance (D_known - D_null), cuts D to [-1, 1] where `clip` says so, and goes on to the next
time s: x = alpha_s D + sigma_s (x - alpha_t D) / sigma_t is DDIM, and other samplers need no more
(`diffusion/samplers.py`).
B batch, C, h, w of what is denoised, T tokens, N times.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from atelier.core.condition import Condition
from atelier.core.errors import UserError
from atelier.diffusion.diffusion_sampler import DiffusionSampler
from atelier.diffusion.objective import Objective
from atelier.diffusion.schedules import Schedule
from atelier.nets.codec import LatentCodec
from atelier.nets.conditioning import ConditionEmbedder
from atelier.nets.denoising import DenoisingNet

DENOISER, SCHEDULE, DECODER = "denoiser.onnx", "schedule.onnx", "decoder.onnx"
CONDITIONS = "conditions.safetensors"
LIBRARIES = ("onnx", "onnxscript")  # what writes the files
LARGEST = 1_900_000_000  # bytes of weights in one file; protobuf ends at 2 GiB
N_SHOWN = 2  # images while a graph is written: 0 and 1 would be taken for fixed
DENOISED = {
    "x": "float32 (B, C, h, w): x_t = alpha x_0 + sigma noise, unscaled",
    "t": "float64 (B,): time in (0, 1], 0 is the image and 1 noise; schedule.onnx gives its alpha and sigma",
    "vector": "float32 (B, D): the condition's vector; conditions.safetensors",
    "tokens": "float32 (B, T, E): what a text encoder gives",
    "mask": "bool (B, T): true where there is a token",
    "planes": "float32 (B, P, h, w): planes that are seen beside x, as the model makes them of images",
    "denoised": "float32 (B, C, h, w): the estimate of x_0",
}
LEVELS = {
    "t": "float64 (N,): times in [0, 1], 0 is the image and 1 noise",
    "alpha": "float64 (N,): factor of the image",
    "sigma": "float64 (N,): deviation of the noise",
    "start": "float64 (N,): deviation of the noise that sampling starts from at that time",
}
DECODED = {
    "z": "float32 (B, Z, h, w): latents as the denoiser gives them, scaled",
    "image": "float32 (B, C, H, W): images, to be cut to [-1, 1]",
}


def write(how: DiffusionSampler, codec: LatentCodec | None, folder: Path | str) -> list[Path]:
    """Write the files that a model runs by, and say which; a file that is there already is replaced.

    denoiser.onnx: x (B, C, h, w), t (B,) and what the net takes of a condition, vector (B, D), tokens (B, T, E), mask
    (B, T), planes (B, P, h, w), to `denoised` (B, C, h, w), without guidance. schedule.onnx: t (N,) to alpha, sigma
    and start. decoder.onnx, of a model of latents: z (B, Z, h, w) to `image` (B, C, H, W). conditions.safetensors:
    `null.vector` and other fields of one image of which nothing is known, and, where labels are all that is asked for,
    `label.vector`, a row for each. B, T and N are free. What encodes texts and images, makes planes, or tells a learned
    variance is not written.

    The metadata of each graph says what its inputs and outputs mean. That of the denoiser also names schedule, target,
    which the graph has undone, sampler and guider, and has as JSON the sampler's `times`, the `guidance`, and whether
    to `clip`. Where weights have more than 1.9 GB, they lie beside their graph in NAME.onnx.data.

    Args:
        how: net, objective and embedder, as they are asked for samples; all stay as they are.
        codec: codec of a model of latents; None: it is one of pixels.
        folder: place, made if it is not there.

    Raises:
        UserError: onnx or onnxscript is not installed.
    """
    folder = Path(folder)
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        raise UserError("layout", "onnx", f"{missing[0]} is not installed", 'pip install -e ".[onnx]"')
    folder.mkdir(parents=True, exist_ok=True)
    given = _shown(how.net)
    told = {name: text for name, text in DENOISED.items() if name in given or name == "denoised"} | _sampling(how)
    written = _graph(_Denoiser(how.objective, how.net), given, ["denoised"], told, folder / DENOISER)
    levels = _Levels(how.objective.schedule)
    written += _graph(levels, {"t": given["t"]}, ["alpha", "sigma", "start"], LEVELS, folder / SCHEDULE)
    if codec is not None:
        z = torch.zeros(N_SHOWN, *codec.latent_shape, device=codec.scale.device)
        written += _graph(_Decoder(codec), {"z": z}, ["image"], DECODED, folder / DECODER)
    if how.net.cond_sizes:
        save_file(_conditions(how), folder / CONDITIONS)
        written.append(folder / CONDITIONS)
    return written


class _Denoiser(nn.Module):
    """x_t, t and a condition, field by field, to the image."""

    def __init__(self, objective: Objective, net: nn.Module) -> None:
        super().__init__()
        self.objective, self.net = objective, net

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        vector: Tensor | None = None,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        planes: Tensor | None = None,
    ) -> Tensor:
        cond = Condition(vector, tokens, mask, planes)
        return self.objective.denoise(self.net, x, t, cond)[:, : x.shape[1]]


class _Levels(nn.Module):
    """Times to noise levels."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.schedule.alpha(t), self.schedule.sigma(t), self.schedule.prior_std(t)


class _Decoder(nn.Module):
    """Latents to images, by the codec without its no_grad and autocast."""

    def __init__(self, codec: LatentCodec) -> None:
        super().__init__()
        self.net, self.scale, self.shift = codec.autoencoder.net, codec.scale, codec.shift

    def forward(self, z: Tensor) -> Tensor:
        return self.net.decode(z / self.scale + self.shift)


def _shown(net: DenoisingNet) -> dict[str, Tensor]:
    """Inputs of the denoiser, by name, of as many images and tokens as are shown."""
    n, sizes = N_SHOWN, net.cond_sizes
    given = {"x": torch.zeros(n, *net.shape), "t": torch.ones(n, dtype=torch.float64)}
    if "vector" in sizes:
        given["vector"] = torch.zeros(n, sizes["vector"])
    if "tokens" in sizes:
        given["tokens"] = torch.zeros(n, n + 1, sizes["tokens"])
        given["mask"] = torch.ones(n, n + 1, dtype=torch.bool)
    if "planes" in sizes:
        given["planes"] = torch.zeros(n, sizes["planes"], *net.shape[1:])
    return {name: value.to(_device(net)) for name, value in given.items()}


def _graph(
    module: nn.Module, given: dict[str, Tensor], outputs: list[str], told: dict[str, str], path: Path
) -> list[Path]:
    """Write a module as a graph with free first axes, and free tokens; large weights go beside it.

    Args:
        module: layer with one input or more, and one output or several.
        given: inputs by name, any of their shapes.
        outputs: names of the outputs.
        told: metadata.
        path: file.
    """
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    axes = {name: {0: batch, 1: tokens} if name in ("tokens", "mask") else {0: batch} for name in given}
    with _in_eval(module), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        # traced by hand: torch.onnx.export fixes, without a word, an axis that a net has fixed
        traced = torch.export.export(module, (), given, dynamic_shapes=axes)
        names = {"input_names": list(given), "output_names": outputs, "dynamic_shapes": axes}
        program = torch.onnx.export(traced, kwargs=given, **names, dynamo=True, verbose=False)
    program.model.metadata_props.update(told)
    weights = path.with_name(f"{path.name}.data")
    weights.unlink(missing_ok=True)
    program.save(path, external_data=_n_bytes(module) > LARGEST)
    return [path, weights] if weights.exists() else [path]


def _sampling(how: DiffusionSampler) -> dict[str, str]:
    """What the graph does not say of the model's way to make samples."""
    protocol = how.protocol()
    return {
        "schedule": type(how.objective.schedule).__name__,
        "target": type(how.objective.target).__name__,
        "sampler": protocol["sampler"],
        "times": json.dumps(how.times(_device(how.net)).tolist()),
        "guider": str(how.guider),
        "guidance": json.dumps(protocol["guidance"]),
        "clip": json.dumps(how.clip),
    }


@torch.no_grad()
def _conditions(how: DiffusionSampler) -> dict[str, Tensor]:
    """What stands for nothing, and the vector of each label where it alone is asked for."""
    fields = {*how.net.cond_sizes, *(["mask"] if "tokens" in how.net.cond_sizes else [])}
    null = how.embedder.null(1)
    found = {f"null.{name}": getattr(null, name) for name in sorted(fields)}
    if isinstance(how.embedder, ConditionEmbedder) and how.embedder.conditions == ("label",):
        labels = torch.arange(math.prod(how.embedder.factors), device=null.device)
        found["label.vector"] = how.embedder({"label": labels}, len(labels)).vector
    return {name: value.contiguous().cpu() for name, value in found.items()}


@contextmanager
def _in_eval(module: nn.Module) -> Iterator[None]:
    """Inside, all its layers are in eval mode; behind, each in its own again."""
    before = {layer: layer.training for layer in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for layer, training in before.items():
            layer.training = training


def _device(net: nn.Module) -> torch.device:
    return next(net.parameters()).device


def _n_bytes(module: nn.Module) -> int:
    return sum(value.nbytes for value in (*module.parameters(), *module.buffers()))
