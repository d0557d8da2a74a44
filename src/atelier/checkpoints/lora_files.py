"""Files of adapters of low rank (`nets/lora.py`), in the three layouts in which they are exchanged.

    diffusers   unet.down_blocks.0.attentions.0.proj_in.lora_A.weight, .lora_B.weight; alpha in the file's header
    kohya       lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight, .lora_up.weight, .alpha
    comfyui     diffusion_model.input_blocks.1.1.proj_in.lora_A.weight, .lora_B.weight, .alpha

Any of them is read, also mixed, with the spellings that older programs and peft itself write; what a file has no alpha
for has alpha = r. Each key must find its layer, and the other half of its pair: nothing is left out unseen.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from atelier.core.errors import UserError
from atelier.nets import lora

Component = Literal["unet", "text_encoder", "text_encoder_2"]  # a net of a pipeline, as diffusers calls it
Layout = Literal["diffusers", "kohya", "comfyui"]
KOHYA = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)}
CLIP = "text_model."  # before names in a text encoder; transformers of today leaves it out
METADATA = "lora_adapter_metadata"  # in the header: what peft's LoraConfig says, by component
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
HALVES = {"A": "A", "down": "A", "B": "B", "up": "B"}
KEY = re.compile(r"(.+)\.(?:(?:lora_|lora\.|lora_linear_layer\.)(A|B|down|up)\.weight|(alpha))")


@dataclass(frozen=True)
class Known:
    """A net, and what files call its places.

    Args:
        net: net whose adapters are read or written.
        diffusers: place of `nets/lora.py` -> name of that layer in diffusers or transformers.
        original: place -> its name in a U-Net's single file, behind `model.diffusion_model.`; None: it is not known.
        convolutions: ends of diffusers' names of layers that are linear here and 1x1 convolutions there.
        cosines_first: diffusers' names of layers behind a time's sines and cosines, where the cosines are first there.
    """

    net: nn.Module
    diffusers: Callable[[str], str] = str
    original: Callable[[str], str] | None = None
    convolutions: tuple[str, ...] = ()
    cosines_first: tuple[str, ...] = ()


def by_tensors(names: Callable[[str], list[str]]) -> Callable[[str], str]:
    """place -> its name, of: name of a tensor of ours -> names of the tensors that make it, one below the other."""

    def named(place: str) -> str:
        layer, _, part = place.rpartition(".")
        parts = lora.PARTS.get(layer.rpartition(".")[2], lora.WHOLE)
        layer, k = (layer, parts.index(part)) if part in parts else (place, 0)
        return names(f"{layer}.weight")[k].removesuffix(".weight")

    return named


def read(path: Path | str, nets: dict[Component, Known], name: str) -> None:
    """Put the adapters of a file on the nets of a pipeline; on none of them where one key does not fit.

    Args:
        path: file of safetensors.
        nets: nets that it may be about.
        name: name that the adapter gets on each of them.

    Raises:
        UserError: no such file, or none of safetensors; a key that fits no layer, comes twice, lacks its other half
            or has another shape; a name that is taken.
    """
    path = Path(path)
    tensors, config = _opened(path)
    found: dict[tuple[Component, str], dict[str, tuple[str, Tensor]]] = {}
    known = _known(nets)
    for key, value in sorted(tensors.items()):
        component, place, kind = _placed(path, key, known, nets)
        other = found.setdefault((component, place), {}).setdefault(kind, (key, value))[0]
        if other != key:
            raise _refused(path, f"{key} and {other} are of one layer")
    layers = {component: lora.places(one.net) for component, one in nets.items()}
    made = {at: _pair(path, layers[at[0]][at[1]].shape, halves) for at, halves in found.items()}
    alphas = {at: _alpha(path, config, nets, at, halves) for at, halves in found.items()}
    if any(name in lora.names(one.net) for one in nets.values()):
        raise UserError(".name", name, "an adapter has this name already", f".name={name}_2")
    for component, one in nets.items():
        sizes = {at[1]: (len(made[at][0]), alphas[at]) for at in made if at[0] == component}
        if sizes:
            lora.attach(one.net, name, sizes)
        for place, block in lora.adapters(one.net, name).items():
            down, up = made[component, place]
            block.down.weight.data.copy_(_turned(one, place, down))
            block.up.weight.data.copy_(up)


def write(path: Path | str, nets: dict[Component, Known], name: str, layout: Layout) -> None:
    """Write an adapter of the nets of a pipeline into one file, which is replaced.

    Args:
        path: file to write.
        nets: nets, of which those count that have an adapter of this name.
        name: name of the adapter.
        layout: layout of the keys.

    Raises:
        UserError: no adapter is called so, or its layers have no names in this layout.
    """
    tensors, header = {}, {}
    for component, one in nets.items():
        blocks = lora.adapters(one.net, name)
        for place, block in blocks.items():
            stem = _stem(layout, component, one, place, several="text_encoder_2" in nets)
            down, up = (half.weight.detach().cpu().clone() for half in (block.down, block.up))
            down = _turned(one, place, down)
            if down.ndim == 2 and one.diffusers(place).endswith(one.convolutions):
                down, up = down[:, :, None, None], up[:, :, None, None]
            a, b = ("lora_down", "lora_up") if layout == "kohya" else ("lora_A", "lora_B")
            tensors |= {f"{stem}.{a}.weight": down, f"{stem}.{b}.weight": up}
            if layout != "diffusers":
                tensors[f"{stem}.alpha"] = torch.tensor(float(block.alpha))
        if blocks and layout == "diffusers":
            header |= {f"{component}.{key}": value for key, value in _config(component, one, blocks).items()}
    if not tensors:
        raise UserError(".name", name, "no adapter is called so", f".name={_first_name(nets)}")
    described = {METADATA: json.dumps(header, sort_keys=True)} if header else {}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.tmp")
    save_file(tensors, part, metadata={"format": "pt"} | described)
    part.replace(path)


# ---- names


def _stem(layout: Layout, component: Component, one: Known, place: str, several: bool) -> str:
    """What the keys of a place begin with."""
    theirs = one.diffusers(place)
    if component != "unet":
        theirs = CLIP + theirs.removeprefix(CLIP)
    if layout == "kohya":
        return KOHYA[component][-1 if several else 0] + theirs.replace(".", "_")
    if layout == "diffusers" or component != "unet":
        return f"{component}.{theirs}"
    if one.original is None:
        raise UserError(".layout", layout, "its names for this net are not known", ".layout=diffusers")
    return f"diffusion_model.{one.original(place)}"


def _known(nets: dict[Component, Known]) -> dict[str, set[tuple[Component, str]]]:
    """All that keys may begin with -> what that can mean, more than one thing where "_" stands for "."."""
    known: dict[str, set[tuple[Component, str]]] = {}
    for component, one in nets.items():
        for place in lora.places(one.net):
            theirs = {one.diffusers(place)}
            if component != "unet":
                theirs |= {CLIP + name.removeprefix(CLIP) for name in theirs}
                theirs |= {name.removeprefix(CLIP) for name in theirs}
            bare = {front + name for name in theirs for front in ("", "base_model.model.")}
            stems = bare | {f"{component}.{name}" for name in bare}
            if component == "unet" and one.original is not None:
                theirs.add(one.original(place))
                stems.add(f"diffusion_model.{one.original(place)}")
            stems |= {front + name.replace(".", "_") for name in theirs for front in KOHYA[component]}
            for stem in stems:
                known.setdefault(stem, set()).add((component, place))
    return known


def _placed(
    path: Path, key: str, known: dict[str, set[tuple[Component, str]]], nets: dict[Component, Known]
) -> tuple[Component, str, str]:
    """The net and place that a key is about, and which of "A", "B" and "alpha" it is."""
    match = KEY.fullmatch(key)
    if match is None:
        raise _refused(path, f"{key} is no A, B or alpha of low rank")
    stem, half, alpha = match.groups()
    meant = known.get(stem, set())
    if len(meant) > 1:
        raise _refused(path, f"{key} can mean {' and '.join(place for _, place in sorted(meant))}")
    if not meant:
        raise _refused(path, f"{key} fits no layer of {' or '.join(nets)}")
    return *next(iter(meant)), alpha or HALVES[half]


# ---- what a file holds


def _opened(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, and what it says of them beside: peft's config, by component or of the one net."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            config = (file.metadata() or {}).get(METADATA, "{}")
        beside = path.with_name(PEFT_CONFIG)
        if path.name == PEFT_FILE and beside.exists():
            config = beside.read_text(encoding="utf-8")
    except SafetensorError as error:
        raise _refused(path, "no whole file of safetensors; pickled files are not read") from error
    except OSError as error:
        raise _refused(path, "no such file") from error
    if not tensors:
        raise _refused(path, "it holds no adapters")
    try:
        found = json.loads(config)
    except ValueError as error:
        raise _refused(path, f"{METADATA} is no JSON") from error
    return tensors, found if isinstance(found, dict) else {}


def _pair(path: Path, weight: tuple[int, ...], halves: dict[str, tuple[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """A and B in the shapes that they have beside a layer's weight of that shape."""
    for half, other in (("A", "B"), ("B", "A")):
        if half not in halves:
            raise _refused(path, f"{halves.get(other, next(iter(halves.values())))[0]} lacks its {half}")
    (key_a, a), (key_b, b) = halves["A"], halves["B"]
    rows, *others = weight
    rank = a.shape[0] if a.ndim else 0
    shapes = {key_a: (a, (rank, *others)), key_b: (b, (rows, rank, *[1] * (len(others) - 1)))}
    found = []
    for key, (value, shape) in shapes.items():
        if not rank or _trimmed(value.shape) != _trimmed(shape):
            raise _refused(path, f"{key} is {_sized(value.shape)}, this net takes {_sized([n or 'r' for n in shape])}")
        if not value.isfinite().all():
            raise _refused(path, f"{key} is not finite")
        found.append(value.reshape(shape))
    return found[0], found[1]


