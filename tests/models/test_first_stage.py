"""The two members: the sum of losses, who learns when, the adaptive weight, float32, and the verbs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atelier.cli.messages import user_error
from atelier.core.errors import UserError
from atelier.core.rng import ImageRngs
from atelier.losses.adversarial import Hinge, adaptive_weight
from atelier.losses.perceptual import LPIPS
from atelier.models.base import Autoencoder, DiscreteAutoencoder
from atelier.models.first_stage import VQGAN, AutoencoderKL
from atelier.runs import build
from tests.compose import composed
from tests.players import Recording
from tests.tiny import COMMON

TINY = [  # beside tests/tiny.py:COMMON
    "model=vqgan",
    "model.net.width=4",
    "model.net.multipliers=[1,2]",
    "model.net.latent_channels=2",
    "model.net.quantizer.n_codes=8",
    "model.net.quantizer.dim=2",
    "model.perceptual.n_levels=1",
    "model.discriminator.width=4",
    "model.discriminator.n_layers=1",
    "model.discriminator_start=16",
    "model.adversarial_start=40",
]

SMALL = [
    *COMMON,
    "model.net.width=4",
    "model.net.multipliers=[1,2]",
    "model.net.norm_groups=2",
    "model.discriminator.width=2",
    "model.discriminator.n_layers=1",
    "model.discriminator_start=32",
    "model.adversarial_start=64",
]
CODES = ["model.net.quantizer.n_codes=8", "model.net.quantizer.dim=2", "model.net.latent_channels=4"]
PAGES = {"autoencoder_kl": [], "vqgan": CODES}


def made(page: str, *overrides: str) -> AutoencoderKL | VQGAN:
    torch.manual_seed(0)
    return build.model(composed(f"model={page}", *SMALL, *PAGES[page], *overrides), Path("unused"))


@pytest.fixture(params=PAGES)
def model(request: pytest.FixtureRequest) -> AutoencoderKL | VQGAN:
    return made(request.param)


def batch(n: int = 6) -> dict[str, Tensor]:
    return {"image": 2 * torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(1)) - 1}


def step(model: AutoencoderKL | VQGAN, images_seen: int, monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict, dict]:
    """One training step at a time of the clock: who stepped, and each one's gradients."""
    log: list[str] = []
    both = Recording("A", model.net, log), Recording("D", model.discriminator, log)
    monkeypatch.setattr(model, "optimizers", lambda: both)
    monkeypatch.setattr(model, "manual_backward", lambda loss: loss.backward())
    model.images_seen = images_seen
    model.reported.clear()
    model.zero_grad()
    torch.manual_seed(7)
    model.training_step(batch())
    return "".join(log), both[0].gradients, both[1].gradients


# The pieces


def test_hinge_losses_by_hand() -> None:
    real, fake = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]), torch.tensor([[-3.0, 0.25], [-1.0, -0.5]])
    assert Hinge().discriminator(real, fake).item() == pytest.approx((0 + 0.5 + 2 + 0) / 4 + (0 + 1.25 + 0 + 0.5) / 4)
    assert Hinge().generator(None, fake).item() == pytest.approx(4.25 / 4)
    assert Hinge().discriminator(real.bfloat16(), fake.bfloat16()).dtype == torch.float32


def test_the_adaptive_weight_by_hand() -> None:
    """|(3, 4)| / (|(0, 2)| + 1e-4), no gradient of its own, and 1e4 where the discriminator says nothing."""
    w = torch.tensor([1.0, 1.0], requires_grad=True)
    reconstruction, heard = 3 * w[0] + 4 * w[1], 2 * w[1]
    weight = adaptive_weight(reconstruction, heard, w)
    assert weight.item() == pytest.approx(5 / 2.0001, rel=1e-6)
    assert not weight.requires_grad and weight.dtype == torch.float32 and w.grad is None
    assert adaptive_weight(reconstruction, 0 * w[0], w).item() == 1e4
    (reconstruction + weight * heard).backward()
    torch.testing.assert_close(w.grad, torch.tensor([3.0, 4 + 2 * 5 / 2.0001]))


