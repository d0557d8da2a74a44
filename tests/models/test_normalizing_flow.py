"""Bits per dimension against closed forms, one image at temperature 0, and sample k alone as in a batch."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from torch import Tensor, nn

from atelier.core.rng import ImageRngs
from atelier.images.pixels import to_float
from atelier.models.normalizing_flow import NormalizingFlow
from atelier.nets.conditioning import ConditionEmbedder
from atelier.nets.invertible import ALPHA
from atelier.nets.normalizing_flow import NormalizingFlowNet, glow, realnvp

TINY = [  # beside tests/tiny.py:COMMON
    "model=glow",
    "model.net.width=4",
    "model.net.n_levels=2",
    "model.net.steps=1",
    "model.embedder.dim=4",
]

SIZE, CHANNELS, N = 8, 3, 4
NUMBERS = CHANNELS * SIZE**2


def built(net: nn.Module, temperature: float = 0.7) -> NormalizingFlow:
    embedder = ConditionEmbedder(
        dim=4, conditions=["label", "attributes"], n_classes=36, label_factors=[6, 6], n_attributes=14
    )
    return NormalizingFlow(net, embedder, temperature, torch.optim.Adam, 1.0)


def flow(make: str) -> NormalizingFlow:
    torch.manual_seed(0)
    sizes = {"image_size": SIZE, "image_channels": CHANNELS, "width": 8, "n_levels": 2, "cond_dim": 4}
    return built(glow(**sizes, steps=2) if make == "glow" else realnvp(**sizes, n_blocks=1))


@functools.cache
def _trained(make: str) -> NormalizingFlow:
    model = flow(make).train()
    optimizer = torch.optim.Adam([*model.net.parameters(), *model.embedder.parameters()], 4e-3)
    for _ in range(12):
        optimizer.zero_grad()
        model.training_step(batch()).backward()
        optimizer.step()
    return model.eval()


def trained(make: str) -> NormalizingFlow:
    """A flow after a few steps."""
    return copy.deepcopy(_trained(make))


def batch(n: int = N) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(0)
    colour = torch.randint(0, 192, (n, CHANNELS, 1, 1), generator=source)
    levels = colour + torch.randint(0, 64, (n, CHANNELS, SIZE, SIZE), generator=source)
    attributes = torch.randint(0, 2, (n, 14), generator=source).float()
    return {"image": to_float(levels), "label": torch.arange(n), "attributes": attributes}


def cond(n: int = N) -> dict[str, Tensor]:
    return {name: batch(n)[name] for name in ("label", "attributes")}


def standard_normal(noise: Tensor) -> Tensor:
    return (noise.double().square() / 2 + math.log(2 * math.pi) / 2).flatten(1).sum(1)


def dequantised(x: Tensor) -> Tensor:
    """As in [0, 1), with the noise that nll draws for seed 7."""
    levels = (x.double() + 1) * 127.5
    return (levels.round() + ImageRngs(7, 0, len(x)).rand(*x.shape[1:]).double()) / 256


@pytest.mark.parametrize("page", ["glow", "realnvp"])
def test_an_untrained_flow_is_the_standard_normal_of_logits(page: str) -> None:
    """Rotations keep the density, untrained couplings keep everything."""
    model, x = flow(page).eval(), batch()["image"]
    p = ALPHA + (1 - 2 * ALPHA) * dequantised(x)
    logits = (p / (1 - p)).log()
    scale = ((1 - 2 * ALPHA) / (p * (1 - p))).log().flatten(1).sum(1)
    expected = standard_normal(logits) - scale + NUMBERS * math.log(256)
    torch.testing.assert_close(model.nll(x, cond(), ImageRngs(7, 0, N)).double(), expected, rtol=1e-5, atol=0)


class Uniform(nn.Module):
    """Claims the determinant under which its density is 1 on [0, 1)^D."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = [NUMBERS]

    def forward(self, x: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        assert -0.5 <= x.min() and x.max() < 0.5
        return x.flatten(1), standard_normal(x)


def test_a_uniform_density_costs_eight_bits() -> None:
    model, x = built(Uniform()), batch()["image"]
    nll = model.nll(x, cond(), ImageRngs(0, 0, N))
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll / NUMBERS / math.log(2), torch.full((N,), 8.0))
    assert model.training_step(batch()).item() == pytest.approx(8, rel=1e-6)
    assert model.reported["bpd"].item() == pytest.approx(8, rel=1e-6)


