"""When which level is trained, what is forgotten, and that a batch in microbatches is the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from atelier.core.rng import ImageRngs
from atelier.models.growing import Growing, reset_optimizer_state
from atelier.runs import build
from tests.compose import composed
from tests.conftest import overrides
from tests.players import learned


def made(page: str = "stylegan", *words: str) -> Growing:
    torch.manual_seed(0)
    return build.model(composed(*overrides(page), *words), Path("unused"))


def batch(n: int = 8) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"image": torch.rand(n, 3, 8, 8), "label": torch.arange(n), "attributes": torch.ones(n, 14)}


def cond(n: int) -> dict[str, Tensor]:
    return {name: batch(n)[name] for name in ("label", "attributes")}


@pytest.fixture(params=["progan", "stylegan"])
def model(request: pytest.FixtureRequest) -> Growing:
    return made(request.param)


def taken(model: Growing, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[torch.optim.Optimizer]]:
    """Real optimizers, whose steps are named."""
    names: list[str] = []
    optimizers = model.configure_optimizers()
    monkeypatch.setattr(model, "optimizers", lambda: optimizers)
    monkeypatch.setattr(model, "manual_backward", lambda loss: loss.backward())
    monkeypatch.setattr(model, "take", lambda optimizer, name: names.append(name) or optimizer.step())
    return names, optimizers


@pytest.mark.parametrize(("fade", "levels"), [
    (100, {0: 0, 49: 0, 50: 1 / 101, 100: 51 / 101, 149: 100 / 101, 150: 1, 199: 1, 200: 1 + 1 / 101, 300: 2,
           350: 2 + 1 / 101, 450: 3, 10**6: 3}),
    (0, {0: 0, 49: 0, 50: 1, 99: 1, 100: 2, 150: 3, 400: 3}),
])  # fmt: skip
def test_the_level_by_images_seen(fade: int, levels: dict[int, float]) -> None:
    model = made("progan")
    model.stable_images, model.fade_images, model.discriminator.top = 50, fade, 3
    for seen, level in levels.items():
        model.images_seen = seen
        assert model.level() == pytest.approx(level), seen


def test_moments_are_forgotten_when_a_level_begins_and_only_then(
    model: Growing, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, optimizers = taken(model, monkeypatch)
    shapes = [[p.shape for group in o.param_groups for p in group["params"]] for o in optimizers]
    keys = set(model.state_dict())
    steps = []
    for model.images_seen in (0, 8, 16, 24, 32, 40, 48):
        model.training_step(batch())
        steps.append([max(s["step"].item() for s in o.state.values()) for o in optimizers])
    assert names == ["discriminator", "generator"] * 7
    assert [step[0] for step in steps] == [step[1] for step in steps] == [1, 2, 1, 2, 3, 4, 5]
    assert [[p.shape for group in o.param_groups for p in group["params"]] for o in optimizers] == shapes
    assert set(model.state_dict()) == keys and {"at", "grown"} < keys
    assert model.at == 1 and model.grown == 1


def test_forgetting_is_starting_anew() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([p], lr=0.1)
    p.sum().backward()
    optimizer.step()
    reset_optimizer_state(optimizer)
    assert not any(value.any() for value in optimizer.state[p].values())


@pytest.mark.parametrize("page", ["progan", "stylegan"])
def test_a_batch_in_microbatches_has_the_gradients_of_the_whole(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same noise everywhere and nothing that compares images."""
    monkeypatch.setattr(torch, "randn", lambda *shape, device=None: torch.full(shape, 0.3))
    monkeypatch.setattr(torch, "rand", lambda *shape, device=None: torch.full(shape, 0.5))
    found = []
    for parts in ("[1]", "[3]", "[1,3]"):
        model = made(page, f"model.microbatches={parts}", "model.drift=0.1")
        monkeypatch.setattr(model.discriminator.spread, "forward", lambda x: torch.cat([x, x[:, :1]], dim=1))
        gradients: list[Tensor] = []
        taken(model, monkeypatch)
        monkeypatch.setattr(model, "take", lambda optimizer, name, model=model, into=gradients: into.extend(
            p.grad.clone() for p in model.parameters() if p.grad is not None))  # fmt: skip
        model.images_seen = 24  # in the fade
        model.training_step(batch())
        found.append(gradients)
    assert found[0]
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_microbatches_hold_every_image_once_with_its_condition() -> None:
    model, whole = made(), batch(7)
    model.microbatches = [3]
    parts = model.microbatches_of(whole, 0.0)
    assert [len(x) for x, _ in parts] == [3, 2, 2]
    assert torch.cat([cond["label"] for _, cond in parts]).sort().values.tolist() == list(range(7))
    for x, known in parts:
        assert torch.equal(x, whole["image"][known["label"]])


def test_samples_are_of_the_last_level_that_was_trained_at_full_size(
    model: Growing, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken(model, monkeypatch)
    for seen, flat in ((0, True), (48, False)):
        model.images_seen = seen
        model.training_step(batch())
        with torch.no_grad():
            x = model.sample(cond(2), ImageRngs(0, 0, 2))
        assert x.shape == (2, 3, 8, 8)
        corners = x[:, :, ::2, ::2]
        assert torch.equal(x, corners.repeat_interleave(2, 2).repeat_interleave(2, 3)) == flat


def test_a_generator_step_leaves_the_discriminator_alone(model: Growing) -> None:
    model._generator_loss(batch()["image"], cond(8), model.level()).backward()
    assert learned(model.generator) and not learned(model.discriminator)
    assert all(p.requires_grad for p in model.discriminator.parameters())


def test_losses_and_images_are_float32_under_bf16(model: Growing, monkeypatch: pytest.MonkeyPatch) -> None:
    losses, seen = [], []
    taken(model, monkeypatch)
    monkeypatch.setattr(model, "manual_backward", lambda loss: losses.append(loss.dtype))
    model.discriminator.score.register_forward_hook(lambda net, args, out: seen.append(out.dtype))
    model.images_seen, model.r1_gamma, model.gp_weight = 24, 1.0, 0.0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.training_step(batch())
        x = model.sample(cond(2), ImageRngs(0, 0, 2))
    assert set(losses) == {x.dtype} == {torch.float32}
    assert {v.dtype for v in model.reported.values()} == {torch.float32}
    assert seen == 2 * [torch.float32, torch.bfloat16] + 2 * [torch.bfloat16]  # R1's of two microbatches; all others


def test_a_loaded_model_has_grown_as_far_as_it_had(model: Growing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its optimizers forget nothing when it goes on, also where another had begun in its place."""
    _, optimizers = taken(model, monkeypatch)
    model.images_seen = 48
    model.training_step(batch())
    grown = {name: value.clone() for name, value in model.state_dict().items()}
    for name, value in model.state_dict().items():
        if name == "grown":
            value.zero_()
    model.load_state_dict(model.state_dict() | {"grown": torch.zeros((), dtype=torch.int64)})
    model.training_step(batch())
    assert max(s["step"].item() for s in optimizers[0].state.values()) == 1  # it grew anew
    model.load_state_dict(grown)
    model.training_step(batch())
    assert max(s["step"].item() for s in optimizers[0].state.values()) == 2