# The step


def test_the_loss_of_the_gaussian_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """mean |x - x'| + pyramid + 1e-6 KL / (C H W), the KL summed over latents: the published sums over C H W."""
    model = made("autoencoder_kl", "model.perceptual_weight=0.5", "model.kl_weight=1e-2")
    x = batch()["image"]
    mean, logvar = model.net.encode(x)
    torch.manual_seed(7)
    back = model.net.decode(mean + (0.5 * logvar).exp() * torch.randn_like(mean))
    step(model, 0, monkeypatch)
    reported = model.reported
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3)).mean()
    torch.testing.assert_close(reported["reconstruction"], (x - back).abs().mean())
    torch.testing.assert_close(reported["kl"], kl)
    torch.testing.assert_close(reported["perceptual"], model.perceptual(x, back).mean())
    expected = reported["reconstruction"] + 0.5 * reported["perceptual"] + 1e-2 * kl / (3 * 8 * 8)
    torch.testing.assert_close(reported["loss"], expected)
    assert set(reported) == {"reconstruction", "kl", "perceptual", "loss"}


def test_the_loss_of_the_quantised_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("vqgan", "model.perceptual=null", "model.net.quantizer.kmeans_init=false").eval()  # the codebook stays
    nn.init.normal_(model.net.quantizer.codebook)
    x = batch()["image"]
    z = model.net.encode(x)[0]
    e = model.net.quantizer.embed(model.net.codes(x))
    step(model, 0, monkeypatch)
    reported = model.reported
    torch.testing.assert_close(reported["reconstruction"], (x - model.net.image(e)).abs().mean())
    torch.testing.assert_close(reported["commitment"], 0.25 * (z - e).square().mean())
    torch.testing.assert_close(reported["loss"], reported["reconstruction"] + reported["commitment"])
    assert set(reported) == {"reconstruction", "commitment", "loss"}


def test_who_learns_when_is_counted_in_images(model: AutoencoderKL | VQGAN, monkeypatch: pytest.MonkeyPatch) -> None:
    """The discriminator learns from 32 images on, the autoencoder hears it from 64 on."""
    for images_seen, turns in ((0, "A"), (24, "A"), (31, "A"), (32, "AD"), (56, "AD"), (64, "AD"), (999, "AD")):
        before = {name: value.clone() for name, value in model.discriminator.state_dict().items()}
        stepped, _, theirs = step(model, images_seen, monkeypatch)
        assert stepped == turns and bool(theirs) == ("D" in turns)
        untouched = all(torch.equal(before[n], value) for n, value in model.discriminator.state_dict().items())
        assert untouched == (images_seen < 32)  # its batch statistics too
        assert ("generator" in model.reported) == ("adaptive_weight" in model.reported) == (images_seen >= 64)
        assert ("discriminator" in model.reported) == (images_seen >= 32)


