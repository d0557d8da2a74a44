"""Adapters of low rank on the layers of a net whose own weights stay   (Hu et al. 2021, LoRA).

A layer with weight W and input x gives W x + w (alpha / r) B A x, where A ("down", r rows) starts random and B ("up",
r columns) at 0. Of a convolution A has its kernel, stride and padding and B is 1x1. The layer stays in its place and
keeps the names of its weights; its adapters lie beside them, as `LAYER.lora.NAME.PART.down.weight`.

A layer called `qkv` or `kv` holds three or two layers, one below the other. Each of them has A and B of its own, and
goes by a name of its own, `LAYER.q`: so a file that has them apart is held as it is, B's rows in the part's block.

    place   what can have an adapter: a layer, by its name in the net, or a part of a layer
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from atelier.core.errors import UserError, nearest
from atelier.core.ranges import Name, Names, PositiveFloat, PositiveInt
from atelier.nets.layers import zeroed
from atelier.nets.widening import PlanesConv2d

KINDS = (nn.Linear, nn.Conv2d, PlanesConv2d)  # exactly these: others use their weight in ways of their own
TRAINED = "trained"  # name of what a run trains
WHOLE = ("all",)
PARTS = {"qkv": ("q", "k", "v"), "kv": ("k", "v")}  # last word of a linear layer's name -> what it holds


@dataclass(frozen=True)
class Recipe:
    """Which layers of a model get an adapter, which alone is trained.

    Args:
        rank: r.
        alpha: strength, which is alpha / r.
        targets: layers of the denoising net, as `add` takes them.
        text_targets: layers of each text encoder, in the same words; []: none is adapted.
    """

    rank: PositiveInt
    alpha: PositiveFloat
    targets: Names
    text_targets: list[Name]

    def on(self, net: nn.Module) -> None:
        """Put the adapter, called `TRAINED`, on a denoising net."""
        add(net, name=TRAINED, targets=self.targets, rank=self.rank, alpha=self.alpha)

    def refuse_no_texts(self, embedder: nn.Module) -> None:
        """Raises UserError where text encoders are to be adapted of an embedder, which has none."""
        if self.text_targets:
            problem = f"{type(embedder).__name__} reads no texts"
            raise UserError(".text_targets", self.text_targets, problem, ".text_targets=[]")

    def on_text(self, net: nn.Module) -> None:
        """The same on a text encoder, if any of its layers are named.

        Raises:
            UserError: a target that it has not.
        """
        targets = self.text_targets
        add(net, name=TRAINED, targets=targets, rank=self.rank, alpha=self.alpha, key=".text_targets")


    def keep_reached(self, nets: list[nn.Module], outputs: list[Tensor]) -> None:
        """Of text encoders keep the adapters that an output depends on: others never learn, and ranks wait for them.

        Args:
            nets: encoders with the adapter.
            outputs: all that is used of what they give together, of any text.

        Raises:
            UserError: none of them does.
        """
        reached = [value.sum() for value in outputs if value.requires_grad]
        if not reached:
            problem = "no text goes through these layers"
            raise UserError(".text_targets", self.text_targets, problem, ".text_targets=[qkv]")
        sum(reached).backward()
        for net in nets:
            known = places(net)
            for place, block in adapters(net, TRAINED).items():
                if block.up.weight.grad is None:
                    _take_off(known[place], TRAINED)
                block.zero_grad()


@dataclass(frozen=True)
class Place:
    """A layer, or the one of several parts of it, one below the other, that is called `part`."""

    layer: nn.Module
    part: str
    parts: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of its weight: rows, and what a row has."""
        rows, *others = self.layer.weight.shape
        return rows // len(self.parts), *others


class LowRank(nn.Module):
    """x -> w (alpha / r) B A x of a layer or a part of it   (Hu et al. 2021, section 4.1).

    Args:
        layer: layer whose input it takes.
        rows: numbers, or channels, that it gives.
        rank: r.
        alpha: strength, which is alpha / r.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, rows: int, rank: int, alpha: float) -> None:
        super().__init__()
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)  # also where the layer is halved
        like = {"bias": False, "device": layer.weight.device, "dtype": dtype}
        if isinstance(layer, nn.Conv2d):
            how = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
            self.down = nn.Conv2d(layer.in_channels, rank, *how, padding_mode=layer.padding_mode, **like)
            self.up = nn.Conv2d(rank, rows, 1, **like)
        else:
            self.down, self.up = nn.Linear(layer.in_features, rank, **like), nn.Linear(rank, rows, **like)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        zeroed(self.up)
        self.rank, self.alpha = rank, alpha

    def forward(self, x: Tensor, weight: float) -> Tensor:
        """What is added to the layer's output for x, w = `weight`."""
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.down.weight.dtype)  # a halved layer's input is bf16
        return self.up(self.down(x) * (weight * self.alpha / self.rank))

    def change(self, weight: float) -> Tensor:
        """What is added to the layer's weight in its place, of that weight's shape."""
        return torch.einsum("or,r...->o...", self.up.weight.flatten(1), self.down.weight) * (
            weight * self.alpha / self.rank
        )


