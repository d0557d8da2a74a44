"""CycleGAN: its losses on hand-made cases, both directions, who learns when, the pool."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from atelier.core.batch import Batch
from atelier.core.rng import ImageRngs
from atelier.models.cyclegan import CycleGAN
from atelier.runs import build
from tests.compose import composed
from tests.tiny import tiny

TINY = [  # beside tests/tiny.py:COMMON
    "model=cyclegan",
    "data.task=fill",
    "model.generator_a2b.width=4",
    "model.generator_b2a.width=4",
    "model.generator_a2b.n_blocks=1",
    "model.generator_b2a.n_blocks=1",
    "model.discriminator_a.width=4",
    "model.discriminator_b.width=4",
    "model.discriminator_a.n_layers=1",
    "model.discriminator_b.n_layers=1",
    "model.pool_a.size=20",
    "model.pool_b.size=20",
    "model.identity_every=2",
]


def made(*words: str) -> CycleGAN:
    torch.manual_seed(0)
    return build.model(composed(*tiny("cyclegan"), *words), Path("unused"))


@pytest.fixture
def model() -> CycleGAN:
    return made()


def batch(n: int = 4) -> Batch:
    torch.manual_seed(1)
    return {f"image_{side}": torch.rand(n, 3, 8, 8) * 2 - 1 for side in "ab"}


class Plus(nn.Module):
    """In place of a generator."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


class Says(nn.Module):
    """In place of a discriminator: the mean of an image in every patch."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((1, 2, 3))[:, None, None, None].expand(-1, 1, 2, 2)


def lossy(model: CycleGAN, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    losses: dict[str, Tensor] = {}
    monkeypatch.setattr(model, "step", lambda optimizer, loss, name, penalised=False: losses.update({name: loss}))
    return losses


def test_losses_by_hand(model: CycleGAN, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a2b adding 0.5, b2a taking away 0.3: each cycle misses by 0.2, identities by 0.5 and 0.3."""
    losses = lossy(model, monkeypatch)
    model.generator_a2b, model.generator_b2a = Plus(0.5), Plus(-0.3)
    model.discriminator_a, model.discriminator_b = Says(), Says()
    a, b = torch.full((2, 3, 8, 8), 0.1), torch.full((2, 3, 8, 8), -0.2)
    fake_a, fake_b = model._generator_step(a, b, None, identity=True)
    torch.testing.assert_close(fake_b, a + 0.5)
    torch.testing.assert_close(fake_a, b - 0.3)
    fooled = (0.6 - 1) ** 2 + (-0.5 - 1) ** 2  # adversarial weight 2 undoes the half of least squares
    assert losses["generator"].item() == pytest.approx(fooled + 10 * (0.2 + 0.2) + 10 * 0.5 * 2 * (0.5 + 0.3), rel=1e-5)
    model._discriminator_step(a, b, fake_a, fake_b, None)
    by_hand = ((0.1 - 1) ** 2 + 0.5**2 + (-0.2 - 1) ** 2 + 0.6**2) / 2
    assert losses["discriminator"].item() == pytest.approx(by_hand, rel=1e-5)
    model._generator_step(a, b, None, identity=False)
    assert losses["generator"].item() == pytest.approx(fooled + 10 * 0.4, rel=1e-5)


def test_discriminators_see_the_pool_and_generators_do_not(model: CycleGAN, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    monkeypatch.setattr(model, "optimizers", lambda: (None, None))
    lossy(model, monkeypatch)
    monkeypatch.setattr(model.pool_a, "swapped", lambda x, n: seen.update(pool=n) or torch.zeros_like(x))
    monkeypatch.setattr(model, "_discriminator_step", lambda a, b, fake_a, fake_b, o: seen.update(a=fake_a))
    model.images_seen = 24
    model.training_step(batch(), 0)
    assert seen["pool"] == 24 and not seen["a"].any()


def test_each_optimizer_owns_its_pair(model: CycleGAN) -> None:
    ours, theirs = model.configure_optimizers()
    held = [{id(p) for group in o.param_groups for p in group["params"]} for o in (ours, theirs)]
    pairs = [model.generator_a2b, model.generator_b2a], [model.discriminator_a, model.discriminator_b]
    assert held == [{id(p) for net in nets for p in net.parameters()} for nets in pairs]


def test_directions(model: CycleGAN) -> None:
    x, rngs = batch(), ImageRngs(0, 0, 4)
    for case, net, other in (("a2b", model.generator_a2b, "image_b"), ("b2a", model.generator_b2a, "image_a")):
        cond = model.condition(x, case)
        assert set(cond) == {model.source_fields[case]}
        torch.testing.assert_close(model.sample(cond, rngs), net(x[model.source_fields[case]]))
        assert model.real_fields[case] == other
        assert model.answer(x, case) is None
        assert model.answer(x | {"answer_a": x["image_a"], "answer_b": x["image_b"]}, case) is cond[f"image_{case[0]}"]


def test_logits_and_losses_are_float32_under_bf16(model: CycleGAN, monkeypatch: pytest.MonkeyPatch) -> None:
    losses, dtypes = lossy(model, monkeypatch), []
    model.generator_a2b.layers[1].register_forward_hook(lambda net, args, out: dtypes.append(out.dtype))
    x = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fakes = model._generator_step(x["image_a"], x["image_b"], None, identity=True)
        model._discriminator_step(x["image_a"], x["image_b"], fakes[0].detach(), fakes[1].detach(), None)
    assert set(dtypes) == {torch.bfloat16}
    assert {t.dtype for t in (*losses.values(), *fakes, *model.reported.values())} == {torch.float32}
