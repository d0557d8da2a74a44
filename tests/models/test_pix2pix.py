"""Losses by hand, who learns from what, dropout of image k, float32 where it matters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from atelier.cli.messages import user_error
from atelier.core.errors import UserError
from atelier.core.rng import ImageRngs
from atelier.models.pix2pix import Pix2Pix
from atelier.runs import build
from tests.compose import composed
from tests.players import Watching
from tests.tiny import COMMON

TINY = [  # beside tests/tiny.py:COMMON
    "model=pix2pix",
    "data.task=label_map",
    "model.generator.width=4",
    "model.generator.n_downs=2",
    "model.generator.n_dropout=1",
    "model.discriminator.width=4",
    "model.discriminator.n_layers=1",
]

SMALL = [
    *COMMON,
    "data.task=label_map",
    "model.generator.width=4",
    "model.generator.n_downs=2",
    "model.generator.n_dropout=1",
    "model.discriminator.width=4",
    "model.discriminator.n_layers=1",
]


def made(*words: str) -> Pix2Pix:
    torch.manual_seed(0)
    return build.model(composed("model=pix2pix", *SMALL, *words), Path("unused"))


@pytest.fixture
def model() -> Pix2Pix:
    return made()


def batch(n: int = 6) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {name: 2 * torch.rand(n, 3, 8, 8, generator=g) - 1 for name in ("image", "source")}


def test_each_step_is_of_one_player_alone(model: Pix2Pix, monkeypatch: pytest.MonkeyPatch) -> None:
    """D before G, and neither leaves gradients in the other."""
    log: list[str] = []
    monkeypatch.setattr(model, "optimizers", lambda: (Watching("G", model, log), Watching("D", model, log)))
    monkeypatch.setattr(model, "manual_backward", lambda loss: loss.backward())
    model.training_step(batch())
    assert log == ["Dd", "Gg"]
    assert all(p.requires_grad for p in model.parameters())


def test_each_optimizer_owns_its_player(model: Pix2Pix) -> None:
    owned = [{id(p) for group in o.param_groups for p in group["params"]} for o in model.configure_optimizers()]
    assert owned == [{id(p) for p in net.parameters()} for net in (model.generator, model.discriminator)]
    assert all(o.defaults["betas"] == (0.5, 0.999) for o in model.configure_optimizers())


def test_the_losses_by_hand(model: Pix2Pix) -> None:
    """BCE against ones and zeros; the discriminator's sum halved; 100 |x - G| (section 3.3)."""
    data = batch()
    source, image = data["source"], data["image"]
    fake = image + torch.where(torch.arange(8) < 4, 0.25, -0.75)  # |x - G| is 1/2 on average
    logits = [model.discriminator(torch.cat([source, x], dim=1)) for x in (image, fake)]
    bce = F.binary_cross_entropy_with_logits
    halved = (bce(logits[0], torch.ones_like(logits[0])) + bce(logits[1], torch.zeros_like(logits[1]))) / 2
    torch.testing.assert_close(model._discriminator_loss(source, image, fake), halved)
    expected = bce(logits[1], torch.ones_like(logits[1])) + 100 * 0.5
    torch.testing.assert_close(model._generator_loss(source, image, fake), expected)
    assert model.reported["l1"].item() == pytest.approx(0.5)
    model.l1_weight = 0.0
    torch.testing.assert_close(model._generator_loss(source, image, fake), expected - 50)


def test_the_discriminator_sees_the_source(model: Pix2Pix) -> None:
    data = batch()
    first = model._logits(data["source"], data["image"])
    assert (first - model._logits(-data["source"], data["image"])).abs().max() > 1e-4


def test_a_relativistic_generator_is_shown_real_images(monkeypatch: pytest.MonkeyPatch) -> None:
    for words, shown in ([], False), (["adversarial@model.loss=relativistic"], True):
        model, seen, data = made(*words), [], batch()
        monkeypatch.setattr(model.loss, "generator", lambda real, fake, seen=seen: seen.append(real) or fake.mean())
        model._generator_loss(data["source"], data["image"], data["image"])
        assert (seen[0] is not None) == shown


@pytest.mark.parametrize("norm", ["instance", "batch", "none"])
def test_image_k_is_that_of_any_batch(norm: str) -> None:
    """Dropout is on, and belongs to the image; torch's own random numbers are not touched."""
    model = made(f"model.generator.norm={norm}").eval()
    with torch.no_grad():
        for p in model.generator.parameters():
            p.mul_(10 if p.dim() == 4 else 1)  # dropout is heard
    cond, state = {"source": batch(8)["source"]}, torch.get_rng_state()
    with torch.inference_mode():
        together = model.sample(cond, ImageRngs(0, 0, 8))
        alone = model.sample({"source": cond["source"][5:6]}, ImageRngs(0, 5, 1))
        other = model.sample({"source": cond["source"][5:6]}, ImageRngs(0, 6, 1))
    assert (together[5] - alone[0]).abs().max() <= 1 / 127.5
    assert (other[0] - alone[0]).abs().max() > 4 / 127.5
    assert torch.equal(state, torch.get_rng_state())


def test_training_drops_by_torchs_own_numbers(model: Pix2Pix, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch is the same once more from the same state, and half of each mask is dropped."""
    masks: list[Tensor] = []
    monkeypatch.setattr(model, "step", lambda *_: None)
    monkeypatch.setattr(model, "optimizers", lambda: (None, None))
    kept = model.generator.forward
    monkeypatch.setattr(model.generator, "forward", lambda x, m: masks.extend(m) or kept(x, m))
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model.training_step(batch(64))
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert masks[0].shape == (64, 4, 4, 4) and set(masks[0].unique().tolist()) == {0, 2}
    assert masks[0].mean().item() == pytest.approx(1, abs=0.1)


def test_logits_and_losses_are_float32_under_bf16(model: Pix2Pix, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, losses = [], []
    model.discriminator.layers[-1].register_forward_hook(lambda net, args, out: seen.append(out.dtype))
    monkeypatch.setattr(model, "step", lambda optimizer, loss, name, penalised=False: losses.append(loss.dtype))
    monkeypatch.setattr(model, "optimizers", lambda: (None, None))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.training_step(batch())
        assert model.sample({"source": batch()["source"]}, ImageRngs(0, 0, 6)).dtype == torch.float32
    assert set(seen) == {torch.bfloat16}  # autocast was on
    assert losses == [torch.float32] * 2 and {v.dtype for v in model.reported.values()} == {torch.float32}


def test_sources_of_other_channels_and_sides() -> None:
    model = made("model.generator.in_channels=1", "model.discriminator.in_channels=4")
    assert model.sample({"source": torch.zeros(2, 1, 12, 20)}, ImageRngs(0, 0, 2)).shape == (2, 3, 12, 20)
    assert model.size_divisor == 4
    with pytest.raises(Exception, match="source and image") as caught:
        made("model.generator.in_channels=1")
    line = "error: model.discriminator.in_channels=6: source and image have 4 channels. Fix: "
    error = user_error(caught.value)
    assert isinstance(error, UserError) and error.line() == line + "model.discriminator.in_channels=4"
