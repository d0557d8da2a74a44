"""What each player of Progressive GAN brings down, in closed form, and which generator it takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from atelier.core.errors import UserError
from atelier.models.progan import ProGAN
from atelier.runs import build
from tests.compose import composed
from tests.conftest import overrides

COND: dict[str, Tensor] = {}

TINY = [  # beside tests/tiny.py:COMMON
    "model=progan",
    "model.generator.channel_base=32",
    "model.generator.channel_max=8",
    "model.generator.noise_dim=4",
    "model.generator.cond_dim=4",
    "model.discriminator.cond_dim=4",
    "model.generator_embedder.dim=4",
    "model.discriminator_embedder.dim=4",
    "model.stable_images=16",
    "model.fade_images=24",
    "model.microbatches=[1,2]",
]


def made(*words: str) -> ProGAN:
    torch.manual_seed(0)
    return build.model(composed(*overrides("progan"), "data.conditions=[]", *words), Path("unused"))


class Sum(torch.nn.Module):
    """D(x) = 2 sum(x), whose gradient is 2 in each of its numbers."""

    top = 1

    def forward(self, x: Tensor, known: Tensor, level: float) -> Tensor:
        return 2 * x.flatten(1).sum(1)


def test_the_discriminators_loss_in_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4 x 4 x 3 numbers: |dD/dx|^2 = 4 * 48."""
    model = made("model.drift=0.5", "model.r1_gamma=0.1", "model.gp_weight=3")
    model.discriminator = Sum()
    fake = torch.full((2, 3, 4, 4), -0.25)
    monkeypatch.setattr(model, "_fake", lambda *_: fake)
    loss = model._discriminator_loss(torch.full((2, 3, 8, 8), 0.125), COND, 0.0)
    real_logit, fake_logit, squared = 2 * 48 * 0.125, 2 * 48 * -0.25, 4 * 48
    expected = fake_logit - real_logit + 0.5 * real_logit**2 + 0.05 * squared + 3 * (squared**0.5 - 1) ** 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert {name: model.reported[name].item() for name in ("real_logit", "r1")} == {"real_logit": 12, "r1": squared}


def test_the_generators_loss_in_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("adversarial@model.loss=relativistic")
    model.discriminator = Sum()
    monkeypatch.setattr(model, "_fake", lambda *_: torch.full((2, 3, 4, 4), -0.01))
    loss = model._generator_loss(torch.full((2, 3, 8, 8), 0.02), COND, 0.0)
    assert loss.item() == pytest.approx(torch.tensor(2 * 48 * 0.03).exp().add(1).log().item(), rel=1e-5)


def test_another_familys_generator_is_one_line() -> None:
    model = made()
    with pytest.raises(UserError) as caught:
        ProGAN(torch.nn.Linear(1, 1), model.discriminator, None, None, None, 0, 0, 0, 8, 8, [1], None, None, None)
    line = "error: .generator._target_=Linear: ProGAN takes a ProGenerator. Fix: "
    assert caught.value.line() == line + ".generator._target_=atelier.nets.progan.ProGenerator"
