"""The mean style by its recurrence, truncation and mixing while the net grows, and which generator it takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from atelier.core.rng import ImageRngs
from atelier.models.stylegan import StyleGAN
from atelier.runs import build
from tests.compose import composed
from tests.conftest import overrides

TINY = [  # beside tests/tiny.py:COMMON
    "model=stylegan",
    "model.generator.channel_base=32",
    "model.generator.channel_max=8",
    "model.generator.noise_dim=4",
    "model.generator.style_dim=4",
    "model.generator.cond_dim=4",
    "model.discriminator.cond_dim=4",
    "model.generator_embedder.dim=4",
    "model.discriminator_embedder.dim=4",
    "model.generator.mapping_lr_multiplier=0.01",
    "model.stable_images=16",
    "model.fade_images=24",
    "model.microbatches=[1,2]",
]

N = 5
COND = {"label": torch.arange(N), "attributes": torch.ones(N, 14)}


@pytest.fixture
def model() -> StyleGAN:
    torch.manual_seed(0)
    return build.model(composed(*overrides("stylegan")), Path("unused"))


def styles_seen(model: StyleGAN, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Styles (N, L, W) that the synthesis is given from now on."""
    seen: list[Tensor] = []
    kept = model.generator.synthesis.forward
    monkeypatch.setattr(model.generator.synthesis, "forward", lambda w, *rest: seen.append(w) or kept(w, *rest))
    return seen


def test_the_mean_style_follows_each_players_latents(model: StyleGAN, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = styles_seen(model, monkeypatch)
    model.style_ema_decay, model.style_mixing_prob = 0.75, 0.0
    for _ in range(2):
        model._fake(COND, N, 0.0)
    first, second = (styles[:, 0].mean(0) for styles in seen)
    torch.testing.assert_close(model.generator.mapping.mean, 0.25 * second + 0.75 * 0.25 * first)


@pytest.mark.parametrize("mixing", [0.0, 1.0])
def test_mixing_takes_the_styles_of_another_from_some_layer_on(
    model: StyleGAN, monkeypatch: pytest.MonkeyPatch, mixing: float
) -> None:
    seen = styles_seen(model, monkeypatch)
    model.style_mixing_prob = mixing
    model._fake(COND, N, 1.0)
    changes = (seen[0][:, 1:] != seen[0][:, :-1]).any(2).sum(1)
    assert changes.tolist() == [int(mixing)] * N


def test_truncation_draws_styles_towards_their_mean(model: StyleGAN) -> None:
    mean = torch.randn_like(model.generator.mapping.mean)
    model.generator.mapping.mean.copy_(mean)
    z = model.sample_latents(ImageRngs(0, 0, N), COND)
    full, half, none = (model.styles(z, COND, psi) for psi in (1.0, 0.5, 0.0))
    torch.testing.assert_close(none, mean.expand_as(none))
    torch.testing.assert_close(half, (full + mean) / 2)
    model.truncation = 0.5
    torch.testing.assert_close(model.styles(z, COND), half)
    assert model.protocol() == {"truncation": 0.5}


def test_the_generator_of_another_family_is_one_line() -> None:
    other = "atelier.nets.stylegan2.StyleGAN2Generator"
    gone = ["~model.generator.mapping_lr_multiplier"]
    with pytest.raises(Exception, match=r"StyleGAN takes a StyleGenerator. Fix: .*nets.stylegan.StyleGenerator"):
        build.model(composed(*overrides("stylegan"), f"model.generator._target_={other}", *gone), Path("unused"))