def _turned(one: Known, place: str, down: Tensor) -> Tensor:
    """A with its columns in the order of the other side, where cosines and sines change places."""
    return down.roll(down.shape[1] // 2, dims=1) if one.diffusers(place) in one.cosines_first else down


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the two axes of a 1x1 kernel: a linear layer's."""
    return tuple(shape[:2]) if tuple(shape[2:]) == (1, 1) else tuple(shape)


def _sized(shape: Sequence[int | str]) -> str:
    return "x".join(map(str, shape)) or "a number"


# ---- alpha


def _alpha(
    path: Path,
    config: dict[str, Any],
    nets: dict[Component, Known],
    at: tuple[Component, str],
    halves: dict[str, tuple[str, Tensor]],
) -> float:
    """The alpha of a place: of its key, else of the config, else its rank."""
    component, place = at
    if "alpha" in halves:
        key, value = halves["alpha"]
        if value.numel() != 1 or not value.isfinite().all():
            raise _refused(path, f"{key} is no number")
        return float(value)
    front = f"{component}."
    said = {key.removeprefix(front): value for key, value in config.items() if key.startswith(front)} or config
    if odd := [key for key in ("use_rslora", "use_dora") if said.get(key)]:
        raise _refused(path, f"its {METADATA} says {odd[0]}, which is not supported")
    name = nets[component].diffusers(place)
    alphas = said.get("alpha_pattern") or {}
    try:
        fitting = (value for key, value in alphas.items() if re.fullmatch(rf"(.*\.)?({key})", name))
        alpha = float(next(fitting, said.get("lora_alpha", halves["A"][1].shape[0])))
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise _refused(path, f"the alphas of its {METADATA} cannot be read") from error
    if not math.isfinite(alpha):
        raise _refused(path, f"the alpha of {name} in its {METADATA} is not finite")
    return alpha


def _config(component: Component, one: Known, blocks: dict[str, lora.LowRank]) -> dict[str, Any]:
    """What peft has to be told to build these adapters: ranks and alphas, the most common ones once."""
    called = {one.diffusers(place).removeprefix(CLIP): block for place, block in blocks.items()}
    rank = Counter(block.rank for block in blocks.values()).most_common(1)[0][0]
    alpha = Counter(block.alpha for block in blocks.values()).most_common(1)[0][0]
    start = "^" if component == "unet" else ""  # a text encoder's names may have CLIP in front
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {start + name: block.rank for name, block in called.items() if block.rank != rank},
        "alpha_pattern": {start + name: block.alpha for name, block in called.items() if block.alpha != alpha},
        "target_modules": sorted(called),
    }


def _first_name(nets: dict[Component, Known]) -> str:
    return next((name for one in nets.values() for name in lora.names(one.net)), "style")


def _refused(path: Path, problem: str) -> UserError:
    return UserError("adapters", path, problem, "adapters=FILE for this net")
