"""The adapters of a diffusion model in files: which of its nets have some, and what files call their layers."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from atelier.checkpoints import diffusers_conditional, lora_files, single_file_names, transformers_folder
from atelier.checkpoints.lora_files import Component, Known, Layout, by_tensors
from atelier.core.condition import Embedder
from atelier.core.errors import UserError, within
from atelier.nets import lora
from atelier.nets.conditions import Texts
from atelier.nets.transformers_text import TransformersText
from atelier.nets.unet import UNet

TEXTS: tuple[Component, ...] = ("text_encoder", "text_encoder_2")


def known(net: nn.Module, embedder: Embedder) -> dict[Component, Known]:
    """The nets of a diffusion model that adapters go on, with the names of their layers in files.

    A net that diffusers or transformers does not have goes by our own names.
    """
    encoders = [encoder for part in embedder.modules() if isinstance(part, Texts) for encoder in part.encoders]
    if len(encoders) > len(TEXTS):
        problem = "files of adapters know two text encoders"
        raise UserError("lora", f"{len(encoders)} text encoders", problem, "lora.text_targets=[]")
    return {"unet": _denoising(net)} | dict(zip(TEXTS, map(_reading, encoders), strict=False))


def read(net: nn.Module, embedder: Embedder, files: list[Path], weights: list[float]) -> None:
    """Put the adapters of files on a model, beside those that it has, which count as they did.

    Args:
        net: denoising net of the model.
        embedder: embedder of the model, whose text encoders may be adapted too.
        files: files of any layout.
        weights: numbers by which each of these counts.

    Raises:
        UserError: a file does not fit the model.
    """
    nets = known(net, embedder)
    counts = {component: lora.weights(one.net) for component, one in nets.items()}
    first = sum(1 for name in {name for known in counts.values() for name in known} if name != lora.TRAINED)
    for k, (path, weight) in enumerate(zip(files, weights, strict=True), first):
        lora_files.read(path, nets, f"file_{k}")
        for component, one in nets.items():
            counts[component] |= {f"file_{k}": weight} if f"file_{k}" in lora.names(one.net) else {}
    for component, one in nets.items():
        lora.weigh(one.net, counts[component])


def write(net: nn.Module, embedder: Embedder, path: Path, layout: Layout) -> None:
    """Write the adapters that a run has trained into a file, which is replaced.

    Raises:
        UserError: its layers have no names in this layout.
    """
    with within("lora"):
        lora_files.write(path, known(net, embedder), lora.TRAINED, layout)


def merge(net: nn.Module, embedder: Embedder) -> None:
    """Add all adapters of a model to its weights, for good; it is one without adapters from here on."""
    for one in known(net, embedder).values():
        lora.merge(one.net)
        lora.remove(one.net)


def _denoising(net: nn.Module) -> Known:
    if not isinstance(net, UNet) or "tokens" not in net.cond_sizes:
        return Known(net)
    theirs = by_tensors(lambda name: diffusers_conditional.their_names(name, net.n_blocks))
    return Known(
        net,
        theirs,
        lambda place: single_file_names.unet_to_file(theirs(place), net.n_blocks, net.attends),
        convolutions=() if net.parts.head_width is not None else ("proj_in", "proj_out"),
        cosines_first=("time_embedding.linear_1",),
    )


def _reading(encoder: nn.Module) -> Known:
    is_theirs = isinstance(encoder, TransformersText)
    return Known(encoder, by_tensors(transformers_folder.their_names)) if is_theirs else Known(encoder)
