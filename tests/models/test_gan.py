"""Whose turn it is, what each player learns from, and float32 where it matters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from atelier.cli.messages import user_error
from atelier.core.errors import UserError
from atelier.core.rng import ImageRngs
from atelier.models.gan import GAN
from atelier.runs import build, folders
from tests.compose import composed
from tests.conftest import overrides
from tests.players import Watching

TINY = [  # beside tests/tiny.py:COMMON
    "model=cgan",
    "augment@model.augment=ada",
    "model.augment.every_images=16",
    "model.augment.images_per_unit=200",
    "model.generator.width=2",
    "model.discriminator.width=2",
    "model.n_critic=2",
    "model.penalty_every=3",
    "model.generator.noise_dim=4",
    "model.generator.cond_dim=4",
    "model.discriminator.cond_dim=4",
    "model.generator_embedder.dim=4",
    "model.discriminator_embedder.dim=4",
]


@pytest.fixture
def model() -> GAN:
    torch.manual_seed(0)
    return build.model(composed(*overrides("gan")), Path("unused"))


def batch(n: int = 6) -> dict[str, torch.Tensor]:
    return {"image": torch.rand(n, 3, 8, 8), "label": torch.arange(n), "attributes": torch.ones(n, 14)}


def steps(model: GAN, n_batches: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[set[str]]]:
    log: list[str] = []
    reported = []
    monkeypatch.setattr(model, "optimizers", lambda: (Watching("G", model, log), Watching("D", model, log)))
    monkeypatch.setattr(model, "manual_backward", lambda loss: loss.backward())
    monkeypatch.setattr(model, "clip_gradients", lambda *_: None)
    for k in range(n_batches):
        model.reported.clear()
        model.training_step(batch(), k)
        reported.append(set(model.reported))
    assert all(turn in ("Gg", "Dd") for turn in log)  # whose turn it is learns, and nobody else
    return [turn[0] for turn in log], reported


@pytest.mark.parametrize(("n_critic", "turns"), [(1, "DGDGDGDG"), (2, "DDGDDG"), (4, "DDDDG")])
def test_whose_turn_it_is(model: GAN, monkeypatch: pytest.MonkeyPatch, n_critic: int, turns: str) -> None:
    model.n_critic, model.penalised = n_critic, False
    assert "".join(steps(model, 4, monkeypatch)[0]) == turns


def test_lazy_penalties_are_steps_of_their_own(model: GAN, monkeypatch: pytest.MonkeyPatch) -> None:
    model.penalty_every, model.n_critic = 3, 1
    turns, reported = steps(model, 7, monkeypatch)
    assert ["r1" in names for names in reported] == [True, False, False, True, False, False, True]
    assert "".join(turns) == "DDGDGDGDDGDGDGDDG"


def test_penalties_of_every_batch_are_part_of_the_loss(model: GAN, monkeypatch: pytest.MonkeyPatch) -> None:
    model.penalty_every, model.n_critic = 1, 1
    turns, reported = steps(model, 2, monkeypatch)
    assert "".join(turns) == "DGDG" and all("r1" in names for names in reported)


def lossy(model: GAN, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Name of a step -> its loss."""
    losses: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(model, "step", lambda optimizer, loss, name, penalised=False: losses.update({name: loss}))
    return losses


