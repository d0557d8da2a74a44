"""What feeds what in a model, seen while it runs: its parts, their parameters and work, and the arrows between them."""

from __future__ import annotations

import dataclasses
import functools
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from torch.utils.flop_counter import flop_registry
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from atelier.core.batch import Batch, Cond
from atelier.core.rng import ImageRngs
from atelier.evaluation.evaluator import sample
from atelier.models.base import Generator, Model
from atelier.nets.frozen import Frozen

NOISE, LOSS, RESULT = "noise", "loss", "result"
RANDOM = ("rand", "normal", "uniform", "bernoulli", "multinomial")  # how the names of operations that draw begin
SPLIT = ({"encoder", "decoder"}, {"mapping", "synthesis"}, {"text", "image"})  # children that are parts of their own


@dataclasses.dataclass
class Part:
    """A net, or a part of one that is used on its own.

    Args:
        name: attribute of the model, dotted.
        parameters: number of them.
        frozen: whether it is held as it was trained before.
        gflop: work of its forward passes, an image.
        calls: evaluations for an image.
    """

    name: str
    parameters: int
    frozen: bool
    gflop: float
    calls: int


@dataclasses.dataclass
class Structure:
    """Parts in the order of their first calls, and arrows between names of sources, parts and what comes out."""

    parts: list[Part]
    arrows: list[tuple[str, str]]

    @property
    def sources(self) -> list[str]:
        """What no part makes: fields of the batch, and noise."""
        known = {part.name for part in self.parts}
        return list(dict.fromkeys(a for a, _ in self.arrows if a not in known))

    @property
    def result(self) -> str:
        return next((b for _, b in self.arrows if b in (LOSS, RESULT)), RESULT)

    @property
    def evaluations(self) -> int:
        """How often the net that is called most is evaluated for an image."""
        return max((part.calls for part in self.parts), default=0)

    @property
    def gflop(self) -> float:
        return sum(part.gflop for part in self.parts)


def of_sampling(model: Generator, cond: Cond) -> Structure:
    """What runs when an image is made, of a model in eval mode; `cond` is the condition of that one image."""
    watch = _Watch(model)
    watch.mark(cond)
    with torch.no_grad(), watch.looking():  # inference mode would hide what an operation is made of
        watch.reaches(sample(model, cond, ImageRngs(0, 0, 1), {}), RESULT)
    return watch.seen(1)


def of_training(model: Model, batch: Batch) -> Structure:
    """What runs forward in a step of training on a batch of its set; the step changes the model's weights."""
    watch, step, backward = _Watch(model), model.training_step, model.manual_backward
    watch.mark(batch)

    @functools.wraps(step)  # Lightning looks at what it takes
    def watched(*given: Any) -> Any:
        with watch.looking():
            loss = step(*given)
        if loss is not None:
            watch.reaches(loss, LOSS)
        return loss

    def stepped(loss: Tensor, *given: Any) -> None:
        watch.reaches(loss, LOSS)
        with watch.paused():
            backward(loss, *given)

    model.averages = {name: getattr(model, name) for name in model.ema_nets} if not model.averages else model.averages
    model.training_step, model.manual_backward = watched, stepped
    try:
        _fit(model.train(), batch)
    finally:
        del model.training_step, model.manual_backward
        model.eval()
    return watch.seen(len(batch["index"]))


def _fit(model: Model, batch: Batch) -> None:
    """One step of Lightning's, which has nothing to say about a trial."""
    told, once = logging.getLogger("lightning.pytorch"), DataLoader([batch], batch_size=None)
    level = told.level
    told.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Trainer(accelerator="cpu", max_epochs=1, limit_train_batches=1, barebones=True).fit(model, once)
    finally:
        told.setLevel(level)


def parts(model: Model) -> Iterator[tuple[str, nn.Module, bool]]:
    """The nets of a model: name, net, and whether it is held frozen.

    These are its children that have weights, and children of these where they are used alone.
    """
    for name, child in model.named_children():
        yield from _split(name, child, False)


def _split(name: str, module: nn.Module, frozen: bool) -> Iterator[tuple[str, nn.Module, bool]]:
    module, frozen = (module.net, True) if isinstance(module, Frozen) else (module, frozen)
    children = dict(module.named_children())
    if any(kind <= set(children) for kind in SPLIT):
        yield from ((f"{name}.{key}", child, frozen) for key, child in children.items())
    elif not any(True for _ in _weights(module)):
        return
    elif len(children) == 1 and not any(True for _ in module.parameters(recurse=False)):
        (only,) = children.values()
        inner = list(_split(name, only, frozen))
        yield from inner if len(inner) > 1 else [(name, module, frozen)]
    elif any(isinstance(child, Frozen) for child in children.values()):
        for key, child in children.items():
            yield from _split(f"{name}.{key}", child, frozen)
    else:
        yield name, module, frozen