class Blocks(nn.ModuleDict):
    """One adapter of a layer: for each part of it that is adapted, by name, a `LowRank`."""

    def __init__(self, parts: tuple[str, ...]) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, x: Tensor, weight: float) -> Tensor:
        given = {part: block(x, weight) for part, block in self.items()}
        return self._below(given, -1)

    def change(self, weight: float) -> Tensor:
        return self._below({part: block.change(weight) for part, block in self.items()}, 0)

    def _below(self, given: dict[str, Tensor], dim: int) -> Tensor:
        """All parts of what the layer gives, 0 where a part is not adapted."""
        if self.parts == WHOLE:
            return given["all"]
        nothing = torch.zeros_like(next(iter(given.values())))
        return torch.cat([given.get(part, nothing) for part in self.parts], dim)


class Adapters(nn.ModuleDict):
    """All adapters of a layer by name.

    `weights` are their w by name, and `kept` is the layer's weight without them while they are merged.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.weights: dict[str, float] = {}
        self.kept: Tensor | None = None
        self.hook: RemovableHandle = layer.register_forward_hook(_adapted)

    def active(self) -> list[tuple[Blocks, float]]:
        return [(self[name], weight) for name, weight in self.weights.items() if weight]


def _adapted(layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """The output of a layer with that of its adapters, but for merged ones, which are in it."""
    if layer.lora.kept is None:
        for blocks, weight in layer.lora.active():
            out = out + blocks(inputs[0], weight).to(out.dtype)
    return out


def places(net: nn.Module) -> dict[str, Place]:
    """Whatever in a net can have an adapter, by name."""
    found = {}
    for name, layer in _layers(net):
        if type(layer) in KINDS and getattr(layer, "groups", 1) == 1:
            parts = PARTS.get(name.rpartition(".")[2], WHOLE) if isinstance(layer, nn.Linear) else WHOLE
            found |= {name if parts == WHOLE else f"{name}.{part}": Place(layer, part, parts) for part in parts}
    return found


def add(
    net: nn.Module,
    *,
    name: str,
    targets: list[str],
    rank: PositiveInt,
    alpha: PositiveFloat,
    key: str = ".targets",
) -> None:
    """Put an adapter on layers of a net, of which it alone takes gradients from here on; what the net gives stays.

    A second call with the same name goes on with other layers, so that ranks may differ.

    Args:
        net: net of linear layers and convolutions.
        name: name of the adapter, a word.
        targets: ends of names (`to_q`, `attn1.to_q`, `qkv.q`); with other signs than dots, regular expressions of whole
            names.
        rank: r.
        alpha: strength at which it is trained, alpha / r.
        key: key of `targets`, for errors.

    Raises:
        UserError: a target that no layer has, or one of another kind of layer; a name that is no word.
    """
    attach(net, name, {place: (rank, alpha) for target in targets for place in _meant(net, target, key)})
    train_only(net, name)


def attach(net: nn.Module, name: str, sizes: dict[str, tuple[int, float]]) -> None:
    """Put an adapter on places that are known, each with its own rank and alpha; a merged net is unmerged first.

    Which weights of the net take gradients stays: torch may take another kernel where they do not, with other bits.

    Raises:
        UserError: a name that is no word, or that one of these places has.
    """
    if not name.isidentifier() or hasattr(Adapters(nn.Identity()), name):
        raise UserError(".name", name, "no word that an adapter can be called", ".name=style")
    known = places(net)
    taken = adapters(net, name)
    if twice := [place for place in sizes if place in taken]:
        raise UserError(".name", name, f"{twice[0]} has an adapter of this name", f".name={name}_2")
    unmerge(net)
    for place, (rank, alpha) in sizes.items():
        layer, part, parts = known[place].layer, known[place].part, known[place].parts
        if not hasattr(layer, "lora"):
            layer.lora = Adapters(layer)
        if name not in layer.lora:
            layer.lora[name], layer.lora.weights[name] = Blocks(parts), 1.0
        layer.lora[name][part] = LowRank(layer, known[place].shape[0], rank, alpha)


def train_only(net: nn.Module, name: str) -> None:
    """Of all weights of a net, those of one adapter alone take gradients from here on."""
    net.requires_grad_(False)
    for block in adapters(net, name).values():
        block.requires_grad_()


def _take_off(at: Place, name: str) -> None:
    """Take an adapter off a place, and what held it where that is empty then."""
    own = at.layer.lora
    del own[name][at.part]
    if not own[name]:
        del own[name], own.weights[name]
    if not own:
        own.hook.remove()
        del at.layer.lora


def adapters(net: nn.Module, name: str) -> dict[str, LowRank]:
    """What an adapter has put on a net, by the names of places; nothing where there is none of this name."""
    found = {}
    for place, at in places(net).items():
        if hasattr(at.layer, "lora") and name in at.layer.lora and at.part in at.layer.lora[name]:
            found[place] = at.layer.lora[name][at.part]
    return found


def names(net: nn.Module) -> list[str]:
    """What the adapters of a net are called, in the order in which they came."""
    return list(dict.fromkeys(name for layer in _adapted_layers(net) for name in layer.lora))


def weights(net: nn.Module) -> dict[str, float]:
    """How much each adapter of a net counts, by name."""
    return {name: weight for layer in _adapted_layers(net) for name, weight in layer.lora.weights.items()}


def weigh(net: nn.Module, weights: dict[str, float]) -> None:
    """Set how much of each adapter counts: w by name, 1 as it was trained; the others of the net are off.

    Raises:
        UserError: a name that no adapter of the net has.
    """
    known = names(net)
    if odd := [name for name in weights if name not in known]:
        fix = f".weights={{{known[0]}:1}}" if known else ".weights={}"
        raise UserError(".weights", odd[0], f"no adapter is called so, but {known}", fix)
    for layer in _adapted_layers(net):
        layer.lora.weights = {name: float(weights.get(name, 0)) for name in layer.lora}
    if any(layer.lora.kept is not None for layer in _adapted_layers(net)):
        merge(net)


@torch.no_grad()
def merge(net: nn.Module) -> None:
    """Add the adapters, as they are weighed, to the weights of their layers, and keep a copy of these weights.

    For sampling: a layer is then as fast as without them. Neither trained nor loaded until `unmerge`.
    """
    for layer in _adapted_layers(net):
        adapters = layer.lora
        if adapters.kept is None:
            adapters.kept = layer.weight.detach().clone()
        changes = [blocks.change(weight) for blocks, weight in adapters.active()]
        layer.weight.copy_(sum(changes, adapters.kept))


@torch.no_grad()
def unmerge(net: nn.Module) -> None:
    """Give the layers the weights that they had before `merge`, to the bit."""
    for layer in _adapted_layers(net):
        if layer.lora.kept is not None:
            layer.weight.copy_(layer.lora.kept)
            layer.lora.kept = None


def remove(net: nn.Module) -> None:
    """Take all adapters off; weights that they are merged into stay so, and the net is a plain one with them."""
    for layer in _adapted_layers(net):
        layer.lora.hook.remove()
        del layer.lora


def _layers(net: nn.Module) -> list[tuple[str, nn.Module]]:
    """All that is in a net by name, but for what adapters are made of."""
    inside = {part for layer in net.modules() if isinstance(layer, Adapters) for part in layer.modules()}
    return [(name, layer) for name, layer in net.named_modules() if name and layer not in inside]


def _adapted_layers(net: nn.Module) -> list[nn.Module]:
    return [layer for _, layer in _layers(net) if isinstance(getattr(layer, "lora", None), Adapters)]


def _meant(net: nn.Module, target: str, key: str) -> list[str]:
    """The places that a target, of the key, names.

    Raises:
        UserError: it names none, or a layer that can have no adapter.
    """
    try:
        pattern = re.compile(rf"(.*\.)?{re.escape(target)}" if re.fullmatch(r"[\w.]+", target) else target)
    except re.error as error:
        fix = f"{key}=[{target.lstrip('*.') or 'qkv'}]"
        raise UserError(key, target, f"no end of a name, and no regular expression: {error}", fix) from error
    known = places(net)
    fitting = {at.layer for at in known.values()}
    for name, layer in _layers(net):
        weight = getattr(layer, "weight", None)
        if pattern.fullmatch(name) and layer not in fitting and isinstance(weight, Tensor) and weight.ndim > 1:
            problem = f"{name} is of {type(layer).__name__}; adapters go on Linear, and Conv2d without groups"
            raise UserError(key, target, problem, f"{key}=[{_offered(target, known)}]")
    layers = {name: name if at.parts == WHOLE else name.rpartition(".")[0] for name, at in known.items()}
    found = [name for name, layer in layers.items() if pattern.fullmatch(name) or pattern.fullmatch(layer)]
    if not found:
        problem = "no Linear or Conv2d of the net is called so"
        raise UserError(key, target, problem, f"{key}=[{_offered(target, known)}]")
    return found


def _offered(target: str, known: dict[str, Place]) -> str:
    """The last words of the place that is called most like a target, which are letters."""
    name = nearest(target, known) or next(iter(known), "to_q")
    words = name.split(".")
    return ".".join(words[-2:] if words[-1].isdigit() or len(words[-1]) == 1 else words[-1:])