@pytest.mark.parametrize("make", ["glow", "realnvp"])
def test_training_makes_images_likelier(make: str) -> None:
    first, then = (model.nll(batch()["image"], cond(), ImageRngs(0, 0, N)) for model in (flow(make), trained(make)))
    assert then.mean() < first.mean() - 0.5 * NUMBERS * math.log(2)


@pytest.mark.parametrize("make", ["glow", "realnvp"])
def test_an_image_comes_back_from_its_noise(make: str) -> None:
    model, x = trained(make), batch()["image"]
    v = ((127.5 * x + 127.5).round() + 0.5) / 256 - 0.5
    noise, _ = model.net(v, model.embedder.vector(cond(), N))
    back = model.generate(noise, cond(), ImageRngs(0, 0, N), temperature=1.0)
    assert (back - x).abs().max() <= 1e-3  # the middle of a level is the level


@pytest.mark.parametrize("make", ["glow", "realnvp"])
def test_temperature(make: str) -> None:
    model = trained(make)
    same = {name: value[:1].expand(N, *value.shape[1:]) for name, value in cond().items()}
    cold = model.sample(same, ImageRngs(0, 0, N), temperature=0.0)
    assert (cold - cold[:1]).abs().max() <= 1e-5
    rngs = ImageRngs(0, 0, N)
    z = model.sample_latents(rngs, same)
    assert z.shape == (N, NUMBERS)
    own = model.sample(same, ImageRngs(0, 0, N))
    torch.testing.assert_close(own, model.generate(0.7 * z, same, rngs, temperature=1.0))
    torch.testing.assert_close(own, model.sample(same, ImageRngs(0, 0, N), temperature=0.7))
    assert (own - model.sample(same, ImageRngs(0, 0, N), temperature=1.0)).abs().max() > 0.01
    assert model.protocol()["temperature"] == 0.7


@pytest.mark.parametrize("make", ["glow", "realnvp"])
def test_image_k_is_that_of_any_batch(make: str) -> None:
    model = trained(make)
    with torch.inference_mode():
        together = model.sample(cond(8), ImageRngs(0, 0, 8))
        alone = model.sample({name: value[5:6] for name, value in cond(8).items()}, ImageRngs(0, 5, 1))
        assert (together[5] - alone[0]).abs().max() <= 1 / 127.5
        assert (together[4] - alone[0]).abs().max() > 1 / 127.5
        x = batch(8)["image"]
        every = model.nll(x, cond(8), ImageRngs(0, 0, 8))
        one = model.nll(x[5:6], {name: value[5:6] for name, value in cond(8).items()}, ImageRngs(0, 5, 1))
    torch.testing.assert_close(every[5:6], one, rtol=1e-6, atol=0)


@pytest.mark.parametrize("make", ["glow", "realnvp"])
def test_likelihood_and_samples_are_float32_under_bf16(make: str) -> None:
    """The same numbers with and without; training follows bf16 in the couplings alone, its loss is float32."""
    model, x = trained(make), batch()["image"]
    exact = model.nll(x, cond(), ImageRngs(0, 0, N)), model.sample(cond(), ImageRngs(0, 0, N))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.nll(x, cond(), ImageRngs(0, 0, N)), exact[0])
        assert torch.equal(model.sample(cond(), ImageRngs(0, 0, N)), exact[1])
        torch.manual_seed(0)
        rounded = model.training_step(batch())
    torch.manual_seed(0)
    plain = model.training_step(batch())
    assert rounded.dtype == plain.dtype == torch.float32 and rounded != plain
    assert rounded.item() == pytest.approx(plain.item(), rel=0.01)


@pytest.mark.parametrize("make", ["glow", "realnvp"])
def test_the_condition_is_learned_from(make: str) -> None:
    model = trained(make)
    model.training_step(batch()).backward()
    assert all(p.grad is not None and p.grad.any() for p in [*model.embedder.label.parameters()])
    unused = [name for name, p in model.net.named_parameters() if p.grad is None]
    assert not unused  # DDP would wait for them


def test_both_pages_are_of_a_size() -> None:
    sizes = {"image_size": 32, "image_channels": 3, "n_levels": 3, "cond_dim": 64}
    nets: list[NormalizingFlowNet] = [glow(**sizes, width=96, steps=8), realnvp(**sizes, width=20, n_blocks=1)]
    one, other = (sum(p.numel() for p in net.parameters()) for net in nets)
    assert abs(one - other) < 0.05 * one
