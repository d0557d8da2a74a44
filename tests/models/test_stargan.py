"""Losses by hand, whose turn it is, who learns from what, penalties, float32 where it matters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from atelier.core.rng import ImageRngs
from atelier.losses.regularizers import gradient_penalty
from atelier.models.stargan import StarGAN
from atelier.runs import build
from tests.compose import composed
from tests.players import Watching
from tests.tiny import COMMON

TINY = [  # beside tests/tiny.py:COMMON
    "model=stargan",
    "data.task=attribute_transfer",
    "model.generator.width=4",
    "model.generator.n_blocks=1",
    "model.discriminator.width=4",
    "model.discriminator.n_layers=1",
    "model.n_critic=2",
]

SMALL = [
    *COMMON,
    "data.task=attribute_transfer",
    "model.generator.width=4",
    "model.generator.n_blocks=1",
    "model.discriminator.width=4",
    "model.discriminator.n_layers=2",
    "model.n_critic=2",
]


def made(*words: str) -> StarGAN:
    torch.manual_seed(0)
    return build.model(composed("model=stargan", *SMALL, *words), Path("unused"))


@pytest.fixture
def model() -> StarGAN:
    return made()


def batch(n: int = 6) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    told = {name: (torch.rand(n, 14, generator=g) < 0.3).float() for name in ("attributes", "target")}
    return {"image": 2 * torch.rand(n, 3, 8, 8, generator=g) - 1, **told}


@pytest.mark.parametrize(("n_critic", "turns"), [(1, "Dd Gg Dd Gg Dd Gg"), (2, "Dd Dd Gg Dd"), (3, "Dd Dd Dd Gg")])
def test_each_step_is_of_one_player_alone(n_critic: int, turns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither leaves gradients in the other."""
    model, log = made(f"model.n_critic={n_critic}"), []
    monkeypatch.setattr(model, "optimizers", lambda: (Watching("G", model, log), Watching("D", model, log)))
    monkeypatch.setattr(model, "manual_backward", lambda loss: loss.backward())
    for k in range(3):
        model.training_step(batch(), k)
    assert " ".join(log) == turns
    assert all(p.requires_grad for p in model.parameters())


def test_each_optimizer_owns_its_player(model: StarGAN) -> None:
    owned = [{id(p) for group in o.param_groups for p in group["params"]} for o in model.configure_optimizers()]
    assert owned == [{id(p) for p in net.parameters()} for net in (model.generator, model.discriminator)]
    assert all(o.defaults["betas"] == (0.5, 0.999) for o in model.configure_optimizers())


def test_attributes_are_classified_by_hand() -> None:
    """Logits 0 cost log 2 each; log 3 for an attribute that is there costs log(4 / 3), for one that is not log 4."""
    three = torch.log(torch.tensor(3.0)).item()
    logits = torch.tensor([[0.0, 0.0, 0.0], [three, three, 0.0]])
    found = made()._classified(logits, torch.tensor([[0.0, 1, 1], [1.0, 0, 1]]))
    expected = (torch.tensor(2.0).log() * 4 + torch.tensor(4 / 3).log() + torch.tensor(4.0).log()) / 2
    torch.testing.assert_close(found, expected)


def test_of_exclusive_attributes_one_is_chosen() -> None:
    """Logits 0, 0, 0 cost log 3 whichever it is; log 3, 0, 0 cost log(5 / 3) where it is the first."""
    logits = torch.tensor([[0.0, 0.0, 0.0], [torch.tensor(3.0).log().item(), 0.0, 0.0]])
    found = made("model.exclusive=true")._classified(logits, torch.tensor([[0.0, 1, 0], [1.0, 0, 0]]))
    torch.testing.assert_close(found, (torch.tensor(3.0).log() + torch.tensor(5 / 3).log()) / 2)


def test_the_generators_loss_by_hand(model: StarGAN) -> None:
    """-D(G(x, c')) + classification + 10 |x - G(G(x, c'), c)|."""
    data, weights = batch(), {"classifier": 0.7, "reconstruction": 10.0}
    model.classifier_weight = weights["classifier"]
    there = model.generator(data["image"], data["target"])
    back = model.generator(there, data["attributes"])
    logits, attributes = model.discriminator(there)
    p = attributes.sigmoid()
    told = -(data["target"] * p.log() + (1 - data["target"]) * (1 - p).log()).sum() / 6
    away = (data["image"] - back).abs().sum() / (6 * 3 * 8 * 8)
    torch.testing.assert_close(model._generator_loss(data), -logits.mean() + 0.7 * told + 10 * away)
    torch.testing.assert_close(model.reported["reconstruction"], away.detach())
    torch.testing.assert_close(model.reported["classifier_fake"], told.detach())