def test_the_autoencoder_is_deaf_until_it_listens(
    model: AutoencoderKL | VQGAN, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another discriminator changes no gradient before, and changes it afterwards."""
    model.eval()  # the same codebook in both steps
    for images_seen, deaf in ((63, True), (64, False)):
        found = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            for p in model.discriminator.parameters():
                nn.init.normal_(p, std=0.3)
            found.append(step(model, images_seen, monkeypatch)[1])
        assert all(torch.equal(found[0][n], found[1][n]) for n in found[0]) == deaf


def test_what_is_heard_weighs_as_much_as_was_asked_for(
    model: AutoencoderKL | VQGAN, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the last layer the adversarial gradient is `discriminator_weight` times as long as the reconstruction's."""
    model.eval()
    model.discriminator_weight = 0.3
    last = "decoder.head.2.weight"
    deaf, heard = (step(model, n, monkeypatch)[1][last] for n in (63, 64))
    asked = 0.3 * (deaf.norm() - 1e-4 * model.reported["adaptive_weight"])
    torch.testing.assert_close((heard - deaf).norm(), asked, rtol=1e-4, atol=0)


def test_a_discriminator_step_leaves_the_autoencoder_alone(
    model: AutoencoderKL | VQGAN, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ours, theirs = step(model, 64, monkeypatch)
    assert {n: p.grad for n, p in model.net.named_parameters() if not torch.equal(p.grad, ours[n])} == {}
    x = batch()["image"]
    model.eval()
    logits = model.discriminator(x)
    assert theirs and logits.shape == (6, 1, 2, 2)


def test_the_discriminator_learns_from_both_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient is that of its own loss: what it told the autoencoder is forgotten."""
    model = made("autoencoder_kl").eval()
    _, _, theirs = step(model, 64, monkeypatch)
    x = batch()["image"]
    mean, logvar = model.net.encode(x)
    torch.manual_seed(7)
    back = model.net.decode(mean + (0.5 * logvar).exp() * torch.randn_like(mean)).detach()
    model.zero_grad()
    Hinge().discriminator(model.discriminator(x), model.discriminator(back)).backward()
    for name, p in model.discriminator.named_parameters():
        torch.testing.assert_close(theirs[name], p.grad)


def test_losses_are_float32_under_bf16(model: AutoencoderKL | VQGAN, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, torch.dtype] = {}
    model.net.decoder.register_forward_hook(lambda net, args, out: seen.update(decoder=out.dtype))
    model.discriminator.layers.register_forward_hook(lambda net, args, out: seen.update(discriminator=out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, ours, theirs = step(model, 64, monkeypatch)
        assert set(seen.values()) == {torch.bfloat16}  # autocast was on
        assert {v.dtype for v in model.reported.values()} == {torch.float32}
        x, model = batch()["image"], model.eval()
        under = model.decode(model.encode(x))
        assert seen["decoder"] == torch.float32  # what others stand on
    assert torch.equal(under, model.decode(model.encode(x)))
    assert {g.dtype for g in [*ours.values(), *theirs.values()]} == {torch.float32}


def test_each_optimizer_owns_its_player(model: AutoencoderKL | VQGAN) -> None:
    held = [{id(p) for group in o.param_groups for p in group["params"]} for o in model.configure_optimizers()]
    assert held == [{id(p) for p in net.parameters()} for net in (model.net, model.discriminator)]


def test_a_perceptual_net_is_neither_trained_nor_saved(
    lpips_files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"model.perceptual.{name}={path}" for name, path in lpips_files.items()]
    model = made("autoencoder_kl", "data.image_size=16", "perceptual@model.perceptual=lpips", *words)
    assert isinstance(model.perceptual, LPIPS)
    told = {name.split(".")[0] for name in model.state_dict()}
    assert told == {"net", "discriminator", "moments"}
    assert sum(p.numel() for p in model.parameters()) < 20_000
    monkeypatch.setitem(globals(), "batch", lambda: {"image": 2 * torch.rand(2, 3, 16, 16) - 1})
    step(model, 0, monkeypatch)
    assert model.reported["perceptual"] > 0


# The verbs


def test_what_each_member_is(model: AutoencoderKL | VQGAN) -> None:
    assert isinstance(model, Autoencoder) and isinstance(model, DiscreteAutoencoder) == isinstance(model, VQGAN)
    assert model.ema_nets == ("net",) and model.needs == frozenset()


def test_encode_is_the_mode_or_a_draw(model: AutoencoderKL | VQGAN) -> None:
    model.eval()
    x = batch()["image"]
    with torch.no_grad():
        mean, logvar = model.net.encode(x)
        assert torch.equal(model.encode(x), mean)
        draws = torch.stack([model.encode(x, ImageRngs(seed, 0, 6)) for seed in range(300)])
        alone = model.encode(x[4:5], ImageRngs(3, 4, 1))
        torch.testing.assert_close(model.encode(x, ImageRngs(3, 0, 6))[4:5], alone, rtol=1e-5, atol=1e-5)
    deviation = (0.5 * logvar).exp()
    assert ((draws.mean(0) - mean).abs() < 0.4 * deviation).all()
    assert (draws.std(0) / deviation).mean().item() == pytest.approx(1, abs=0.05)


def test_codes_are_what_the_decoder_reads() -> None:
    model = made("vqgan").eval()
    x = batch()["image"]
    codes = model.codes(x)
    assert model.n_codes == 8 and codes.shape == (6, 4, 4) and codes.min() >= 0 and codes.max() < 8
    assert torch.equal(model.net.decode_codes(codes).clamp(-1, 1), model.decode(model.encode(x)))


def test_images_lie_in_their_range_and_sample_is_render_of_draw(model: AutoencoderKL | VQGAN) -> None:
    model.eval()
    nn.init.constant_(model.net.decoder.head[-1].bias, 3.0)
    with torch.no_grad():
        z = model.sample_latents(ImageRngs(0, 0, 3), {})
        assert z.shape == (3, *model.net.latent_shape)
        assert model.decode(z).max() == 1
        assert torch.equal(model.sample({}, ImageRngs(0, 0, 3)), model.generate(z, {}, ImageRngs(0, 0, 3)))
        assert torch.equal(model.sample_latents(ImageRngs(0, 2, 1), {}), z[2:])


def test_noise_has_the_moments_of_the_latents(model: AutoencoderKL | VQGAN) -> None:
    """Channel by channel; the first batch counts whole, later ones move them slowly."""
    n = model.net.latent_shape[0]
    centre, width = torch.linspace(-3, 3, n)[:, None, None], torch.linspace(0.5, 2, n)[:, None, None]
    model.moments.add(centre + width * torch.randn(500, *model.net.latent_shape), first=True)
    noise = model.sample_latents(ImageRngs(0, 0, 500), {})
    torch.testing.assert_close(noise.mean((0, 2, 3)), centre.flatten(), atol=0.15, rtol=0)
    torch.testing.assert_close(noise.std((0, 2, 3)), width.flatten(), atol=0.1, rtol=0)
    before = model.moments.mean.clone()
    model.moments.add(centre + 1 + 0 * noise, first=False)
    assert ((model.moments.mean - before) > 0).all() and ((model.moments.mean - before) < 0.1).all()


def test_the_moments_are_kept(model: AutoencoderKL | VQGAN, monkeypatch: pytest.MonkeyPatch) -> None:
    step(model, 0, monkeypatch)
    assert {"moments.mean", "moments.second"} < set(model.state_dict())
    assert model.moments.mean.abs().sum() > 0 and (model.moments.second >= model.moments.mean**2).all()


@pytest.mark.parametrize(("page", "overrides", "line"), [
    ("vqgan", ["model.adversarial_start=8"], "error: model.adversarial_start=8: the discriminator learns from 32"),
    ("autoencoder_kl", ["model.discriminator.n_layers=2"], "error: model.discriminator.n_layers=2: 2 layers need 12"),
])  # fmt: skip
def test_what_does_not_fit_is_one_line(page: str, overrides: list[str], line: str) -> None:
    with pytest.raises(Exception) as caught:
        made(page, *overrides)
    assert user_error(caught.value).line().startswith(line)


def test_a_member_takes_its_own_net() -> None:
    ours, theirs = made("autoencoder_kl"), made("vqgan")
    given: dict[str, Any] = {
        name: getattr(ours, name)
        for name in ("discriminator", "perceptual", "perceptual_weight", "kl_weight", "discriminator_weight",
                     "discriminator_start", "adversarial_start", "generator_optimizer", "discriminator_optimizer",
                     "grad_clip")
    }  # fmt: skip
    with pytest.raises(UserError) as caught:
        AutoencoderKL(net=theirs.net, **given)
    assert caught.value.line().startswith(
        "error: .net._target_=VQGANNet: AutoencoderKL takes a KLNet. Fix: .net._target_="
    )
