"""Whose turn it is, path lengths in closed form, running means by their recurrence, truncation and mixing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from atelier.core.errors import UserError
from atelier.core.rng import ImageRngs
from atelier.losses.regularizers import path_lengths
from atelier.models.stylegan2 import StyleGAN2
from atelier.runs import build
from tests.compose import composed
from tests.conftest import overrides
from tests.players import learned

TINY = [  # beside tests/tiny.py:COMMON
    "model=stylegan2",
    "channels_last=true",
    "augment@model.augment=ada",
    "model.augment.every_images=16",
    "model.augment.images_per_unit=200",
    "model.generator.channel_base=64",
    "model.generator.channel_max=8",
    "model.generator.noise_dim=4",
    "model.generator.style_dim=4",
    "model.generator.cond_dim=4",
    "model.discriminator.cond_dim=4",
    "model.generator_embedder.dim=4",
    "model.discriminator_embedder.dim=4",
    "model.r1_every=3",
    "model.path_every=2",
]


def made(*words: str) -> StyleGAN2:
    torch.manual_seed(0)
    return build.model(composed(*overrides("stylegan2"), *words), Path("unused"))


@pytest.fixture
def model() -> StyleGAN2:
    return made()


def batch(n: int = 6) -> dict[str, Tensor]:
    return {"image": torch.rand(n, 3, 8, 8), "label": torch.arange(n), "attributes": torch.ones(n, 14)}


def cond(n: int) -> dict[str, Tensor]:
    return {name: batch(n)[name] for name in ("label", "attributes")}


def recorded(model: StyleGAN2, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Tensor]]:
    """Steps by name with their losses, instead of taking them."""
    steps: list[tuple[str, Tensor]] = []
    monkeypatch.setattr(model, "optimizers", lambda: ("G", "D"))
    monkeypatch.setattr(
        model, "step", lambda optimizer, loss, name, penalised=False: steps.append((f"{optimizer} {name}", loss))
    )
    return steps


def test_whose_turn_it_is(model: StyleGAN2, monkeypatch: pytest.MonkeyPatch) -> None:
    model.r1_every, model.path_every = 3, 2
    steps = recorded(model, monkeypatch)
    for k in range(4):
        model.training_step(batch(), k)
    both, r1, path = ["D discriminator", "G generator"], ["D r1"], ["G path"]
    expected = [both[0], *r1, both[1], *path, *both, *both, *path, both[0], *r1, both[1]]
    assert [name for name, _ in steps] == expected


def test_penalties_are_weighted_up_by_the_batches_between_them(
    model: StyleGAN2, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = recorded(model, monkeypatch)
    model.r1_gamma, model.r1_every, model.path_weight, model.path_every = 0.5, 6, 3.0, 4
    model._r1_step(batch(), "D")
    assert steps[0][1].item() == pytest.approx(6 * 0.25 * model.reported["r1"].item(), rel=1e-6)
    model._path_step(batch(), "G")
    assert steps[1][1].item() == pytest.approx(4 * 3 * model.reported["path_penalty"].item(), rel=1e-6)
    for name, (_, loss) in zip(("discriminator", "generator"), steps, strict=True):
        model.zero_grad()
        loss.backward()
        assert any(p.grad is not None and p.grad.any() for p in getattr(model, name).parameters())


def test_path_lengths_in_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """image = sum over layers of c_l w_l in each pixel: with y = 1, J^T y of layer l is c_l H W / sqrt(H W)."""
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    styles, c = torch.randn(5, 3, 7, requires_grad=True), torch.tensor([1.0, 2.0, 3.0])
    image = (styles * c[:, None]).sum((1, 2))[:, None, None, None].expand(5, 1, 4, 6)
    expected = math.sqrt(7 * (1 + 4 + 9) / 3) * math.sqrt(24)
    assert path_lengths(image, styles).tolist() == pytest.approx([expected] * 5, rel=1e-5)


def test_the_mean_path_length_follows_its_recurrence(model: StyleGAN2, monkeypatch: pytest.MonkeyPatch) -> None:
    """a <- 0.9 a + 0.1 mean length, and the penalty is E (length - a)^2 with the new a."""
    recorded(model, monkeypatch)
    model.path_ema_decay, a = 0.9, 0.0
    for lengths in ([1.0, 3.0, 5.0], [2.0, 2.0, 2.0]):
        monkeypatch.setattr("atelier.models.stylegan2.path_lengths", lambda *_, told=lengths: torch.tensor(told))
        model._path_step(batch(), "G")
        a = 0.9 * a + 0.1 * sum(lengths) / 3
        assert model.path_length.item() == pytest.approx(a, rel=1e-6)
        expected = sum((length - a) ** 2 for length in lengths) / 3
        assert model.reported["path_penalty"].item() == pytest.approx(expected, rel=1e-5)
    assert "path_length" in model.state_dict()


def test_the_mean_style_follows_its_recurrence(model: StyleGAN2, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded(model, monkeypatch)
    model.style_ema_decay, model.style_mixing_prob = 0.75, 0.0
    seen: list[Tensor] = []
    kept = model._mixed
    monkeypatch.setattr(model, "_mixed", lambda *given: seen.append(kept(*given)) or seen[-1])
    for _ in range(2):
        model._generator_step(batch(), "G")
    first, second = (styles[:, 0].mean(0) for styles in seen)
    torch.testing.assert_close(model.generator.mapping.mean, 0.25 * second + 0.75 * 0.25 * first)
    assert "generator.mapping.mean" in model.state_dict()


def test_mixing_takes_the_styles_of_another_from_some_layer_on(model: StyleGAN2) -> None:
    model.style_mixing_prob, n = 0.5, 400
    torch.manual_seed(0)
    styles = model._mixed({name: value[:1].expand(n, *value.shape[1:]) for name, value in cond(1).items()}, n)
    changes = (styles[:, 1:] != styles[:, :-1]).any(2).sum(1)
    assert set(changes.tolist()) == {0, 1}
    assert changes.float().mean().item() == pytest.approx(0.5, abs=0.1)
    model.style_mixing_prob = 0.0
    assert (model._mixed(cond(6), 6) == model._mixed(cond(6), 6)[:, :1]).float().mean() < 1
    styles = model._mixed(cond(6), 6)
    assert (styles == styles[:, :1]).all()


def test_truncation_draws_styles_towards_their_mean(model: StyleGAN2) -> None:
    mean = torch.randn_like(model.generator.mapping.mean)
    model.generator.mapping.mean.copy_(mean)
    z = model.sample_latents(ImageRngs(0, 0, 3), cond(3))
    full, half, none = (model.styles(z, cond(3), psi) for psi in (1.0, 0.5, 0.0))
    torch.testing.assert_close(none, mean.expand_as(none))
    torch.testing.assert_close(half, (full + mean) / 2)
    torch.testing.assert_close(full[:, 0], model.generator.mapping(z, model.generator_embedder.vector(cond(3), 3)))
    model.truncation = 0.5
    torch.testing.assert_close(model.styles(z, cond(3)), half)
    assert model.protocol() == {"truncation": 0.5}


def test_lazy_steps_correct_their_optimizers(model: StyleGAN2) -> None:
    """lr k / (k + 1), betas to the same power (appendix B)."""
    ours, theirs = made("model.path_every=4", "model.r1_every=16").configure_optimizers()
    for optimizer, k in ((ours, 4), (theirs, 16)):
        group = optimizer.param_groups[0]
        assert group["lr"] == pytest.approx(2e-3 * k / (k + 1)) and group["betas"][0] == 0
        assert group["betas"][1] == pytest.approx(0.99 ** (k / (k + 1)))
    for optimizer in made("model.path_weight=0", "model.r1_gamma=0").configure_optimizers():
        assert optimizer.param_groups[0]["lr"] == 2e-3 and optimizer.param_groups[0]["betas"] == (0.0, 0.99)


def test_a_generator_step_leaves_the_discriminator_alone(model: StyleGAN2, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "step", lambda optimizer, loss, name, penalised=False: loss.backward())
    model._generator_step(batch(), None)
    assert learned(model.generator) and not learned(model.discriminator)
    assert all(p.requires_grad for p in model.discriminator.parameters())


def test_images_logits_and_penalties_are_float32_under_bf16(model: StyleGAN2, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = recorded(model, monkeypatch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.training_step(batch(), 0)
        x = model.sample(cond(2), ImageRngs(0, 0, 2))
    assert len(steps) == 4 and {loss.dtype for _, loss in steps} == {x.dtype} == {torch.float32}
    assert {value.dtype for value in model.reported.values()} == {torch.float32}


def test_it_is_not_compiled(model: StyleGAN2) -> None:
    with pytest.raises(UserError, match="gradients of gradients"):
        build.compile_nets(model)