def test_an_image_told_its_own_attributes_is_to_stay(model: StarGAN) -> None:
    data = batch()
    before = model._generator_loss(data)
    assert "identity" not in model.reported
    model.identity_weight = 3.0
    stays = (model.generator(data["image"], data["attributes"]) - data["image"]).abs().mean()
    torch.testing.assert_close(model._generator_loss(data) - before, 3 * stays)
    torch.testing.assert_close(model.reported["identity"], stays.detach())


def test_the_discriminators_loss_by_hand(model: StarGAN) -> None:
    """D(G(x, c')) - D(x) + classification of x + 10 (|D'| - 1)^2 between both, D the mean of an image's logits."""
    data = batch()
    model.classifier_weight = 0.7
    there = model.generator(data["image"], data["target"]).detach()
    real, attributes = model.discriminator(data["image"])
    told = F.binary_cross_entropy(attributes.sigmoid(), data["attributes"], reduction="none").sum(1).mean()
    torch.manual_seed(3)
    part = torch.rand(6, 1, 1, 1)
    between = (part * data["image"] + (1 - part) * there).requires_grad_()
    (slope,) = torch.autograd.grad(model.discriminator(between)[0].mean((1, 2, 3)).sum(), between)
    penalty = ((slope.square().sum((1, 2, 3)).sqrt() - 1) ** 2).mean()
    expected = model.discriminator(there)[0].mean() - real.mean() + 0.7 * told + 10 * penalty
    torch.manual_seed(3)
    torch.testing.assert_close(model._discriminator_loss(data), expected)
    torch.testing.assert_close(model.reported["classifier_real"], told.detach())
    assert "r1" not in model.reported


def test_r1_in_place_of_the_lipschitz_penalty(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["model.r1_gamma=3.0", "model.gp_weight=0.0", "adversarial@model.loss=non_saturating"]
    model, data = made(*words), batch()
    there = model.generator(data["image"], data["target"]).detach()
    image = data["image"].clone().requires_grad_()
    real, attributes = model.discriminator(image)
    (slope,) = torch.autograd.grad(real.mean((1, 2, 3)).sum(), image, retain_graph=True)
    fake = model.discriminator(there)[0]
    expected = F.softplus(-real).mean() + F.softplus(fake).mean() + model._classified(attributes, data["attributes"])
    expected = expected + 1.5 * slope.square().sum((1, 2, 3)).mean()
    torch.testing.assert_close(model._discriminator_loss(data), expected)
    assert "gradient_penalty" not in model.reported and not data["image"].requires_grad


def test_a_penalty_is_learned_from(model: StarGAN) -> None:
    """Its gradient is that of the gradient: nought would be left of it without the second derivative."""
    data = batch()
    length = gradient_penalty(lambda x: model.discriminator(x)[0].flatten(1).mean(1), data["image"], -data["image"])
    length.backward()
    assert model.discriminator.layers[0].weight.grad.abs().max() > 0
    assert model.discriminator.attributes.weight.grad is None


def test_a_relativistic_generator_is_shown_real_images(monkeypatch: pytest.MonkeyPatch) -> None:
    for words, shown in ([], False), (["adversarial@model.loss=relativistic"], True):
        model, seen = made(*words), []
        monkeypatch.setattr(model.loss, "generator", lambda real, fake, seen=seen: seen.append(real) or fake.mean())
        model._generator_loss(batch())
        assert (seen[0] is not None) == shown


def test_image_k_is_that_of_any_batch(model: StarGAN) -> None:
    model.eval()
    data, state = batch(8), torch.get_rng_state()
    cond = model.condition(data, "")
    assert set(cond) == {"image", "target"} and model.answer(data, "") is None
    with torch.inference_mode():
        together = model.sample(cond, ImageRngs(0, 0, 8))
        alone = model.sample({name: value[5:6] for name, value in cond.items()}, ImageRngs(0, 5, 1))
        model.train()
        same = model.sample(cond, ImageRngs(1, 0, 8))
    assert (together[5] - alone[0]).abs().max() <= 1 / 127.5
    assert (together[4] - alone[0]).abs().max() > 4 / 127.5
    assert torch.equal(same, together) and torch.equal(state, torch.get_rng_state())


def test_logits_and_losses_are_float32_under_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen, losses = made("model.r1_gamma=1.0", "model.n_critic=1"), [], []
    for head in (model.discriminator.score, model.discriminator.attributes):
        head.register_forward_hook(lambda net, args, out: seen.append(out.dtype))
    monkeypatch.setattr(model, "step", lambda optimizer, loss, name, penalised=False: losses.append(loss.dtype))
    monkeypatch.setattr(model, "optimizers", lambda: (None, None))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.training_step(batch(), 0)
        assert model.sample(model.condition(batch(), ""), ImageRngs(0, 0, 6)).dtype == torch.float32
    whole, half = 2 * [torch.float32], 2 * [torch.bfloat16]
    assert seen == [*whole, *half, *whole, *half]  # R1's images, generated ones, WGAN-GP's; the generator's step
    assert losses == [torch.float32] * 2 and {v.dtype for v in model.reported.values()} == {torch.float32}