def test_the_penalties_by_hand(model: GAN, monkeypatch: pytest.MonkeyPatch) -> None:
    """gamma / 2 times R1 and R2, lambda times WGAN-GP's; weighted up by the batches between two lazy steps."""
    losses = lossy(model, monkeypatch)
    model.r1_gamma, model.r2_gamma, model.gp_weight, model.penalty_every = 0.5, 3.0, 10.0, 6
    model._penalty_step(batch(), None)
    reported = model.reported
    assert min(reported["r1"], reported["r2"], reported["gradient_penalty"]) > 0
    expected = 6 * (0.25 * reported["r1"] + 1.5 * reported["r2"] + 10 * reported["gradient_penalty"])
    assert losses["penalty"].item() == pytest.approx(expected.item(), rel=1e-6)
    model._discriminator_step(batch(), None, penalise=True)
    reported = model.reported
    expected = (
        reported["discriminator"] + 0.25 * reported["r1"] + 1.5 * reported["r2"] + 10 * reported["gradient_penalty"]
    )
    assert losses["discriminator"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_discriminator_step_leaves_the_generator_alone(model: GAN, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = lossy(model, monkeypatch)
    model._discriminator_step(batch(), None, penalise=True)
    losses["discriminator"].backward()
    assert all(p.grad is None for p in [*model.generator.parameters(), *model.generator_embedder.parameters()])
    assert any(p.grad is not None and p.grad.any() for p in model.discriminator.parameters())


def made(*words: str) -> GAN:
    torch.manual_seed(0)
    return build.model(composed(*overrides("gan"), *words), Path("unused"))


def test_a_classifier_tells_labels_of_real_and_generated_images(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("model.discriminator.conditioning=classifier", "model.classifier_weight=0.7", "model.r1_gamma=0")
    losses, x = lossy(model, monkeypatch), batch()
    model._discriminator_step(x, None, penalise=False)
    reported = model.reported
    assert losses["discriminator"].item() == pytest.approx(
        (reported["discriminator"] + 0.7 * reported["classifier"]).item()
    )
    known = model.discriminator_embedder.vector(model.condition(x, ""), 6)
    real = F.cross_entropy(model.discriminator(x["image"], known)[1], x["label"])
    model._generator_step(x, None)
    reported = model.reported
    assert losses["generator"].item() == pytest.approx((reported["generator"] + 0.7 * reported["classifier"]).item())
    assert real.item() > 0
    losses["generator"].backward()
    assert any(p.grad is not None and p.grad.any() for p in model.generator.parameters())


def test_a_relativistic_generator_is_shown_real_images(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("adversarial@model.loss=relativistic")
    losses, seen = lossy(model, monkeypatch), []
    monkeypatch.setattr(model.loss, "generator", lambda real, fake: seen.append(real) or fake.mean())
    model._generator_step(batch(), None)
    assert seen[0].shape == (6,) and losses["generator"].shape == ()
    other = made()
    monkeypatch.setattr(other.loss, "generator", lambda real, fake: seen.append(real) or fake.mean())
    lossy(other, monkeypatch)
    other._generator_step(batch(), None)
    assert seen[1] is None


def test_ada_counts_real_images_alone_and_all_images_are_augmented(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = made("model.augment.every_images=1000"), []
    lossy(model, monkeypatch)
    kept = model.augment.forward
    monkeypatch.setattr(model.augment, "forward", lambda x: seen.append(len(x)) or kept(x))
    model._discriminator_step(batch(), None, penalise=False)
    assert seen == [6, 6] and model.augment.seen == 6 and "ada_p" in model.reported
    model._generator_step(batch(), None)
    assert seen == [6, 6, 6] and model.augment.seen == 6


def test_a_penalty_wants_a_discriminator_that_sees_images_alone() -> None:
    small = ["model=dcgan", "model.generator.width=4", "model.discriminator.width=4"]
    assert not build.model(composed(*small), Path("unused")).penalised
    with pytest.raises(Exception, match="with batch norm") as caught:
        build.model(composed(*small, "model.r1_gamma=1"), Path("unused"))
    assert isinstance(caught.value.__cause__, UserError)


def test_each_optimizer_owns_its_player(model: GAN) -> None:
    ours, theirs = model.configure_optimizers()
    held = [{id(p) for group in o.param_groups for p in group["params"]} for o in (ours, theirs)]
    nets = [model.generator, model.generator_embedder], [model.discriminator, model.discriminator_embedder]
    assert held == [{id(p) for net in players for p in net.parameters()} for players in nets]


@pytest.mark.parametrize(("words", "k"), [(["model.r1_gamma=0"], 0), (["model.penalty_every=1"], 1), ([], 4)])
def test_a_step_of_its_own_for_a_penalty_corrects_the_optimizer(words: list[str], k: int) -> None:
    rate = {0: 1.0, 1: 1.0, 4: 4 / 5}[k]
    ours, theirs = made("model.penalty_every=4", *words).configure_optimizers()
    assert theirs.param_groups[0]["lr"] == pytest.approx(rate * ours.param_groups[0]["lr"])


def test_projection_by_hand(model: GAN) -> None:
    """score(h) + features(h) . cond / |cond| (Miyato & Koyama 2018, eq. 4, on the unit sphere)."""
    net, x, cond = model.discriminator, torch.randn(3, 3, 8, 8), torch.randn(3, 4)
    h = net.blocks(x).flatten(1)
    expected = [net.score(h[i]) + net.features(h[i]) @ (cond[i] / cond[i].norm()) for i in range(3)]
    torch.testing.assert_close(net(x, cond)[0], torch.cat(expected))
    torch.testing.assert_close(net(x, cond)[0], net(x, F.normalize(cond) * 9)[0])


def test_image_k_is_that_of_any_batch(finished: dict[str, Path]) -> None:
    loaded = folders.load(finished["gan"], ema=True)
    cond = loaded.model.condition(loaded.data.test_batch(0, 8), "")
    with torch.inference_mode():
        together = loaded.model.sample(cond, ImageRngs(0, 0, 8))
        alone = loaded.model.sample({name: value[5:6] for name, value in cond.items()}, ImageRngs(0, 5, 1))
    assert (together[5] - alone[0]).abs().max() <= 1 / 127.5
    assert (together[4] - alone[0]).abs().max() > 1 / 127.5


def test_logits_losses_and_r1_are_float32_under_bf16(model: GAN, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, losses = [], []
    model.discriminator.score.register_forward_hook(lambda net, args, out: seen.append(out.dtype))
    monkeypatch.setattr(model, "step", lambda optimizer, loss, name, penalised=False: losses.append(loss.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model._discriminator_step(batch(), None, penalise=True)
        model._penalty_step(batch(), None)
        model._generator_step(batch(), None)
        z, cond = torch.zeros(2, 4), torch.zeros(2, 4)
        assert model.discriminator(model.generator(z, cond), cond)[0].dtype == torch.float32
        assert model.generator(z, cond).dtype == torch.float32
    half, whole = torch.bfloat16, torch.float32  # autocast was on, but for what a penalty is taken of
    assert seen == [whole, half, whole, half, half]
    with torch.autocast("cpu", dtype=half):
        model._discriminator_step(batch(), None, penalise=False)
    assert seen[5:] == [half, half]
    assert set(losses) == {torch.float32} and {v.dtype for v in model.reported.values()} == {torch.float32}


def test_gradients_of_a_penalty_are_float32_under_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its backward pass multiplies anew, and is not to do so in bf16."""
    model = made("data.conditions=[]")
    monkeypatch.setattr(model, "manual_backward", lambda loss: loss.backward())
    monkeypatch.setattr(model, "take", lambda optimizer, name: None)
    optimizer, data, found = torch.optim.SGD(model.discriminator.parameters()), batch(), []
    for half in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            model._penalty_step(data, optimizer)
        found.append([p.grad.clone() for p in model.discriminator.parameters() if p.grad is not None])
    assert any(gradient.abs().max() > 0 for gradient in found[0])
    for exact, gradient in zip(*found, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-5, atol=1e-8)


def test_a_discriminator_normalises_nothing(model: GAN) -> None:
    """R1 is a sum over images only if none sees another."""
    x, cond = torch.randn(4, 3, 8, 8), torch.randn(4, 4)
    whole = model.discriminator(x, cond)[0]
    torch.testing.assert_close(whole[2:3], model.discriminator(x[2:3], cond[2:3])[0])


def test_codes_of_the_noise() -> None:
    """Two codes, of 2 and of 3 values, each as likely; the rest is normal, in training and in samples alike."""
    sizes = ["model.generator.noise_dim=6"]
    model = made("model.categorical_codes=[2,3]", *sizes)
    z = model.sample_latents(ImageRngs(0, 0, 600), {})
    plain = made(*sizes).sample_latents(ImageRngs(0, 0, 600), {})
    assert z.shape == (600, 6) and torch.equal(z[:, 5], plain[:, 5]) and 0.9 < z[:, 5].std() < 1.1
    for first, n in ((0, 2), (2, 3)):
        code = z[:, first : first + n]
        assert torch.equal(code.argmax(1), plain[:, first : first + n].argmax(1))
        torch.testing.assert_close(code.sort(1).values, torch.tensor([*[0.0] * (n - 1), n**0.5]).expand(600, n))
        assert ((code > 0).float().mean(0) - 1 / n).abs().max() < 0.07
    seen = []
    model.generator.register_forward_pre_hook(lambda net, args: seen.append(args[0]))
    model._fake(model.condition(batch(), ""), 6)
    assert ((seen[0][:, :5] > 0).sum(1) == 2).all() and (seen[0][:, 5] != 0).all()


def test_codes_that_the_noise_has_no_room_for_are_refused() -> None:
    with pytest.raises(Exception) as caught:
        made("model.categorical_codes=[2,3]")
    line = "error: model.categorical_codes=[2, 3]: their one-hot vectors are longer than the noise of 4. Fix: "
    assert user_error(caught.value).line() == line + "model.generator.noise_dim=5"


@pytest.mark.parametrize(("words", "generated"), [([], 0), (["model.r2_gamma=1"], 1), (["model.gp_weight=1"], 1)])
def test_a_penalty_of_real_images_alone_generates_none(words: list[str], generated: int) -> None:
    """The noise that follows is what it was: that of a step which generates."""
    model, calls, after = made(*words), [], []
    model.step = lambda *_: None
    model.generator.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(3)
    model._penalty_step(batch(), None)
    after.append(torch.rand(3))
    assert len(calls) == generated
    torch.manual_seed(3)
    model._shown(batch(), penalise=True)
    if model.gp_weight == 0:
        assert torch.equal(after[0], torch.rand(3))