def _weights(module: nn.Module) -> Iterator[nn.Parameter]:
    """Those of nets that it holds frozen too."""
    yield from module.parameters()
    for child in module.modules():
        if isinstance(child, Frozen):
            yield from child.net.parameters()


class _Watch(TorchDispatchMode):
    """Follows tensors from operation to operation, each with the names of what it was last made by."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.found = {name: part for name, part, _ in parts(model)}
        self.frozen = {name for name, _, frozen in parts(model) if frozen}
        self.part_of = {inner: name for name, part in self.found.items() for inner in part.modules()}
        self.made_by: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.field_of: dict[str, str] = {}  # text -> field of the batch or the condition
        self.inside: list[nn.Module] = []  # modules that run now
        self.arrows: dict[tuple[str, str], None] = {}  # in the order in which they were seen
        self.called: dict[str, Counter[nn.Module]] = {}  # part -> its outermost modules, and how often each ran
        self.flop: Counter[str] = Counter()

    def mark(self, given: Any) -> None:
        """Name the fields of a batch or a condition, tensors and texts, as what is made of them."""
        for name, value in given.items():
            for tensor in _tensors(value):
                self.made_by[tensor] = frozenset({name})
            self.field_of |= dict.fromkeys(_texts(value), name)

    @contextmanager
    def looking(self) -> Iterator[None]:
        hooks = [hook for module in self.part_of for hook in self._hooked(module)]
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For a backward pass, which is no part of what is drawn."""
        with torch.utils._python_dispatch._disable_current_modes():
            yield

    def _hooked(self, module: nn.Module) -> list[RemovableHandle]:
        return [
            module.register_forward_pre_hook(self._enter, with_kwargs=True),
            module.register_forward_hook(self._leave, always_call=True),
        ]

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self.inside:
            name = self.part_of[module]
            self.called.setdefault(name, Counter())[module] += 1
            for tensor in _tensors([args, kwargs]):
                self.reaches(tensor, name)
            fields = dict.fromkeys(self.field_of[text] for text in _texts([args, kwargs]) if text in self.field_of)
            self.arrows |= {(field, name): None for field in fields}
        self.inside.append(module)

    def _leave(self, module: nn.Module, args: tuple, out: Any) -> None:
        self.inside.pop()
        if not self.inside:
            for tensor in _tensors(out):
                self.made_by[tensor] = frozenset({self.part_of[module]})

    def reaches(self, tensor: Tensor, name: str) -> None:
        """An arrow from each of what a tensor was made by."""
        self.arrows |= {(source, name): None for source in sorted(self.made_by.get(tensor, ())) if source != name}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.inside:
            if formula := flop_registry.get(func._overloadpacket):
                self.flop[self.part_of[self.inside[0]]] += formula(*args, **(kwargs or {}), out_val=out)
            return out
        given = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)]
        names = frozenset().union(*(self.made_by.get(x, frozenset()) for x in given))
        drawn = func._overloadpacket.__name__.startswith(RANDOM)
        for made in tree_leaves(out):
            if isinstance(made, Tensor) and (names or drawn):
                whole = made._base if drawn and made._base is not None else made  # noise is drawn row by row
                self.made_by[whole] = names | {NOISE} if drawn else names
        return out

    def seen(self, n: int) -> Structure:
        """What was seen of n images."""
        told = [
            Part(
                name,
                sum(p.numel() for p in self.found[name].parameters()),
                name in self.frozen,
                self.flop[name] / n / 1e9,
                max(calls.values()),
            )
            for name, calls in self.called.items()
        ]
        return Structure(told, _plain([*self.arrows], {part.name for part in told}))


def _plain(arrows: list[tuple[str, str]], names: set[str]) -> list[tuple[str, str]]:
    """Without those from a source to the end that also reaches it through a part."""
    feeding = {a for a, b in arrows if b in names}
    return [(a, b) for a, b in arrows if b in names or a in names or a not in feeding]


def _tensors(node: Any) -> Iterator[Tensor]:
    """All tensors of lists, dicts and dataclasses."""
    return (leaf for leaf in _leaves(node) if isinstance(leaf, Tensor))


def _texts(node: Any) -> Iterator[str]:
    """All texts of lists, dicts and dataclasses; the empty one stands for no text."""
    return (leaf for leaf in _leaves(node) if isinstance(leaf, str) and leaf)


def _leaves(node: Any) -> Iterator[Any]:
    if dataclasses.is_dataclass(node):
        yield from _leaves([getattr(node, part.name) for part in dataclasses.fields(node)])
    elif isinstance(node, dict):
        yield from _leaves(list(node.values()))
    elif isinstance(node, list | tuple):
        for child in node:
            yield from _leaves(child)
    else:
        yield node
