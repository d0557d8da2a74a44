"""A penalty asks for float32 of the passes that it is the gradient of, on both ways, and of no other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.backends import cudnn

from atelier.models.two_players import TwoPlayers
from atelier.runs import build
from tests.compose import composed
from tests.conftest import overrides
from tests.models.test_two_players import batch

R1, GP = ("model.r1_gamma=1", "model.gp_weight=0"), ("model.r1_gamma=0", "model.gp_weight=10")
EACH, NO_NORM = "model.penalty_every=1", "model.discriminator.norm=none"
PENALISED = {  # words -> passes of the discriminator in float32, and in bf16, one of them for the generator
    ("gan", EACH): (1, 2),
    ("gan", EACH, "model.r2_gamma=1"): (2, 1),
    ("gan", EACH, *GP): (1, 3),
    ("gan", "model.penalty_every=1000"): (1, 3),
    ("stargan", *R1): (1, 2),
    ("stargan", *GP): (1, 3),
    ("progan", *R1): (1, 2),
    ("stylegan", *GP): (1, 3),
    ("srgan", NO_NORM, "model.r1_gamma=1"): (1, 3),
    ("srgan", NO_NORM, "model.r1_gamma=1", "model.r2_gamma=1"): (2, 2),
    ("stylegan2",): (1, 3),
}


def made(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> TwoPlayers:
    """A tiny model whose backward passes need no Trainer, and whose optimizers do nothing."""
    torch.manual_seed(0)
    family, *more = words
    model = build.model(composed(*overrides(family), *more), Path("unused"))
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.0)] * 2
    monkeypatch.setattr(model, "optimizers", lambda: optimizers)
    monkeypatch.setattr(model, "take", lambda optimizer, name: None)
    monkeypatch.setattr(model, "manual_backward", lambda loss: loss.backward())
    model.images_seen = 1000  # where some have grown
    model.microbatches, model.n_critic = [1], 1
    return model


def step(model: TwoPlayers, family: str) -> None:
    """The first batch, in bf16 where nothing asks for more."""
    size = 16 if family == "srgan" else 8
    images = {"image": torch.rand(4, 3, size, size), "source": torch.rand(4, 3, 4, 4), "target": torch.ones(4, 14)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.training_step(batch() | images, *([0] if family in ("gan", "stargan", "stylegan2") else []))


def kinds_of_passes(net: nn.Module) -> list[torch.dtype]:
    """Of each pass from now on: bf16 where any layer of it gave that, else float32."""
    passes: list[torch.dtype] = []
    given: set[torch.dtype] = set()
    for layer in net.modules():
        if layer is not net and not list(layer.children()):
            layer.register_forward_hook(lambda layer, args, out: given.add(out.dtype))

    def ended(*_: object) -> None:
        passes.append(torch.bfloat16 if torch.bfloat16 in given else torch.float32)
        given.clear()

    net.register_forward_hook(ended)
    return passes


@pytest.mark.parametrize("words", PENALISED, ids=" ".join)
def test_a_penalty_wants_float32_of_its_own_pass_alone(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """On the way there; the generator's turn, which has no penalty of the discriminator, is in bf16 altogether."""
    model = made(words, monkeypatch)
    passes = kinds_of_passes(model.discriminator)
    step(model, words[0])
    assert (passes.count(torch.float32), passes.count(torch.bfloat16)) == PENALISED[words]


@pytest.mark.parametrize("words", PENALISED, ids=" ".join)
def test_tf32_is_off_on_the_way_back_through_a_penalty_alone(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of a gradient multiplies anew, outside of where the gradient was taken."""
    model, seen = made(words, monkeypatch), []
    monkeypatch.setattr(model, "manual_backward", lambda loss: (seen.append(cudnn.allow_tf32), loss.backward()))
    assert cudnn.allow_tf32  # as PyTorch has it
    step(model, words[0])
    assert set(seen) == {True, False} and cudnn.allow_tf32
