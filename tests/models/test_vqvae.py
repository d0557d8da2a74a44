"""The loss by hand, what its latents mean, and that it learns with every quantiser."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from atelier.core.errors import UserError
from atelier.core.rng import ImageRngs
from atelier.models.vqvae import VQVAE
from atelier.nets.codec import LatentCodec
from atelier.nets.frozen import Frozen
from atelier.nets.quantizers import FSQ, VectorQuantizer
from atelier.nets.vqvae import VQNet

TINY = [  # beside tests/tiny.py:COMMON
    "model=vqvae",
    "model.net.width=4",
    "model.net.n_blocks=1",
    "model.net.quantizer.n_codes=8",
    "model.net.quantizer.dim=2",
]

KINDS = ("ema", "gradient", "fsq")


def quantizer(kind: Any) -> VectorQuantizer | FSQ:
    if kind == "fsq":
        return FSQ(levels=[4, 3, 3])
    given = {"ema_decay": 0.9, "commitment_weight": 0.25, "kmeans_init": True, "dead_code_threshold": 0.5}
    return VectorQuantizer(n_codes=16, dim=3, update=kind, **given)


def net(kind: str = "ema", image_size: int = 8, patch_size: int | None = 2) -> VQNet:
    torch.manual_seed(0)
    sizes = {
        "image_size": image_size,
        "image_channels": 3,
        "width": 8,
        "patch_size": patch_size,
        "n_downs": 1,
        "n_blocks": 1,
    }
    return VQNet(**sizes, quantizer=quantizer(kind))


def made(kind: str = "ema") -> VQVAE:
    return VQVAE(net(kind), lambda parameters: torch.optim.Adam(parameters, 1e-2), None)


def images(n: int = 6) -> Tensor:
    """Each of one colour with one pixel of another."""
    torch.manual_seed(3)
    x = torch.rand(n, 3, 1, 1).expand(n, 3, 8, 8).clone()
    x[:, :, 2, 3] = -1
    return x


@pytest.mark.parametrize("kind", KINDS)
def test_loss_by_hand(kind: str) -> None:
    model, x = made(kind).train(), images()
    twin = made(kind).train()
    torch.manual_seed(5)
    loss = model.training_step({"image": x})
    torch.manual_seed(5)
    z = twin.net.encoder(x)
    quantized = twin.net.quantizer(z)
    reconstruction = (twin.net.decoder(quantized.z) - x).square().mean()
    distance = (z - quantized.z).square().mean()
    weight = {"ema": 0.25, "gradient": 1.25, "fsq": 0.0}[kind]
    torch.testing.assert_close(model.reported["reconstruction"], reconstruction)
    torch.testing.assert_close(model.reported["commitment"], weight * distance)
    torch.testing.assert_close(loss, reconstruction + weight * distance)
    frequencies = quantized.codes.flatten().bincount().float() / quantized.codes.numel()
    entropy = torch.distributions.Categorical(frequencies).entropy()
    torch.testing.assert_close(model.reported["perplexity"], entropy.exp())


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_learns(kind: str) -> None:
    model = made(kind).train()
    torch.nn.init.normal_(model.net.decoder[-1].last.weight)  # zero at the start
    model.training_step({"image": images()}).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_a_few_images(kind: str) -> None:
    model, x = made(kind).train(), images()
    optimizer, losses = model.configure_optimizers(), []
    for _ in range(60):
        optimizer.zero_grad()
        model.training_step({"image": x}).backward()
        optimizer.step()
        losses.append(model.reported["reconstruction"].item())
    assert losses[-1] < 0.1 * losses[0]
    back = model.eval().decode(model.encode(x))
    assert F.mse_loss(back, x) < 0.1 * losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_what_is_quantised(kind: str) -> None:
    model, x = made(kind).train(), images()
    model.training_step({"image": x})
    model.eval()
    z, codes = model.encode(x), model.codes(x)
    assert torch.equal(z, model.net.encoder(x)) and torch.equal(z, model.encode(x, ImageRngs(0, 0, 6)))
    assert z.shape == (6, *model.net.latent_shape) and codes.shape == (6, *model.net.code_shape)
    assert codes.dtype == torch.int64 and 0 <= codes.min() and codes.max() < model.n_codes
    assert torch.equal(model.net.decode(z), model.net.decode_codes(codes))
    assert torch.equal(model.net.quantizer(model.net.quantizer.latents(codes)).codes, codes)
    assert torch.equal(model.decode(z), model.net.decode(z).clamp(-1, 1))


def test_decoded_images_lie_in_their_range() -> None:
    model = made().eval()
    torch.nn.init.constant_(model.net.decoder[-1].coarse.bias, 5.0)
    assert model.decode(torch.zeros(1, 3, 2, 2)).max() == 1


def test_latent_diffusion_can_stand_on_it() -> None:
    """In units of its codec; its latents are certain, so that a draw of the posterior is the mode."""
    stage, x = net().train(), images()
    stage(x)
    codec = LatentCodec(Frozen(stage), None, 0.0, "mode")
    codec.measure(lambda n: [x[:n]])
    z = codec.encode(x)
    assert z.std().item() == pytest.approx(1, rel=0.05)
    torch.testing.assert_close(codec.decode(z), stage.decode_codes(stage.codes(x)))
    mean, logvar = stage.encode(x)
    assert torch.equal(logvar, torch.full_like(mean, -20))


@pytest.mark.parametrize("kind", KINDS)
def test_draws_follow_the_usage_and_belong_to_images(kind: str) -> None:
    model = made(kind).eval()
    if kind != "fsq":
        torch.nn.init.normal_(model.net.quantizer.codebook)
        model.net.quantizer.counts.copy_(torch.arange(16.0))
    together = model.sample_latents(ImageRngs(0, 0, 500), {})
    codes = model.net.quantizer(together).codes
    shares = codes.flatten().bincount(minlength=model.n_codes) / codes.numel()
    torch.testing.assert_close(shares, model.net.quantizer.usage(), atol=0.02, rtol=0)
    assert torch.equal(model.sample_latents(ImageRngs(0, 7, 2), {}), together[7:9])
    drawn = model.sample({}, ImageRngs(0, 0, 3))
    assert drawn.shape == (3, 3, 8, 8)
    assert torch.equal(drawn, model.generate(together[:3], {}, ImageRngs(0, 0, 3)))


def test_evaluation_leaves_the_codebook_alone() -> None:
    model = made().train()
    model.training_step({"image": images()})
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.decode(model.encode(images()))
    model.codes(images())
    model.sample({}, ImageRngs(0, 0, 2))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_losses_are_float32_under_bf16_and_codes_those_of_float32() -> None:
    model, x, seen = made().train(), images(), []
    handle = model.net.decoder.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.training_step({"image": x})
        assert model.net(x)[0].dtype == model.net.encode(x)[0].dtype == torch.float32
    handle.remove()
    assert set(seen) == {torch.bfloat16}  # autocast was on
    assert {loss.dtype, *(value.dtype for value in model.reported.values())} == {torch.float32}
    model.eval()
    plain = model.encode(x), model.codes(x), model.decode(model.encode(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = model.encode(x), model.codes(x), model.decode(model.encode(x))
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.parametrize(("image_size", "patch_size", "side"), [(8, 2, 2), (32, None, 8), (64, None, 8), (8, None, 4)])
def test_sizes(image_size: int, patch_size: int | None, side: int) -> None:
    stage = net(image_size=image_size, patch_size=patch_size)
    assert stage.code_shape == (side, side) and stage.latent_shape == (3, side, side)
    x = torch.zeros(1, 3, image_size, image_size)
    assert stage(x)[0].shape == x.shape and stage.codes(x).shape == (1, side, side)


def test_an_image_that_does_not_fold_is_refused() -> None:
    with pytest.raises(UserError, match="patch 2 and 1 halvings need a multiple of 4. Fix: data.image_size=12"):
        net(image_size=10)
