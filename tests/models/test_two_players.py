"""Both players see augmented images everywhere, no weights learn in the other's turn, optimizers are as declared."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from atelier.models.two_players import TwoPlayers, no_weight_grads
from atelier.runs import build
from tests.compose import composed
from tests.conftest import overrides
from tests.counting import Counting
from tests.test_architecture import families


def members(family: str) -> list[type[TwoPlayers]]:
    """The classes of two players that a family's module defines and that are no abstract base."""
    module = importlib.import_module(f"atelier.models.{family}")
    classes = [kind for _, kind in inspect.getmembers(module, inspect.isclass) if kind.__module__ == module.__name__]
    return [kind for kind in classes if issubclass(kind, TwoPlayers) and not inspect.isabstract(kind)]


PLAYERS = sorted(family for family in families() if members(family))
AUGMENTED = [
    family for family in PLAYERS for kind in members(family) if "augment" in inspect.signature(kind).parameters
]
RELATIVISTIC = "adversarial@model.loss=relativistic"  # the generator's loss sees real images too


class Marked(nn.Module):
    """Any image becomes 7 everywhere, in the graph of what it was."""

    def forward(self, x: Tensor) -> Tensor:
        return 0 * x + 7

    def observe(self, real: Tensor) -> dict[str, Tensor]:
        return {}


def stepped(family: str, monkeypatch: pytest.MonkeyPatch, *words: str) -> TwoPlayers:
    """A tiny model whose optimizers are real and whose backward passes need no Trainer."""
    torch.manual_seed(0)
    model = build.model(composed(*overrides(family), *words), Path("unused"))
    optimizers = model.configure_optimizers()
    monkeypatch.setattr(model, "optimizers", lambda: optimizers)
    monkeypatch.setattr(model, "manual_backward", lambda loss: loss.backward())
    return model


def batch(n: int = 4) -> dict[str, Tensor]:
    return {"image": torch.rand(n, 3, 8, 8), "label": torch.arange(n), "attributes": torch.ones(n, 14)}


def test_there_are_families_with_augmentation() -> None:
    assert set(AUGMENTED) >= {"gan", "stylegan2"}


@pytest.mark.parametrize("family", AUGMENTED)
def test_whatever_the_discriminator_sees_is_augmented(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its own step, in a step for a penalty, and in the generator's: real and generated images."""
    model, seen, ends = stepped(family, monkeypatch, RELATIVISTIC), [], []
    model.augment = Marked()
    model.discriminator.register_forward_pre_hook(lambda net, args: seen.append(args[0].detach()))
    kept = model.step
    monkeypatch.setattr(model, "step", lambda *given: (ends.append((given[2], len(seen))), kept(*given)))
    for k in range(2):
        model.training_step(batch(), k)
    assert ends[0] == ("discriminator", 2) and "generator" in dict(ends)
    assert len(seen) >= 2 * 2 + 2 and all((x == 7).all() for x in seen)


@pytest.mark.parametrize("family", AUGMENTED)
def test_ada_hears_of_real_images_once_a_batch(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = stepped(family, monkeypatch, "model.augment.every_images=1000")
    for k in range(2):
        model.training_step(batch(), k)
    assert model.augment.seen == 8 and "ada_p" in model.reported


def test_weights_without_grads_get_none_and_frozen_ones_stay_frozen() -> None:
    net = nn.Linear(2, 2)
    net.bias.requires_grad_(False)
    x = torch.ones(1, 2, requires_grad=True)
    with pytest.raises(RuntimeError), no_weight_grads(net):
        net(x).sum().backward()
        assert net.weight.grad is None and x.grad is not None
        raise RuntimeError
    assert net.weight.requires_grad and not net.bias.requires_grad


@pytest.mark.parametrize("family", PLAYERS)
def test_each_optimizer_holds_what_is_trained_of_its_player(family: str) -> None:
    """In the declared order, without what is frozen, and nothing of the other's."""
    model = build.model(composed(*overrides(family)), Path("unused"))
    next(getattr(model, model.players[0][0]).parameters()).requires_grad_(False)
    for optimizer, nets in zip(model.configure_optimizers(), model.players, strict=True):
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        weights = [p for name in nets for p in getattr(model, name).parameters()]
        assert held == [id(p) for p in weights if p.requires_grad]
    assert len([p for p in model.parameters() if not p.requires_grad]) == 1


@pytest.mark.parametrize("family", PLAYERS)
def test_a_step_reads_no_number_off_the_device(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU would have to finish first; what a first step looks at once is left out."""
    model = stepped(family, monkeypatch)
    size, n = (16, 4) if family == "srgan" else (8, 4)
    x = torch.rand(n, 3, size, size)
    shown = batch(n) | dict.fromkeys(("image", "image_a", "image_b", "source"), x) | {"target": torch.ones(n, 14)}
    shown["source"] = x[:, :, ::4, ::4] if family == "srgan" else x
    given = range(2) if "batch_idx" in inspect.signature(model.training_step).parameters else ()
    model.training_step(shown, *given[:1])
    model.images_seen = 1000
    model.training_step(shown, *given[1:])
    monkeypatch.setattr(Tensor, "tolist", lambda x: pytest.fail("the device was asked"))
    with Counting() as counted:
        model.training_step(shown, *given[:1])
    assert counted.waits == 0 and sum(counted.flop.values()) > 0
