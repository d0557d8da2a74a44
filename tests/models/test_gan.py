"""R1 in closed form, whose turn it is, and float32 where it matters."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from atelier import build, runs
from atelier.losses.adversarial import non_saturating_discriminator, non_saturating_generator
from atelier.losses.regularizers import r1
from atelier.models.gan import GAN
from atelier.rng import ImageRngs
from tests.compose import composed
from tests.conftest import overrides


def test_r1_of_a_linear_and_a_quadratic_discriminator() -> None:
    """D = w.x has ||w||^2 at every image, D = |x|^2 / 2 has |x|^2."""
    x = torch.randn(5, 3, 4, 4, requires_grad=True)
    w = torch.randn(3, 4, 4)
    assert r1((x * w).flatten(1).sum(1), x).item() == pytest.approx(w.square().sum().item(), rel=1e-6)
    quadratic = r1(x.square().flatten(1).sum(1) / 2, x)
    assert quadratic.item() == pytest.approx(x.square().flatten(1).sum(1).mean().item(), rel=1e-6)


def test_r1_can_be_learned_from() -> None:
    """d/dw ||w||^2 = 2 w."""
    x, w = torch.randn(4, 3, requires_grad=True), torch.randn(3, requires_grad=True)
    r1(x @ w, x).backward()
    torch.testing.assert_close(w.grad, 2 * w.detach())


def test_losses_by_hand() -> None:
    real, fake = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])
    expected = -(torch.sigmoid(real).log().mean() + (1 - torch.sigmoid(fake)).log().mean())
    torch.testing.assert_close(non_saturating_discriminator(real, fake), expected)
    torch.testing.assert_close(non_saturating_generator(fake), -torch.sigmoid(fake).log().mean())
    assert non_saturating_generator(torch.tensor([-200.0])) == 200  # no saturation, no infinity


class Optimizer:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def zero_grad(self) -> None: ...

    def step(self) -> None:
        self.log.append(self.name)


@pytest.fixture
def model() -> GAN:
    torch.manual_seed(0)
    return build.model(composed(*overrides("gan")), Path("unused"))


def batch(n: int = 6) -> dict[str, torch.Tensor]:
    return {"image": torch.rand(n, 3, 8, 8), "label": torch.arange(n), "attributes": torch.ones(n, 14)}


def steps(model: GAN, n_batches: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[set[str]]]:
    log: list[str] = []
    reported = []
    monkeypatch.setattr(model, "optimizers", lambda: (Optimizer("G", log), Optimizer("D", log)))
    monkeypatch.setattr(model, "manual_backward", lambda loss: loss.backward())
    monkeypatch.setattr(model, "clip_gradients", lambda *_: None)
    for k in range(n_batches):
        model.reported.clear()
        model.training_step(batch(), k)
        reported.append(set(model.reported))
    return log, reported


@pytest.mark.parametrize(("n_critic", "turns"), [(1, "DGDGDGDG"), (2, "DDGDDG"), (4, "DDDDG")])
def test_whose_turn_it_is(model: GAN, monkeypatch: pytest.MonkeyPatch, n_critic: int, turns: str) -> None:
    model.n_critic = n_critic
    assert "".join(steps(model, 4, monkeypatch)[0]) == turns


def test_r1_is_lazy(model: GAN, monkeypatch: pytest.MonkeyPatch) -> None:
    model.r1_every = 3
    penalised = ["r1" in names for names in steps(model, 7, monkeypatch)[1]]
    assert penalised == [True, False, False, True, False, False, True]


def test_lazy_r1_is_weighted_up(model: GAN, monkeypatch: pytest.MonkeyPatch) -> None:
    """loss = adversarial + gamma / 2 * every * R1."""
    losses = []
    monkeypatch.setattr(model, "step", lambda optimizer, loss: losses.append(loss.item()))
    model.r1_gamma, model.r1_every = 0.5, 6
    model._discriminator_step(batch(), None, penalise=True)
    told = model.reported
    assert told["r1"] > 0
    assert losses[0] == pytest.approx(float(told["discriminator"] + 0.25 * 6 * told["r1"]), rel=1e-6)


def test_a_discriminator_step_leaves_the_generator_alone(model: GAN, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "manual_backward", lambda loss: loss.backward())
    monkeypatch.setattr(model, "clip_gradients", lambda *_: None)
    model._discriminator_step(batch(), SimpleNamespace(zero_grad=lambda: None, step=lambda: None), penalise=True)
    assert all(p.grad is None for p in [*model.generator.parameters(), *model.generator_embedder.parameters()])
    assert any(p.grad is not None and p.grad.any() for p in model.discriminator.parameters())


def test_each_optimizer_owns_its_player(model: GAN) -> None:
    ours, theirs = model.configure_optimizers()
    held = [{id(p) for group in o.param_groups for p in group["params"]} for o in (ours, theirs)]
    nets = [model.generator, model.generator_embedder], [model.discriminator, model.discriminator_embedder]
    assert held == [{id(p) for net in players for p in net.parameters()} for players in nets]


def test_projection_by_hand(model: GAN) -> None:
    """score(h) + features(h) . cond / |cond| (Miyato & Koyama 2018, eq. 4, on the unit sphere)."""
    net, x, cond = model.discriminator, torch.randn(3, 3, 8, 8), torch.randn(3, 4)
    h = net.blocks(x).flatten(1)
    expected = [net.score(h[i]) + net.features(h[i]) @ (cond[i] / cond[i].norm()) for i in range(3)]
    torch.testing.assert_close(net(x, cond), torch.cat(expected))
    torch.testing.assert_close(net(x, cond), net(x, F.normalize(cond) * 9))


def test_image_k_is_that_of_any_batch(finished: dict[str, Path]) -> None:
    loaded = runs.load(finished["gan"], ema=True)
    cond = loaded.model.condition(loaded.data.test_batch(0, 8), "")
    with torch.inference_mode():
        together = loaded.model.sample(cond, ImageRngs(0, 0, 8))
        alone = loaded.model.sample({name: value[5:6] for name, value in cond.items()}, ImageRngs(0, 5, 1))
    assert (together[5] - alone[0]).abs().max() <= 1 / 127.5
    assert (together[4] - alone[0]).abs().max() > 1 / 127.5


def test_logits_losses_and_r1_are_float32_under_bf16(model: GAN, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, losses = [], []
    model.discriminator.score.register_forward_hook(lambda net, args, out: seen.append(out.dtype))
    monkeypatch.setattr(model, "step", lambda optimizer, loss: losses.append(loss.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model._discriminator_step(batch(), None, penalise=True)
        model._generator_step(batch(), None)
        z, cond = torch.zeros(2, 4), torch.zeros(2, 4)
        assert model.discriminator(model.generator(z, cond), cond).dtype == torch.float32
        assert model.generator(z, cond).dtype == torch.float32
    assert set(seen) == {torch.bfloat16}  # autocast was on
    assert set(losses) == {torch.float32} and {v.dtype for v in model.reported.values()} == {torch.float32}


def test_a_discriminator_normalises_nothing(model: GAN) -> None:
    """R1 is a sum over images only if none sees another."""
    x, cond = torch.randn(4, 3, 8, 8), torch.randn(4, 4)
    whole = model.discriminator(x, cond)
    torch.testing.assert_close(whole[2:3], model.discriminator(x[2:3], cond[2:3]))
